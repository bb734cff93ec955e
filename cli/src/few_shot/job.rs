//! The runs: each trains on the images that were drawn for it and is measured on all sets.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use convpass::data::{BatchConfig, FileList, Normalization, Order, PartialBatch, Resize};
use convpass::eval::{Evaluation, evaluate_logits};
use convpass::train::{CrossValidation, Observer, Progress, RunRecord};
use convpass::{AnyBackbone, Backbone, Method, PetlModel};
use tch::Tensor;

use super::args::{FewShotArgs, Select};
use super::draw::Draw;
use super::ensemble;
use super::measured::{Measured, MeasuredSet};
use super::rates::Rates;
use super::training::Training;
use super::{Sets, TEST, save, say};
use crate::failure::finite;
use crate::flags::Opened;
use crate::run_folder::{clear, finished};
use crate::targets::TargetSet;

/// The folders in that of a run with the models that are not tested by themselves.
const TRIALS: [&str; 2] = [super::cross_validation::FOLDER, ensemble::FOLDER];

/// Everything that all runs share.
pub struct FewShotJob<'a> {
    pub args: &'a FewShotArgs,
    pub method: Method,
    pub classes: i64,
    pub class_names: Vec<String>,
    /// The number of images that cannot be read and are skipped.
    pub skipped: usize,
    pub test: MeasuredSet,
    pub targets: Vec<MeasuredSet>,
    /// The shorter side of a resized test image in pixels, before its centre is cut out.
    pub shorter_side: i64,
    pub test_resize: Resize,
    pub opened: Opened,
    pub normalization: Normalization,
    /// The digest of the backbone.
    pub digest: String,
}

/// The results of a run; top-1 is in percent.
pub struct DrawResult {
    pub shots: usize,
    pub seed: i64,
    /// The number of training images.
    pub images: usize,
    pub test_top1: f64,
    /// Top-1 on each target, in the order of the targets.
    pub targets: Vec<f64>,
}

impl<'a> FewShotJob<'a> {
    /// Prepares everything that all runs share.
    pub fn new(
        args: &'a FewShotArgs,
        method: Method,
        sets: Sets,
        opened: Opened,
    ) -> Result<FewShotJob<'a>> {
        let (rows, columns) = opened.image_size();
        let shorter_side = args.test_resize(rows.max(columns));
        let resize = Resize::center_crop(shorter_side, (rows, columns)).context("--test-resize")?;
        let resize = resize.with_orientation(args.orientation.orientation());
        let measured = |name: &str, list: &FileList, subset| {
            MeasuredSet::new(name, list, subset, resize, &args.threads)
        };
        let target = |set: TargetSet| measured(&set.name, &set.list, set.subset);
        Ok(FewShotJob {
            args,
            method,
            classes: sets.data.num_classes(),
            class_names: sets.class_names,
            skipped: sets.skipped,
            test: measured(TEST, &sets.test, None)?,
            targets: sets.targets.into_iter().map(target).collect::<Result<_>>()?,
            shorter_side,
            test_resize: resize,
            normalization: opened.normalization(args.input.images.normalization),
            digest: opened.backbone.digest()?,
            opened,
        })
    }

    /// Runs every draw, and writes the table `file` after each.
    pub fn run_all(&self, draws: &[Draw], file: &Path) -> Result<()> {
        let mut outcomes = Vec::new();
        for draws in draws.chunk_by(|a, b| a.shots == b.shots) {
            let first = outcomes.len();
            for draw in draws {
                outcomes.push(self.run(draw)?);
                save(file, &outcomes, &self.targets)?;
            }
            say(&outcomes[first..], &self.targets);
        }
        Ok(())
    }

    /// Runs a draw, unless that was done before, and measures it on the test images and the
    /// targets. The learning rates are chosen before the first of these images is decoded.
    fn run(&self, draw: &Draw) -> Result<DrawResult> {
        if self.args.force.force {
            replace(&draw.out)?;
        }
        match self.args.select {
            Select::Fixed => self.one_model(draw, self.args.rates(), None),
            Select::CrossValidation => {
                let (rates, cross_validation) = self.cross_validated(draw)?;
                self.one_model(draw, rates, Some(cross_validation))
            }
            Select::Ensemble => self.ensemble(draw),
        }
    }

    /// Trains and tests one model, unless that was done before, and measures its adapter on the
    /// targets.
    fn one_model(
        &self,
        draw: &Draw,
        rates: Rates,
        cross_validation: Option<CrossValidation>,
    ) -> Result<DrawResult> {
        let out = draw.out.as_path();
        ensemble::refuse(out)?;
        let training = Training {
            draw,
            rates,
            train: &draw.list,
            held_out: None,
            is_tested: true,
            cross_validation,
            out: out.to_path_buf(),
        };
        let (mut model, planned) = self.prepared(&training)?;
        let is_done = finished(out, &planned, &self.images_record())?.is_some();
        let (model, mut known) = if is_done {
            (None, Measured::load(out)?)
        } else {
            let images = self.training_images(&draw.list, &planned)?;
            let record = self.train(&mut model, &training, planned, (&images, None))?;
            let known = self.tested(&model, record, out)?;
            (Some(model), known)
        };
        self.folder(out).done()?;
        let test_top1 = known_top1(&known, &self.test, out)?;
        let when = if is_done { ", done before" } else { "" };
        println!("{}: top-1 {test_top1:.2} %{when}", out.display());
        let targets = self.targets(out, model, &mut known)?;
        Ok(draw.result(test_top1, targets))
    }

    /// Tests a model and writes its record.
    fn tested(
        &self,
        model: &PetlModel<AnyBackbone>,
        record: RunRecord,
        out: &Path,
    ) -> Result<Measured> {
        let start = Instant::now();
        let mut known = Measured::none(out);
        let tested = self.evaluate(model, &self.test)?;
        known.add(&self.test, tested.top1())?;
        let record = RunRecord {
            test_top1: Some(tested.top1()),
            test: Some(tested.scores()),
            test_seconds: Some(start.elapsed().as_secs_f64()),
            ..record
        };
        self.folder(out).save_record(&record)?;
        Ok(known)
    }

    /// Returns top-1 in percent on each target. If a result is missing and `model` is `None`, the
    /// adapter of the run is loaded.
    fn targets(
        &self,
        out: &Path,
        mut model: Option<PetlModel<AnyBackbone>>,
        known: &mut Measured,
    ) -> Result<Vec<f64>> {
        let mut targets = Vec::new();
        for target in &self.targets {
            let top1 = match known.top1(target) {
                Some(top1) => top1,
                None => {
                    let of_run = match model.take() {
                        Some(of_run) => of_run,
                        None => self.adapted(out)?,
                    };
                    self.measure(model.insert(of_run), target, known)?
                }
            };
            println!("{}: {} {top1:.2} %", out.display(), target.name);
            targets.push(top1);
        }
        Ok(targets)
    }

    /// Loads the model of a run that is done.
    pub fn adapted(&self, out: &Path) -> Result<PetlModel<AnyBackbone>> {
        let adapter = out.join("adapter.safetensors");
        Ok(PetlModel::load_adapter(self.opened.backbone.clone(), adapter)?)
    }

    /// Measures top-1 in percent on a set and adds it to `known`.
    fn measure(
        &self,
        model: &PetlModel<AnyBackbone>,
        set: &MeasuredSet,
        known: &mut Measured,
    ) -> Result<f64> {
        let top1 = self.evaluate(model, set)?.top1();
        known.add(set, top1)?;
        Ok(top1)
    }

    fn evaluate(&self, model: &PetlModel<AnyBackbone>, set: &MeasuredSet) -> Result<Evaluation> {
        let found = self.pass(model, set, &mut |_| Ok(()))?;
        finite(&found, &set.name)?;
        Ok(found)
    }

    /// Runs the model on all images of a set. `see` is called with the logits of each batch `[B,
    /// K]`, where K are the classes of the set.
    pub fn pass(
        &self,
        model: &PetlModel<AnyBackbone>,
        set: &MeasuredSet,
        see: &mut dyn FnMut(&Tensor) -> convpass::Result<()>,
    ) -> Result<Evaluation> {
        let config = BatchConfig {
            batch_size: self.args.input.batch_size(),
            partial: PartialBatch::Keep,
            order: Order::Sequential,
            normalization: self.normalization,
            device: model.var_store().device(),
        };
        let mut progress = Progress::new(&set.name);
        let watch = &mut |done, images| progress.pass(&set.name, done, images);
        let logits = &mut |images: &Tensor| {
            let mut logits = model.forward(images, false)?;
            if let Some(subset) = &set.subset {
                logits = subset.select(&logits)?;
            }
            see(&logits)?;
            Ok(logits)
        };
        Ok(evaluate_logits(logits, &set.images, None, config, watch)?)
    }
}

impl Draw {
    /// Returns the results of the draw.
    pub fn result(&self, test_top1: f64, targets: Vec<f64>) -> DrawResult {
        let images = self.list.entries().len();
        DrawResult { shots: self.shots, seed: self.seed, images, test_top1, targets }
    }
}

/// Returns the result on the test images of a run that was tested.
pub fn known_top1(known: &Measured, test: &MeasuredSet, out: &Path) -> Result<f64> {
    match known.top1(test) {
        Some(top1) => Ok(top1),
        None => {
            bail!("{}: was measured on other test images; choose another --out", out.display())
        }
    }
}

/// Removes what an earlier run left in `out`.
fn replace(out: &Path) -> Result<()> {
    clear(out)?;
    ensemble::clear(out)?;
    for folder in TRIALS.map(|name| out.join(name)).iter().filter(|folder| folder.exists()) {
        std::fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    Ok(())
}
