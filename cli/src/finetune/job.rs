//! One run: it reads the task's folder, trains, tests, and writes the record.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use convpass::backbone::{Resampling, ResizeMode};
use convpass::data::{FileList, ImageDataset, Normalization, Resize};
use convpass::eval::{Evaluation, PrefixCache};
use convpass::train::{
    BestOnTest, Fit, ImagesRecord, Observer, Progress, RunRecord, Selection, TrainConfig,
    peak_rss_mb,
};
use convpass::{AnyBackbone, Backbone, Method, PetlConfig, PetlModel, Preprocessing};

use super::args::{FinetuneArgs, RunSpec, Select};
use super::images::RunLists;
use super::watch::Watch;
use crate::failure::{chain_of, finite};
use crate::flags::{Opened, Preparation};
use crate::memory::PassSize;
use crate::plan::PlannedRun;
use crate::processes::Processes;
use crate::run_folder::{RunFolder, backbone_name, clear, finished, recorded, start_head};
use crate::stop::Stop;

/// One run: a method on a task.
pub struct FinetuneJob<'a> {
    pub args: &'a FinetuneArgs,
    pub lists: &'a RunLists,
    pub method: Method,
    pub out: &'a Path,
    pub stop: &'a Stop,
    pub processes: &'a Processes,
}

/// The images of a run.
struct RunImages {
    train: ImageDataset,
    /// The images that the model is measured on after epochs: validation or test images.
    watched: Option<ImageDataset>,
    test: Option<ImageDataset>,
}

impl FinetuneJob<'_> {
    /// Trains and tests the model, and writes the adapter and the record. Returns the record in the
    /// process that writes.
    pub fn run(&self, opened: &Opened) -> Result<Option<RunRecord>> {
        let (args, out, writes) = (self.args, self.out, self.processes.is_first());
        let spec = self.spec(opened.normalization(args.input.images.normalization));
        let preprocessing = self.preprocessing(opened, spec.train.normalization);
        let label = format!("{} {}", self.lists.name, spec.model.method.name());
        let (mut model, head_digest) = self.model(opened, &spec, &preprocessing)?;
        let normalization = spec.train.normalization;
        if args.force.force && writes {
            clear(out)?;
        }
        let images = self.images_record(&preprocessing);
        let planned = self.planned(opened, &model, &spec, head_digest.clone())?;
        let earlier = if writes { finished(out, &planned, &images)? } else { None };
        let earlier = earlier.filter(|record| self.has_looks(record));
        if self.processes.as_first(earlier.is_some())? {
            self.say(&format!("{label}: the run was finished before"));
            return Ok(earlier);
        }
        let batch = spec.train.micro_batch_size.unwrap_or(spec.train.batch_size);
        let pass = PassSize {
            batch: batch.div_ceil(self.processes.count()),
            image_size: opened.image_size(),
            keeps_blocks: !spec.train.recompute && spec.model.method != Method::LinearProbe,
        };
        pass.check(&opened.backbone)?;
        self.say(&format!(
            "{label}: {}, normalization {normalization}\n{label}: images {preprocessing}",
            model.trainable_params()
        ));
        if writes {
            self.lists.write_down(out)?;
        }

        let images = self.images(&preprocessing)?;
        let watches_test = args.looks.also_best_on_test.is_some();
        let progress = writes.then(|| Progress::new(&label));
        let mut watch = Watch { progress, watches_test, stop: self.stop.clone() };
        let kept = RunFolder {
            path: out,
            checkpoint_every: args.logs.checkpoint_every,
            tensorboard: args.logs.tensorboard,
        };
        let (train, watched) = (&images.train, images.watched.as_ref());
        let processes = self.processes;
        let mut fit = kept.fit(&mut model, train, watched, &spec.train, processes, &mut watch)?;
        let adapter_digest = writes.then(|| kept.save_adapter(&model)).transpose()?;
        let best_on_test = watches_test.then(|| split_off(&mut fit, &spec.train)).flatten();

        let test = images.test.as_ref().filter(|_| !fit.stopped && args.select != Select::Trial);
        let start = Instant::now();
        let tested = match test {
            Some(test) => self.test(&model, test, &spec, &mut watch)?,
            None => None,
        };
        if !writes {
            return Ok(None);
        }
        let test_seconds = tested.as_ref().map(|_| start.elapsed().as_secs_f64());
        let record = RunRecord {
            head_digest,
            adapter_digest,
            test_split: test.map(|test| test.split_hash().to_owned()),
            test_top1: tested.as_ref().map(Evaluation::top1),
            test: tested.as_ref().map(Evaluation::scores),
            best_on_test,
            test_seconds,
            ..self.record(opened, &model, spec, fit, &images, &preprocessing)?
        };
        kept.save_record(&record)?;
        let is_done = record.test_top1.is_some() || test.is_none() && !record.fit.stopped;
        if is_done && args.logs.checkpoint_every > 0 {
            kept.done()?;
        }
        Ok(Some(record))
    }

    /// Prints in the process that writes.
    fn say(&self, text: &str) {
        if self.processes.is_first() {
            println!("{text}");
        }
    }

    /// Returns the model before training, and the digest of the file that its head was loaded from.
    fn model(
        &self,
        opened: &Opened,
        spec: &RunSpec,
        preprocessing: &Preprocessing,
    ) -> Result<(PetlModel<AnyBackbone>, Option<String>)> {
        let mut model = PetlModel::new(opened.backbone.clone(), &spec.model)?;
        model.set_preprocessing(preprocessing.clone());
        if !self.lists.class_names.is_empty() {
            // The results do not depend on the names, so names that occur twice are no error.
            model.set_class_names(self.lists.class_names.clone()).unwrap_or_else(|error| {
                eprintln!("warning: the names of the classes: {}", chain_of(error));
            });
        }
        let head = self.args.head.head.as_deref();
        let digest = head.map(|head| start_head(&mut model, head)).transpose()?;
        Ok((model, digest))
    }

    /// Returns the fields that the record of the run must have.
    fn planned(
        &self,
        opened: &Opened,
        model: &PetlModel<AnyBackbone>,
        spec: &RunSpec,
        head_digest: Option<String>,
    ) -> Result<PlannedRun> {
        let (lists, select) = (self.lists, self.args.select);
        let val = lists.val.as_ref().filter(|_| select != Select::Last);
        let test = lists.test.as_ref().filter(|_| select != Select::Trial);
        Ok(PlannedRun {
            task: lists.name.clone(),
            model: spec.model.clone(),
            train: spec.train.clone(),
            backbone_digest: model.backbone().digest()?,
            precision: recorded(self.args.backbone.precision()),
            image_size: opened.image_size(),
            test_shorter_side: None,
            train_split: lists.train.split_hash(),
            val_split: val.map(FileList::split_hash),
            test_split: test.map(FileList::split_hash),
            head_digest,
            cross_validation: None,
        })
    }

    /// Returns whether a record has the tests during the run that the flags ask for.
    fn has_looks(&self, record: &RunRecord) -> bool {
        self.args.looks.also_best_on_test.is_none() || record.best_on_test.is_some()
    }

    /// Returns how images are prepared: by the flags, else as the checkpoint says for own images and
    /// as the published protocol does it for a task.
    fn preprocessing(&self, opened: &Opened, normalization: Normalization) -> Preprocessing {
        let args = self.args;
        let default = match args.images.images {
            Some(_) => Preparation::Checkpoint,
            None => Preparation::Published,
        };
        let orientation = args.orientation.orientation();
        let chosen = args.preparation.apply(opened, default).with_normalization(normalization);
        Preprocessing { orientation, ..chosen }
    }

    /// Returns what the record says about the images beside their lists.
    fn images_record(&self, preprocessing: &Preprocessing) -> ImagesRecord {
        let is_published = preprocessing.resize == ResizeMode::Squash
            && preprocessing.interpolation == Resampling::Bicubic;
        ImagesRecord {
            orientation: preprocessing.orientation,
            class_names: self.lists.class_names.clone(),
            preprocessing: (!is_published).then(|| preprocessing.clone()),
            train_pixels: None,
            skipped: self.lists.skipped,
        }
    }

    fn images(&self, preprocessing: &Preprocessing) -> Result<RunImages> {
        let resize = Resize::of(preprocessing)?;
        let load = |list| ImageDataset::load_resized(list, resize);
        // Each test image is decoded when it is used, because all may not fit in memory.
        let stream = |list| self.args.threads.decoding(ImageDataset::stream(list, resize));
        let test = self.lists.test.as_ref().map(stream);
        let watched = match &self.lists.val {
            Some(val) => Some(load(val)?),
            None => test.clone().filter(|_| self.args.looks.also_best_on_test.is_some()),
        };
        Ok(RunImages { train: load(&self.lists.train)?, watched, test })
    }

    /// Returns the record of the run without the fields of the test.
    fn record(
        &self,
        opened: &Opened,
        model: &PetlModel<AnyBackbone>,
        spec: RunSpec,
        fit: Fit,
        images: &RunImages,
        preprocessing: &Preprocessing,
    ) -> Result<RunRecord> {
        let (args, hash) = (self.args, |set: &ImageDataset| set.split_hash().to_owned());
        Ok(RunRecord {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            task: self.lists.name.clone(),
            model: spec.model,
            train: spec.train,
            backbone: backbone_name(args.backbone.checkpoint()?)?,
            backbone_digest: model.backbone().digest()?,
            precision: recorded(args.backbone.precision()),
            image_size: Some(opened.image_size()),
            test_shorter_side: None,
            shots: None,
            train_split: hash(&images.train),
            val_split: images.watched.as_ref().filter(|_| args.select != Select::Last).map(hash),
            test_split: None,
            head_digest: None,
            adapter_digest: None,
            cross_validation: None,
            trainable_params: model.trainable_params(),
            fit,
            test_top1: None,
            test: None,
            best_on_test: None,
            test_seconds: None,
            peak_rss_mb: peak_rss_mb(),
            images: ImagesRecord {
                train_pixels: images.train.pixel_hash().map(str::to_owned),
                ..self.images_record(preprocessing)
            },
        })
    }

    /// Returns the configs of the run: `--spec` if a sweep started the run, else those of the
    /// flags.
    fn spec(&self, normalization: Normalization) -> RunSpec {
        if let Some(spec) = &self.args.spec {
            return spec.clone();
        }
        let mut model = PetlConfig::new(self.method.clone(), self.lists.num_classes);
        model.seed = self.args.seed.seed;
        model.drop_path = self.args.training.drop_path.unwrap_or(model.drop_path);
        RunSpec { model, train: self.train_config(normalization) }
    }

    /// Returns the result on the test images, or `None` if Ctrl-C ended the test.
    fn test(
        &self,
        model: &PetlModel<AnyBackbone>,
        test: &ImageDataset,
        spec: &RunSpec,
        watch: &mut Watch,
    ) -> Result<Option<Evaluation>> {
        let config = &spec.train;
        let mut pass = |done, images| watch.pass("test", done, images);
        let (normalization, batch) = (config.normalization, config.batch_size);
        let sums = self.processes.evaluate(model, test, normalization, batch, &mut pass)?;
        finite(&sums, "test")?;
        Ok((sums.images == test.len()).then_some(sums))
    }

    fn train_config(&self, normalization: Normalization) -> TrainConfig {
        let (args, training) = (self.args, &self.args.training);
        let epochs = args.epochs();
        TrainConfig {
            epochs,
            batch_size: args.batch_size(self.lists.train.entries().len()),
            schedule: training.cosine(epochs),
            head_lr_factor: training.head_lr_factor(training.lr()),
            weight_decay: training.weight_decay(),
            normalization,
            seed: args.seed.seed,
            augment: None,
            recompute: args.recompute,
            cuda_graph: args.cuda_graph,
            accumulate: args.accumulate.get(),
            micro_batch_size: args.micro_batch_size.map(NonZeroUsize::get),
            max_grad_norm: args.max_grad_norm,
            class_weights: args.class_weights.into(),
            label_smoothing: args.label_smoothing,
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
