//! One run: it reads the task's folder, trains, tests, and writes the record.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use convpass::data::vtab::{VtabFolder, VtabSplit};
use convpass::data::{ImageDataset, Normalization, Resize};
use convpass::eval::{PrefixCache, evaluate};
use convpass::train::{
    BestOnTest, Fit, Observer, Progress, RunRecord, Selection, TrainConfig, peak_rss_mb,
};
use convpass::{AnyBackbone, Backbone, Method, PetlConfig, PetlModel};

use super::args::{FinetuneArgs, RunSpec, Select};
use super::watch::Watch;
use crate::failure::chain_of;
use crate::flags::Opened;
use crate::run_folder::{RunFolder, class_names, recorded, start_head};
use crate::stop::Stop;

/// One run: a method on a task.
pub struct FinetuneJob<'a> {
    pub args: &'a FinetuneArgs,
    pub folder: &'a VtabFolder,
    pub method: Method,
    pub out: &'a Path,
    pub stop: &'a Stop,
}

/// The images of a run.
struct RunImages {
    train: ImageDataset,
    /// The images that the model is measured on after epochs: validation or test images.
    watched: Option<ImageDataset>,
    test: ImageDataset,
}

impl FinetuneJob<'_> {
    /// Trains and tests the model, and writes the adapter and the record.
    pub fn run(&self, opened: &Opened) -> Result<RunRecord> {
        let (args, out) = (self.args, self.out);
        let spec = self.spec(opened.normalization(args.input.images.normalization))?;
        let label = format!("{} {}", self.folder.name(), spec.model.method.name());
        let (mut model, head_digest) = self.model(opened, &spec)?;
        let normalization = spec.train.normalization;
        println!("{label}: {}, normalization {normalization}", model.trainable_params());
        std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;

        let images = self.images(opened.image_size())?;
        let watches_test = args.looks.also_best_on_test.is_some();
        let progress = Progress::new(&label);
        let mut watch = Watch { progress, watches_test, stop: self.stop.clone() };
        let kept = RunFolder {
            path: out,
            checkpoint_every: args.logs.checkpoint_every,
            tensorboard: args.logs.tensorboard,
        };
        let (train, watched) = (&images.train, images.watched.as_ref());
        let mut fit = kept.fit(&mut model, train, watched, &spec.train, &mut watch)?;
        model.save_adapter(out.join("adapter.safetensors"))?;
        let best_on_test = watches_test.then(|| split_off(&mut fit, &spec.train)).flatten();

        let is_tested = !fit.stopped && args.select != Select::Trial;
        let start = Instant::now();
        let test_top1 =
            if is_tested { self.test(&model, &images.test, &spec, &mut watch)? } else { None };
        let test_seconds = test_top1.map(|_| start.elapsed().as_secs_f64());
        let record = RunRecord {
            head_digest,
            test_split: is_tested.then(|| images.test.split_hash().to_owned()),
            test_top1,
            best_on_test,
            test_seconds,
            ..self.record(opened, &model, spec, fit, &images)?
        };
        record.save(out.join("run.json"))?;
        let is_trial = args.select == Select::Trial && !record.fit.stopped;
        if (record.test_top1.is_some() || is_trial) && args.logs.checkpoint_every > 0 {
            kept.done()?;
        }
        Ok(record)
    }

    /// Returns the model before training, and the digest of the file that its head was loaded from.
    fn model(
        &self,
        opened: &Opened,
        spec: &RunSpec,
    ) -> Result<(PetlModel<AnyBackbone>, Option<String>)> {
        let mut model = PetlModel::new(opened.backbone.clone(), &spec.model)?;
        model.set_preprocessing(opened.preprocessing(spec.train.normalization, None));
        let file = self.folder.path().join("classes.txt");
        let names = class_names(&file)?;
        if !names.is_empty() {
            // The results do not depend on the names, so wrong names are no error.
            model.set_class_names(names).unwrap_or_else(|error| {
                eprintln!("warning: {}: {}", file.display(), chain_of(error));
            });
        }
        let head = self.args.head.head.as_deref();
        let digest = head.map(|head| start_head(&mut model, head)).transpose()?;
        Ok((model, digest))
    }

    fn images(&self, image_size: (i64, i64)) -> Result<RunImages> {
        let load = |split| ImageDataset::load(self.folder.split(split), image_size);
        let test = self.test_images(image_size)?;
        let watches_test = self.args.looks.also_best_on_test.is_some();
        let (train, watched) = match self.args.select {
            Select::Last => (load(VtabSplit::Train800Val200)?, watches_test.then(|| test.clone())),
            Select::Val | Select::Trial => {
                (load(VtabSplit::Train800)?, Some(load(VtabSplit::Val200)?))
            }
        };
        Ok(RunImages { train, watched, test })
    }

    /// Returns the record of the run without the fields of the test.
    fn record(
        &self,
        opened: &Opened,
        model: &PetlModel<AnyBackbone>,
        spec: RunSpec,
        fit: Fit,
        images: &RunImages,
    ) -> Result<RunRecord> {
        let (args, hash) = (self.args, |set: &ImageDataset| set.split_hash().to_owned());
        Ok(RunRecord {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            task: self.folder.name().to_owned(),
            model: spec.model,
            train: spec.train,
            backbone: args.backbone.checkpoint()?.display().to_string(),
            backbone_digest: model.backbone().digest()?,
            precision: recorded(args.backbone.precision()),
            image_size: Some(opened.image_size()),
            test_shorter_side: None,
            shots: None,
            train_split: hash(&images.train),
            val_split: images.watched.as_ref().filter(|_| args.select != Select::Last).map(hash),
            test_split: None,
            head_digest: None,
            trainable_params: model.trainable_params(),
            fit,
            test_top1: None,
            best_on_test: None,
            test_seconds: None,
            peak_rss_mb: peak_rss_mb(),
        })
    }

    /// Returns the configs of the run: `--spec` if a sweep started the run, else those of the
    /// flags.
    fn spec(&self, normalization: Result<Normalization>) -> Result<RunSpec> {
        if let Some(spec) = &self.args.spec {
            return Ok(spec.clone());
        }
        let mut model = PetlConfig::new(self.method.clone(), self.folder.num_classes());
        model.seed = self.args.seed.seed;
        model.drop_path = self.args.training.drop_path.unwrap_or(model.drop_path);
        Ok(RunSpec { model, train: self.train_config(normalization?) })
    }

    /// Returns the test images. Each is decoded when it is used, because all may not fit in memory.
    fn test_images(&self, image_size: (i64, i64)) -> Result<ImageDataset> {
        let list = self.folder.split(VtabSplit::Test);
        let images = ImageDataset::stream(list, Resize::bicubic(image_size)?);
        Ok(self.args.threads.decoding(images))
    }

    /// Returns top-1 on the test images in percent, or `None` if Ctrl-C ended the test.
    fn test(
        &self,
        model: &PetlModel<AnyBackbone>,
        test: &ImageDataset,
        spec: &RunSpec,
        watch: &mut Watch,
    ) -> Result<Option<f64>> {
        let config = &spec.train;
        let mut pass = |done, images| watch.pass("test", done, images);
        let sums = evaluate(model, test, config.normalization, config.batch_size, &mut pass)?;
        Ok((sums.images == test.len()).then(|| sums.top1()))
    }

    fn train_config(&self, normalization: Normalization) -> TrainConfig {
        let (args, training) = (self.args, &self.args.training);
        let epochs = training.epochs();
        TrainConfig {
            epochs,
            batch_size: args.input.batch_size(),
            schedule: training.cosine(),
            weight_decay: training.weight_decay(),
            normalization,
            seed: args.seed.seed,
            augment: None,
            recompute: args.recompute,
            micro_batch_size: args.micro_batch_size.map(NonZeroUsize::get),
            max_grad_norm: args.max_grad_norm,
            prefix: args.keep_prefix.as_ref().map(|place| PrefixCache {
                folder: (place != "memory").then(|| PathBuf::from(place)),
                bf16: false,
            }),
            selection: match args.select {
                Select::Last | Select::Trial => Selection::LastEpoch,
                Select::Val => Selection::BestOnValidation,
            },
            validate_every: match (args.select, args.looks.also_best_on_test) {
                (Select::Trial, _) => epochs.max(1),
                (Select::Last, Some(every)) => every.get(),
                _ => 1,
            },
        }
    }
}

/// Takes the results on the test images out of the validation fields and returns the best of them.
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
