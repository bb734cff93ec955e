//! `--select cross-validation`: learning rates that are chosen on the training images alone.

use std::path::Path;

use anyhow::Result;
use convpass::train::{CrossValidation, RunRecord, TriedRates};

use super::draw::Draw;
use super::ensemble;
use super::job::FewShotJob;
use super::rates::Rates;
use super::training::{SharedImages, Training, Trial};
use crate::failure::AllDiverged;
use crate::run_folder::RECORD;

/// The folder of the trials in that of a run.
pub const FOLDER: &str = "trials";

impl FewShotJob<'_> {
    /// Trains each pair of rates of the grid without each of the folds, unless that was done
    /// before, and returns the pair that classifies most held-out images right: the first one of
    /// several.
    ///
    /// # Errors
    /// [`AllDiverged`] if no pair has a result.
    pub fn cross_validated(&self, draw: &Draw) -> Result<(Rates, CrossValidation)> {
        ensemble::refuse(&draw.out)?;
        refuse_given_rates(&draw.out)?;
        let grid = self.args.rates().grid(&self.method);
        let mut correct = vec![Ok(0); grid.len()];
        for (at, fold) in draw.folds.iter().enumerate() {
            let mut images = SharedImages::new(&fold.train, Some(&fold.held_out));
            for (rates, correct) in grid.iter().zip(&mut correct) {
                let Ok(before) = *correct else { continue };
                let training = Training {
                    draw,
                    rates: *rates,
                    train: &fold.train,
                    held_out: Some(&fold.held_out),
                    is_tested: false,
                    cross_validation: None,
                    out: draw.out.join(FOLDER).join(rates.folder()).join(format!("fold-{at}")),
                };
                *correct = match self.trial(&training, &mut images)? {
                    Trial::Trained(record) => {
                        Ok(before + held_out_correct(&record, fold.held_out.entries().len()))
                    }
                    Trial::Diverged(reason) => Err(reason),
                };
            }
        }
        let images = draw.list.entries().len();
        let tried = grid.iter().zip(&correct).map(|(rates, correct)| TriedRates {
            lr: rates.lr,
            head_lr: rates.head_lr,
            correct: correct.as_ref().ok().copied(),
            images,
        });
        let found = CrossValidation { folds: draw.folds.len(), tried: tried.collect() };
        say(draw, &grid, &correct);
        match found.best() {
            Some(&TriedRates { lr, head_lr, .. }) => {
                let rates = Rates { lr, head_lr };
                println!("{}: chosen {rates}", draw.out.display());
                Ok((rates, found))
            }
            None => {
                let reason = correct.into_iter().find_map(Result::err).unwrap_or_default();
                Err(AllDiverged { folder: draw.out.clone(), count: grid.len(), reason }.into())
            }
        }
    }
}

/// Returns an error if the folder of a run holds a finished run whose rates were given, before any
/// trial starts.
fn refuse_given_rates(out: &Path) -> Result<()> {
    let file = out.join(RECORD);
    if !file.exists() {
        return Ok(());
    }
    let record = RunRecord::load(&file)?;
    if record.cross_validation.is_none() && record.test_top1.is_some() {
        return Err(ensemble::holds(out, "with given learning rates"));
    }
    Ok(())
}

/// Returns how many of the held-out images of a trial were classified right.
fn held_out_correct(record: &RunRecord, images: usize) -> usize {
    let top1 = record.fit.epochs.last().and_then(|epoch| epoch.val_top1);
    (top1.unwrap_or(0.0) / 100.0 * images as f64).round() as usize
}

/// Prints the result of each pair of rates.
fn say(draw: &Draw, grid: &[Rates], correct: &[Result<usize, String>]) {
    let (out, images) = (draw.out.display(), draw.list.entries().len());
    for (rates, correct) in grid.iter().zip(correct) {
        match correct {
            Ok(correct) => println!("{out}: {rates}: {correct} of {images} held-out images right"),
            Err(reason) => eprintln!("warning: {out}: {rates} is not chosen: {reason}"),
        }
    }
}
