//! `convpass few-shot`: few-shot learning and domain generalization.

mod args;
mod job;
mod measured;

use std::path::Path;

use anyhow::{Context, Result, bail};
use convpass::Backbone;
use convpass::clip::read_class_names;
use convpass::data::{FileList, Resize};

pub use args::Args;
use job::{Draw, DrawResult, Job};
use measured::Set;

use crate::Outcome;
use crate::files::write_atomically;
use crate::flags::Opened;
use crate::report::Spread;
use crate::targets::{self, TargetSet};

/// What the test images are called among the sets that a run is measured on.
const TEST: &str = "test";
/// Names that a target cannot have: that one, and those of the columns before it.
const COLUMNS: [&str; 5] = [TEST, "shots", "seed", "images", "test_top1"];

pub fn run(args: &Args) -> Result<Outcome> {
    args.threads.apply()?;
    let sets = Sets::read(args)?;
    let draws = Draw::all(args, &sets.data)?;
    let _guard = args.backbone.precision().guard(args.backbone.device.device()?)?;
    run_draws(args, sets, &draws, args.backbone.open(&args.file.backbone)?)?;
    Ok(Outcome::Done)
}

/// The images of all runs, under the same labels.
struct Sets {
    data: FileList,
    test: FileList,
    targets: Vec<TargetSet>,
    /// In the order of the labels; their numbers if they have none.
    class_names: Vec<String>,
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
        let names =
            if is_folder { data.class_names().to_vec() } else { names.unwrap_or_else(numbers) };
        let targets = targets::read(&args.targets, None, &names)?;
        let is_taken = |target: &&TargetSet| COLUMNS.contains(&target.name.as_str());
        if let Some(target) = targets.iter().find(is_taken) {
            bail!("--target: {} is what another column of results.csv is called", target.name);
        }
        Ok(Sets { data, test, targets, class_names: names })
    }
}

/// Every run, and what is said of it.
fn run_draws(args: &Args, sets: Sets, draws: &[Draw], opened: Opened) -> Result<()> {
    let (rows, columns) = opened.image_size();
    let shorter_side = args.test_resize(rows.max(columns));
    let resize = Resize::center_crop(shorter_side, (rows, columns)).context("--test-resize")?;
    let target = |set: TargetSet| Set::new(&set.name, &set.list, set.subset, resize);
    let targets = sets.targets.into_iter().map(target).collect::<Result<Vec<_>>>()?;
    let test = Set::new(TEST, &sets.test, None, resize)?;
    let classes = sets.data.num_classes();
    let digest = opened.backbone.digest()?;
    let normalization = opened.normalization(args.training.normalization)?;
    let class_names = sets.class_names;
    let job = Job {
        args,
        classes,
        class_names,
        test,
        targets,
        shorter_side,
        opened,
        normalization,
        digest,
    };
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

/// Mean and deviation over the seeds, of each set.
fn say(outcomes: &[DrawResult], targets: &[Set]) {
    let line = |set: &str, top1: &dyn Fn(&DrawResult) -> f64| {
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

fn save(file: &Path, outcomes: &[DrawResult], targets: &[Set]) -> Result<()> {
    let mut table = csv::Writer::from_writer(Vec::new());
    let names = targets.iter().map(|target| target.name.as_str());
    table.write_record(COLUMNS[1..].iter().copied().chain(names))?;
    for row in outcomes {
        table.serialize((row.shots, row.seed, row.images, row.test_top1, &row.targets))?;
    }
    Ok(write_atomically(file, &table.into_inner()?)?)
}
