//! `convpass few-shot`: few-shot learning and domain generalization.

mod args;
mod cross_validation;
mod draw;
mod ensemble;
mod job;
mod measured;
mod rates;
#[cfg(test)]
mod tests;
mod training;
mod votes;

use std::path::Path;

use anyhow::{Result, bail};
use convpass::clip::read_class_names;
use convpass::data::FileList;

pub use args::FewShotArgs;
use draw::Draw;
pub use ensemble::{ENSEMBLE, FOLDER as MEMBERS};
use job::{DrawResult, FewShotJob};
use measured::MeasuredSet;

use crate::Outcome;
use crate::files::write_atomically;
use crate::report::Spread;
use crate::run_folder::FolderLock;
use crate::survey;
use crate::targets::{self, TargetSet};

/// The name of the test images among the sets that a run is measured on.
const TEST: &str = "test";
/// Names that a target cannot have: [`TEST`] and the other columns of results.csv.
const COLUMNS: [&str; 5] = [TEST, "shots", "seed", "images", "test_top1"];

pub fn run(args: &FewShotArgs) -> Result<Outcome> {
    args.check()?;
    let method = args.method.chosen("")?;
    args.threads.apply()?;
    let sets = Sets::read(args)?;
    let out = args.folder(method.name());
    let draws = Draw::all(args, &sets.data, &out)?;
    let _guard = args.backbone.precision().guard(args.backbone.device.device()?)?;
    let opened = args.backbone.open(args.backbone.checkpoint()?)?;
    let job = FewShotJob::new(args, method, sets, opened)?;
    let _lock = FolderLock::take(&out)?;
    job.run_all(&draws, &out.join("results.csv"))?;
    Ok(Outcome::Done)
}

/// The images of all runs; all sets share the labels of `data`.
struct Sets {
    data: FileList,
    test: FileList,
    targets: Vec<TargetSet>,
    /// The names of the classes in the order of the labels; the label as text if it has no name.
    class_names: Vec<String>,
    /// The number of images that cannot be read and are skipped.
    skipped: usize,
}

impl Sets {
    fn read(args: &FewShotArgs) -> Result<Self> {
        let names = args.classes.classes.as_ref().map(read_class_names).transpose()?;
        let folder = |file: &Path| file.parent().unwrap_or(Path::new("")).to_path_buf();
        let is_folder = args.data.is_dir();
        let data = match &names {
            Some(names) if is_folder => FileList::from_folders_of(&args.data, names)?,
            None if is_folder => FileList::from_folders(&args.data)?,
            Some(names) => FileList::read_of(folder(&args.data), &args.data, names)?,
            None => FileList::read(folder(&args.data), &args.data, None)?,
        };
        let numbers = || (0..data.num_classes()).map(|class| class.to_string()).collect();
        let is_named = !data.class_names().is_empty();
        let names = if is_named { data.class_names().to_vec() } else { numbers() };
        let test = if !args.test.is_dir() {
            FileList::read_of(folder(&args.test), &args.test, &names)?
        } else if is_named {
            FileList::from_folders_of(&args.test, &names)?
        } else {
            bail!(
                "{}: --test must be a list, because --data is a list without names of classes",
                args.test.display()
            )
        };
        let mut targets = targets::read(&args.targets.targets, None, &names)?;
        let is_taken = |target: &&TargetSet| COLUMNS.contains(&target.name.as_str());
        if let Some(target) = targets.iter().find(is_taken) {
            bail!("--target: results.csv already has a column called {}", target.name);
        }
        let lists = [&data, &test].into_iter().chain(targets.iter().map(|target| &target.list));
        let (lists, skipped) = survey::readable_sets(lists, args.survey, args.threads)?;
        let mut lists = lists.into_iter();
        let (Some(train), Some(test)) = (lists.next(), lists.next()) else {
            bail!("there are no images");
        };
        survey::has_all_classes(&data, &train)?;
        for (target, list) in targets.iter_mut().zip(lists) {
            target.list = list;
        }
        let sets = targets.iter().map(|target| (target.name.as_str(), &target.list));
        for set in [(TEST, &test)].into_iter().chain(sets) {
            survey::say_overlap(("training", &train), set);
        }
        Ok(Sets { data: train, test, targets, class_names: names, skipped })
    }
}

/// Prints the mean and the standard deviation over the seeds for each set.
fn say(outcomes: &[DrawResult], targets: &[MeasuredSet]) {
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

fn save(file: &Path, outcomes: &[DrawResult], targets: &[MeasuredSet]) -> Result<()> {
    let mut table = csv::Writer::from_writer(Vec::new());
    let names = targets.iter().map(|target| target.name.as_str());
    table.write_record(COLUMNS[1..].iter().copied().chain(names))?;
    for row in outcomes {
        table.serialize((row.shots, row.seed, row.images, row.test_top1, &row.targets))?;
    }
    Ok(write_atomically(file, &table.into_inner()?)?)
}
