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
//! A target is a folder or a list; one that has some of the classes alone is measured over those: a folder's are those
//! that its folders are named after, a list's are in a file of names or numbers (`a=test.txt:names.txt`).
//!
//! `--out` gets `Kshot-seedS/` with `run.json`, `adapter.safetensors`, `log.jsonl`, `targets.json` and the list of the
//! images drawn, and `results.csv`. A run that is there is not run again, one that was cut off goes on where it was,
//! and a target that is new is measured with the adapter that is there.

#[path = "few_shot/args.rs"]
mod args;
#[path = "shared/backbone.rs"]
mod backbone;
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

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use convpass::{Backbone, FileList, ImageDataset, Resize, Spread, read_class_names};

use args::Args;
use backbone::{Opened, Source, Visit};
use job::{Job, Outcome};
use targets::TargetSet;

fn main() -> ExitCode {
    convpass::keep_freed_memory();
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let sets = Sets::read(args)?;
    let precision = args.precision;
    let _guard = precision.guard(args.processor().device()?)?;
    let processor = args.processor();
    let source =
        Source { file: &args.backbone, heads: None, image_size: None, processor, precision };
    source.open(Task { args, sets })
}

/// The images of all runs.
struct Sets {
    data: FileList,
    test: FileList,
    targets: Vec<TargetSet>,
    classes: i64,
}

impl Sets {
    /// Training images, test images and targets under the same labels.
    fn read(args: &Args) -> Result<Self> {
        let names = args.classes.as_ref().map(read_class_names).transpose()?;
        let of_names = names.as_ref().map(|names| names.len() as i64);
        let list =
            |file: &Path| FileList::read(file.parent().unwrap_or(Path::new("")), file, of_names);
        let is_folder = args.data.is_dir();
        let data = match &names {
            Some(names) if is_folder => FileList::from_folders_of(&args.data, names)?,
            None if is_folder => FileList::from_folders(&args.data)?,
            _ => list(&args.data)?,
        };
        let test = match args.test.is_dir() {
            true if is_folder => FileList::from_folders_of(&args.test, data.class_names())?,
            true => bail!("{}: --test must be a list where --data is one", args.test.display()),
            false => list(&args.test)?,
        };
        let classes = of_names.unwrap_or(data.num_classes().max(test.num_classes()));
        let numbers = || (0..classes).map(|class| class.to_string()).collect();
        let names = match is_folder {
            true => data.class_names().to_vec(),
            false => names.unwrap_or_else(numbers),
        };
        let targets = targets::read(&args.targets, None, &names)?;
        Ok(Sets { data, test, targets, classes })
    }
}

/// What is run on a backbone, of whatever family it is.
struct Task<'a> {
    args: &'a Args,
    sets: Sets,
}

impl Visit for Task<'_> {
    type Output = ();

    fn visit<B: Backbone>(self, opened: Opened<B>) -> Result<()> {
        let Task { args, sets } = self;
        let (rows, columns) = opened.image_size;
        let shorter_side = args.test_resize(rows.max(columns));
        let resize = Resize::center_crop(shorter_side, (rows, columns))?;
        let stream = |list: &FileList| ImageDataset::stream(list, resize);
        let targets = sets.targets.iter().map(|set| (set, stream(&set.list))).collect();
        let test = stream(&sets.test);
        let (data, classes) = (&sets.data, sets.classes);
        let job = Job { args, data, classes, test, targets, shorter_side, opened };
        let mut outcomes = Vec::new();
        for shots in args.shots() {
            let first = outcomes.len();
            for &seed in &args.seeds {
                outcomes.push(job.run(shots, seed)?);
                save(&args.out.join("results.csv"), &outcomes, &sets.targets)?;
            }
            say(shots, &outcomes[first..], &sets.targets);
        }
        Ok(())
    }
}

/// Mean and deviation over the seeds, of each set.
fn say(shots: usize, outcomes: &[Outcome], targets: &[TargetSet]) {
    let line = |set: &str, top1: &dyn Fn(&Outcome) -> f64| {
        let top1: Vec<f64> = outcomes.iter().map(top1).collect();
        if let Some(Spread { mean, deviation, seeds }) = Spread::of(&top1) {
            let deviation = deviation.unwrap_or_default();
            println!("{shots} a class: {set} {mean:.2} % +- {deviation:.2} over {seeds} seeds");
        }
    };
    line("top-1", &|outcome| outcome.test_top1);
    for (at, target) in targets.iter().enumerate() {
        line(&target.name, &|outcome| outcome.targets[at]);
    }
}

fn save(file: &Path, outcomes: &[Outcome], targets: &[TargetSet]) -> Result<()> {
    let mut table = csv::Writer::from_path(file).with_context(|| file.display().to_string())?;
    let names = targets.iter().map(|target| target.name.as_str());
    table.write_record(["shots", "seed", "images", "test_top1"].into_iter().chain(names))?;
    for row in outcomes {
        table.serialize((row.shots, row.seed, row.images, row.test_top1, &row.targets))?;
    }
    Ok(table.flush()?)
}
