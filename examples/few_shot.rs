//! Few-shot learning and domain generalization: trains on K images of each class for several K and seeds, measures on
//! the test images and on other sets of the classes, and reports mean and deviation.
//!
//! ```text
//! cargo run --release --example few_shot -- --data TRAIN --test TEST --backbone FILE --out runs/few-shot
//! ```
//!
//! TRAIN and TEST are folders with a folder for each class, or lists with a line `path label` an image, relative to
//! the list. Training images are resized, then changed by colour jitter and RandAugment; of test images, resized so that
//! the shorter side is 8/7 of the input's, the centre is taken (256 and 224). The weights are the last epoch's.
//!
//! From 16 images a class to other domains, from a head made of the class names by `clip_zero_shot --head-out`:
//!
//! ```text
//! cargo run --release --example few_shot -- --protocol domain_generalization --head head.safetensors \
//!     --data imagenet/train --test imagenet/val --target sketch=sketch --target a=imagenet-a --backbone CLIP --out runs/dg
//! ```
//!
//! The rows of the head are in the order of the labels: with folders, in the order of their names, or of `--classes`.
//!
//! A target is a folder or a list; one that has some of the classes alone is measured over those: a folder's are those
//! that its folders are named after, a list's are in a file of names or numbers (`a=test.txt:names.txt`).
//!
//! `--out` gets `Kshot-seedS/` with `run.json`, `adapter.safetensors`, `log.jsonl`, the list of the images drawn and
//! what was measured, and `results.csv` with the runs of this call. A run that is there is not run again, one that was
//! cut off goes on where it was, and a target that is new is measured with the adapter that is there.

#[path = "few_shot/args.rs"]
mod args;
#[path = "shared/backbone.rs"]
mod backbone;
#[path = "shared/failure.rs"]
mod failure;
#[path = "shared/head.rs"]
mod head;
#[path = "few_shot/job.rs"]
mod job;
#[path = "few_shot/measured.rs"]
mod measured;
#[path = "shared/method.rs"]
mod method;
#[path = "shared/precision.rs"]
mod precision;
#[path = "shared/run_folder.rs"]
mod run_folder;
#[path = "shared/targets.rs"]
mod targets;
#[path = "shared/whole_file.rs"]
mod whole_file;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use convpass::{Backbone, FileList, Resize, Spread, read_class_names};

use args::Args;
use backbone::{Opened, Processor, Source, Visit};
use job::{Draw, Job, Outcome};
use measured::Set;
use targets::TargetSet;

/// What the test images are called among the sets that a run is measured on.
const TEST: &str = "test";
/// Names that a target cannot have: that one, and those of the columns before it.
const COLUMNS: [&str; 5] = [TEST, "shots", "seed", "images", "test_top1"];

fn main() -> ExitCode {
    convpass::keep_freed_memory();
    failure::exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let sets = Sets::read(args)?;
    let draws = Draw::all(args, &sets.data)?;
    let (processor, precision) = (Processor::of(args.cuda), args.precision);
    let _guard = precision.guard(processor.device()?)?;
    let source = Source { file: &args.backbone, untold: args.untold, processor, precision };
    source.open(Task { args, sets, draws })
}

/// The images of all runs, under the same labels.
struct Sets {
    data: FileList,
    test: FileList,
    targets: Vec<TargetSet>,
}

impl Sets {
    fn read(args: &Args) -> Result<Self> {
        let names = args.classes.as_ref().map(read_class_names).transpose()?;
        let list = |file: &Path, classes: Option<i64>| {
            FileList::read(file.parent().unwrap_or(Path::new("")), file, classes)
        };
        let is_folder = args.data.is_dir();
        let data = match &names {
            Some(names) if is_folder => FileList::from_folders_of(&args.data, names)?,
            None if is_folder => FileList::from_folders(&args.data)?,
            names => list(&args.data, names.as_ref().map(|names| names.len() as i64))?,
        };
        let test = match args.test.is_dir() {
            true if is_folder => FileList::from_folders_of(&args.test, data.class_names())?,
            true => bail!("{}: --test must be a list where --data is one", args.test.display()),
            false => list(&args.test, Some(data.num_classes()))?,
        };
        let numbers = || (0..data.num_classes()).map(|class| class.to_string()).collect();
        let names = match is_folder {
            true => data.class_names().to_vec(),
            false => names.unwrap_or_else(numbers),
        };
        let targets = targets::read(&args.targets, None, &names)?;
        let is_taken = |target: &&TargetSet| COLUMNS.contains(&target.name.as_str());
        if let Some(target) = targets.iter().find(is_taken) {
            bail!("--target: {} is what another column of results.csv is called", target.name);
        }
        Ok(Sets { data, test, targets })
    }
}

/// What is run on a backbone, of whatever family it is.
struct Task<'a> {
    args: &'a Args,
    sets: Sets,
    draws: Vec<Draw>,
}

impl Visit for Task<'_> {
    type Output = ();

    fn visit<B: Backbone>(self, opened: Opened<B>) -> Result<()> {
        let Task { args, sets, draws } = self;
        let (rows, columns) = opened.image_size;
        let shorter_side = args.test_resize(rows.max(columns));
        let resize = Resize::center_crop(shorter_side, (rows, columns)).context("--test-resize")?;
        let target = |set: TargetSet| Set::new(&set.name, &set.list, set.subset, resize);
        let targets = sets.targets.into_iter().map(target).collect::<Result<Vec<_>>>()?;
        let test = Set::new(TEST, &sets.test, None, resize)?;
        let classes = sets.data.num_classes();
        let digest = opened.backbone.digest()?;
        let job = Job { args, classes, test, targets, shorter_side, opened, digest };
        let mut outcomes = Vec::new();
        for draws in draws.chunk_by(|a, b| a.shots == b.shots) {
            let first = outcomes.len();
            for draw in draws {
                outcomes.push(job.run(draw)?);
                save(&args.out.join("results.csv"), &outcomes, &job.targets)?;
            }
            say(&outcomes[first..], &job.targets);
        }
        Ok(())
    }
}

/// Mean and deviation over the seeds, of each set.
fn say(outcomes: &[Outcome], targets: &[Set]) {
    let line = |set: &str, top1: &dyn Fn(&Outcome) -> f64| {
        let figures: Vec<f64> = outcomes.iter().map(top1).collect();
        let (Some(spread), Some(first)) = (Spread::of(&figures), outcomes.first()) else { return };
        let over = match spread.deviation {
            Some(deviation) => format!(" ± {deviation:.2} over {} seeds", spread.seeds),
            None => String::new(),
        };
        println!("{} a class: {set} {:.2} %{over}", first.shots, spread.mean);
    };
    line("top-1", &|outcome| outcome.test_top1);
    for (at, target) in targets.iter().enumerate() {
        line(&target.name, &|outcome| outcome.targets[at]);
    }
}

fn save(file: &Path, outcomes: &[Outcome], targets: &[Set]) -> Result<()> {
    let mut table = csv::Writer::from_writer(Vec::new());
    let names = targets.iter().map(|target| target.name.as_str());
    table.write_record(COLUMNS[1..].iter().copied().chain(names))?;
    for row in outcomes {
        table.serialize((row.shots, row.seed, row.images, row.test_top1, &row.targets))?;
    }
    whole_file::write(file, &table.into_inner()?)
}
