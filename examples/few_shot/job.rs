//! One run, from the images drawn to its figures.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use convpass::{
    Backbone, BatchConfig, FileList, Fit, ImageDataset, Observer, Order, PartialBatch, PetlConfig,
    PetlModel, Progress, Resize, RunRecord, evaluate, evaluate_logits, peak_rss_mb,
};

use super::args::Args;
use super::backbone::Opened;
use super::head;
use super::measured::Measured;
use super::run_folder::RunFolder;
use super::targets::TargetSet;

/// Steps after which a run's state is written, and at the end of each epoch.
const CHECKPOINT_EVERY: usize = 50;

/// What all runs share.
pub struct Job<'a, B> {
    pub args: &'a Args,
    pub data: &'a FileList,
    pub classes: i64,
    pub test: ImageDataset,
    pub targets: Vec<(&'a TargetSet, ImageDataset)>,
    /// Of test images, before their centre is cut out.
    pub shorter_side: i64,
    pub opened: Opened<B>,
}

/// What came of a run; top-1 in percent.
pub struct Outcome {
    pub shots: usize,
    pub seed: i64,
    /// Training images.
    pub images: usize,
    pub test_top1: f64,
    /// In the order of the targets.
    pub targets: Vec<f64>,
}

impl<B: Backbone> Job<'_, B> {
    /// Runs what is not there yet.
    pub fn run(&self, shots: usize, seed: i64) -> Result<Outcome> {
        let args = self.args;
        let list = match args.at_most {
            true => self.data.few_shot_at_most(shots, seed)?,
            false => self.data.few_shot(shots, seed)?,
        };
        let name = format!("{shots}shot-seed{seed}");
        let out = args.out.join(&name);
        let petl = PetlConfig { seed, ..PetlConfig::new(args.method.clone(), self.classes) };
        let model = PetlModel::new(self.opened.backbone.clone(), &petl)?;
        let head_digest = match &args.head {
            Some(of_runs) if of_runs.is_dir() => {
                Some(head::start(&model, &of_runs.join(&name).join("adapter.safetensors"))?)
            }
            Some(file) => Some(head::start(&model, file)?),
            None => None,
        };
        let mut record = self.record(&model, &list, shots)?;
        record.head_digest = head_digest;
        let folder = RunFolder {
            path: &out,
            checkpoint_every: CHECKPOINT_EVERY,
            tensorboard: args.tensorboard,
        };
        let test_top1 = match finished(&out.join("run.json"), &record)? {
            Some(top1) => {
                println!("{}: top-1 {top1:.2} %, from an earlier run", out.display());
                top1
            }
            None => self.train(model, &list, folder, record)?,
        };
        folder.done()?;
        let targets = self.measure(&out)?;
        Ok(Outcome { shots, seed, images: list.entries().len(), test_top1, targets })
    }

    /// The record of the run as it begins.
    fn record(&self, model: &PetlModel<B>, list: &FileList, shots: usize) -> Result<RunRecord> {
        let (args, petl) = (self.args, model.config());
        let images = list.entries().len();
        Ok(RunRecord {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            task: format!("{}, {shots} a class", args.data_name()),
            model: petl.clone(),
            train: args.train_config(petl.seed, images, self.opened.normalization),
            backbone: args.backbone.display().to_string(),
            backbone_digest: model.backbone().digest()?,
            precision: args.precision.recorded(),
            image_size: Some(self.opened.image_size),
            test_shorter_side: Some(self.shorter_side),
            train_split: list.split_hash(),
            val_split: None,
            test_split: Some(self.test.split_hash().to_owned()),
            head_digest: None,
            trainable_params: model.trainable_params(),
            fit: Fit { epochs: vec![], selected_epoch: None, stopped: true, seconds: 0.0 },
            test_top1: None,
            best_on_test: None,
            test_seconds: None,
            peak_rss_mb: None,
        })
    }

    /// Trains and tests; top-1 in percent.
    fn train(
        &self,
        mut model: PetlModel<B>,
        list: &FileList,
        folder: RunFolder,
        mut record: RunRecord,
    ) -> Result<f64> {
        let out = folder.path;
        std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
        list.save(out.join("train.txt"))?;
        let train = ImageDataset::load_resized(list, Resize::bicubic(self.opened.image_size)?)?;
        let mut progress = Progress::new(&format!("{}, seed {}", record.task, record.train.seed));
        record.fit = folder.fit(&mut model, &train, None, &record.train, &mut progress)?;
        model.save_adapter(out.join("adapter.safetensors"))?;
        let start = Instant::now();
        let watch = &mut |done, images| progress.pass("test", done, images);
        let (normalization, batch_size) = (record.train.normalization, self.args.batch_size);
        let top1 = evaluate(&model, &self.test, normalization, batch_size, watch)?.top1();
        drop(progress);
        record.test_top1 = Some(top1);
        record.test_seconds = Some(start.elapsed().as_secs_f64());
        record.peak_rss_mb = peak_rss_mb();
        record.save(out.join("run.json"))?;
        println!("{}: top-1 {top1:.2} %, {:.0} s", out.display(), record.fit.seconds);
        Ok(top1)
    }

    /// Top-1 in percent on each target, of the adapter in `out`.
    fn measure(&self, out: &Path) -> Result<Vec<f64>> {
        let mut known = Measured::load(out)?;
        if self.targets.iter().all(|(target, _)| known.top1(target).is_some()) {
            return Ok(self.targets.iter().filter_map(|(target, _)| known.top1(target)).collect());
        }
        let adapter = out.join("adapter.safetensors");
        let model = PetlModel::load_adapter(self.opened.backbone.clone(), adapter)?;
        let config = BatchConfig {
            batch_size: self.args.batch_size,
            partial: PartialBatch::Keep,
            order: Order::Sequential,
            normalization: self.args.normalization.unwrap_or(self.opened.normalization),
            device: model.var_store().device(),
        };
        let mut figures = Vec::new();
        for (target, images) in &self.targets {
            if let Some(top1) = known.top1(target) {
                figures.push(top1);
                continue;
            }
            let mut progress = Progress::new(&target.name);
            let watch = &mut |done, images| progress.pass("target", done, images);
            let logits = &mut |images: &_| model.forward(images, false);
            let found = evaluate_logits(logits, images, target.subset.as_ref(), config, watch)?;
            drop(progress);
            let top1 = found.top1();
            known.add(target, found.images, top1)?;
            println!("{}: {} {top1:.2} % of {} images", out.display(), target.name, found.images);
            figures.push(top1);
        }
        Ok(figures)
    }
}

/// Top-1 of the run in `file`, if there is one; an error if it is another run than `expected`.
fn finished(file: &Path, expected: &RunRecord) -> Result<Option<f64>> {
    if !file.exists() {
        return Ok(None);
    }
    let found = RunRecord::load(file)?;
    let key = |run: &RunRecord| {
        let (model, train) = (run.model.clone(), run.train.clone());
        let splits = (run.train_split.clone(), run.test_split.clone(), run.test_shorter_side);
        let start = (run.backbone_digest.clone(), run.precision.clone(), run.head_digest.clone());
        (model, train, start, splits)
    };
    let name = file.display();
    ensure!(key(&found) == key(expected), "{name}: of another run; choose another --out");
    Ok(found.test_top1)
}
