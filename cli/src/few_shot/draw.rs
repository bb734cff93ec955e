//! The training images that are drawn for a run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use convpass::data::{FileList, Fold};

use super::args::{FewShotArgs, Select};

/// The folds of a cross-validation without --folds.
const FOLDS: usize = 5;

/// The training images that were drawn for a run, and the adapter that its head starts from.
pub struct Draw {
    pub shots: usize,
    pub seed: i64,
    pub list: FileList,
    /// The folds of a cross-validation; empty without one.
    pub folds: Vec<Fold>,
    /// The folder of the run.
    pub out: PathBuf,
    pub head: Option<PathBuf>,
}

impl Draw {
    /// Returns the draws of all runs. An error in any of them is found before the first run starts.
    pub fn all(args: &FewShotArgs, data: &FileList, out: &Path) -> Result<Vec<Draw>> {
        let mut draws: Vec<Draw> = Vec::new();
        for shots in args.shots() {
            for &seed in &args.seeds.seeds {
                let twice = draws.iter().any(|draw| (draw.shots, draw.seed) == (shots, seed));
                ensure!(
                    !twice,
                    "--shots, --seeds: {shots} a class with seed {seed} is given twice"
                );
                draws.push(Draw::new(args, data, out, (shots, seed))?);
            }
        }
        Ok(draws)
    }

    fn new(
        args: &FewShotArgs,
        data: &FileList,
        out: &Path,
        (shots, seed): (usize, i64),
    ) -> Result<Draw> {
        let list = if args.at_most {
            data.few_shot_at_most(shots, seed)?
        } else {
            data.few_shot(shots, seed)?
        };
        let name = format!("{shots}shot-seed{seed}");
        let head = args.head.head.as_deref();
        let head = head.map(|head| head_of(head, &name)).transpose()?;
        let folds = match args.select {
            Select::CrossValidation => folds(args, &list, seed)?,
            Select::Fixed | Select::Ensemble => Vec::new(),
        };
        Ok(Draw { shots, seed, list, folds, out: out.join(name), head })
    }
}

/// Returns the folds of a list: the number of the flag, else as many as the smallest class has
/// images, from 2 to 5.
fn folds(args: &FewShotArgs, list: &FileList, seed: i64) -> Result<Vec<Fold>> {
    let smallest = list.class_counts().into_iter().filter(|count| *count > 0).min();
    let count = match args.folds {
        Some(folds) => folds.get(),
        None => smallest.unwrap_or(0).clamp(2, FOLDS),
    };
    let folds = list.folds(count, seed);
    folds.with_context(|| format!("--select cross-validation with {count} folds"))
}

/// Returns the adapter whose head the run called `name` starts from.
fn head_of(head: &Path, name: &str) -> Result<PathBuf> {
    let file = "adapter.safetensors";
    let places = [head.to_path_buf(), head.join(file), head.join(name).join(file)];
    let found = places.into_iter().find(|place| place.is_file());
    found.with_context(|| {
        format!(
            "--head {}: neither a file nor a folder with {file} or {name}/{file}",
            head.display()
        )
    })
}
