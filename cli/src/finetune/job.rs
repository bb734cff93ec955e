//! One run, from the task's folder to its record.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use convpass::data::vtab::{VtabFolder, VtabSplit};
use convpass::data::{ImageDataset, Normalization, Resize};
use convpass::eval::{PrefixCache, evaluate};
use convpass::train::{
    BestOnTest, Fit, Observer, Progress, RunRecord, Selection, TrainConfig, peak_rss_mb,
};
use convpass::{Backbone, Method, PetlConfig, PetlModel};

use super::args::{Args, Select, Spec};
use super::watch::Watch;
use crate::flags::{Opened, TrainingFlags};
use crate::run_folder::{RunFolder, recorded, start_head};
use crate::stop::Stop;

/// One run: a method on a task.
pub struct Job<'a> {
    pub args: &'a Args,
    pub folder: &'a VtabFolder,
    pub method: Method,
    pub out: &'a Path,
    pub stop: &'a Stop,
}

impl Job<'_> {
    pub fn run(&self, opened: Opened) -> Result<RunRecord> {
        let normalization = opened.normalization(self.args.training.normalization);
        let image_size = opened.image_size();
        let (args, out) = (self.args, self.out);
        let Spec { model: model_config, train: train_config } = self.spec(normalization)?;
        let label = format!("{} {}", self.folder.name(), model_config.method.name());
        let mut model = PetlModel::new(opened.backbone.clone(), &model_config)?;
        model.set_preprocessing(opened.preprocessing(train_config.normalization, None));
        let head_digest = match &args.head {
            Some(file) => Some(start_head(&mut model, file)?),
            None => None,
        };
        println!(
            "{label}: {}, normalization {}",
            model.trainable_params(),
            train_config.normalization
        );
        std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;

        let load = |split| ImageDataset::load(self.folder.split(split), image_size);
        let test = self.test_images(image_size)?;
        let best_on_test = args.also_best_on_test.is_some();
        let (train, watched) = match args.select {
            Select::Last => (load(VtabSplit::Train800Val200)?, best_on_test.then(|| test.clone())),
            Select::Val | Select::Trial => {
                (load(VtabSplit::Train800)?, Some(load(VtabSplit::Val200)?))
            }
        };
        let progress = Progress::new(&label);
        let mut watch = Watch { progress, watches_test: best_on_test, stop: self.stop.clone() };
        let kept = RunFolder {
            path: out,
            checkpoint_every: args.logs.checkpoint_every,
            tensorboard: args.logs.tensorboard,
        };
        let mut fit = kept.fit(&mut model, &train, watched.as_ref(), &train_config, &mut watch)?;
        model.save_adapter(out.join("adapter.safetensors"))?;
        let best_on_test = best_on_test.then(|| split_off(&mut fit, &train_config)).flatten();

        let is_tested = !fit.stopped && args.select != Select::Trial;
        let start = Instant::now();
        let test_top1 =
            if is_tested { self.test(&model, &test, &train_config, &mut watch)? } else { None };
        let hash = |set: &ImageDataset| set.split_hash().to_owned();
        let record = RunRecord {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            task: self.folder.name().to_owned(),
            model: model_config,
            train: train_config,
            backbone: args.file.backbone.display().to_string(),
            backbone_digest: model.backbone().digest()?,
            precision: recorded(args.backbone.precision()),
            image_size: Some(image_size),
            test_shorter_side: None,
            shots: None,
            train_split: hash(&train),
            val_split: watched.as_ref().filter(|_| args.select != Select::Last).map(hash),
            test_split: is_tested.then(|| hash(&test)),
            head_digest,
            trainable_params: model.trainable_params(),
            fit,
            test_top1,
            best_on_test,
            test_seconds: test_top1.map(|_| start.elapsed().as_secs_f64()),
            peak_rss_mb: peak_rss_mb(),
        };
        record.save(out.join("run.json"))?;
        let is_trial = args.select == Select::Trial && !record.fit.stopped;
        if (record.test_top1.is_some() || is_trial) && args.logs.checkpoint_every > 0 {
            kept.done()?;
        }
        Ok(record)
    }

    /// The configs of the run: a plan's, or the flags'.
    fn spec(&self, normalization: Result<Normalization>) -> Result<Spec> {
        if self.args.also_best_on_test.is_some() && self.args.select != Select::Last {
            bail!("--also-best-on-test goes with --select last");
        }
        if let Some(spec) = &self.args.spec {
            return Ok(spec.clone());
        }
        let mut model = PetlConfig::new(self.method.clone(), self.folder.num_classes());
        model.seed = self.args.seed;
        model.drop_path = self.args.training.drop_path.unwrap_or(model.drop_path);
        Ok(Spec { model, train: self.train_config(normalization?) })
    }

    /// The test images, decoded as they are reached: there may be more than fit in memory.
    fn test_images(&self, image_size: (i64, i64)) -> Result<ImageDataset> {
        let list = self.folder.split(VtabSplit::Test);
        let images = ImageDataset::stream(list, Resize::bicubic(image_size)?);
        Ok(match self.args.threads.threads {
            Some(threads) => images.with_threads(threads),
            None => images,
        })
    }

    /// Top-1 in percent, or `None` after Ctrl-C.
    fn test<B: Backbone>(
        &self,
        model: &PetlModel<B>,
        test: &ImageDataset,
        config: &TrainConfig,
        watch: &mut Watch,
    ) -> Result<Option<f64>> {
        let mut pass = |done, images| watch.pass("test", done, images);
        let sums = evaluate(model, test, config.normalization, config.batch_size, &mut pass)?;
        Ok((sums.images == test.len()).then(|| sums.top1()))
    }

    fn train_config(&self, normalization: Normalization) -> TrainConfig {
        let (args, training) = (self.args, &self.args.training);
        let epochs = training.epochs();
        TrainConfig {
            epochs,
            batch_size: training.batch_size,
            schedule: training.cosine(),
            weight_decay: training.weight_decay.unwrap_or(TrainingFlags::WEIGHT_DECAY),
            normalization,
            seed: args.seed,
            augment: None,
            recompute: args.recompute,
            prefix: args.keep_prefix.as_ref().map(|place| PrefixCache {
                folder: (place != "memory").then(|| PathBuf::from(place)),
                bf16: false,
            }),
            selection: match args.select {
                Select::Last | Select::Trial => Selection::LastEpoch,
                Select::Val => Selection::BestOnValidation,
            },
            validate_every: match (args.select, args.also_best_on_test) {
                (Select::Trial, _) => epochs.max(1),
                (Select::Last, Some(every)) => every.get(),
                _ => 1,
            },
        }
    }
}

/// Takes what a run saw of the test images out of the places for validation.
fn split_off(fit: &mut Fit, config: &TrainConfig) -> Option<BestOnTest> {
    let mut best: Option<BestOnTest> = None;
    for epoch in &mut fit.epochs {
        let Some(top1) = epoch.val_top1.take() else { continue };
        if best.is_none_or(|best| top1 > best.top1) {
            best = Some(BestOnTest { top1, epoch: epoch.epoch, every: config.validate_every });
        }
    }
    best
}
