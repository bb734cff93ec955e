//! The training of one model: its settings, its images and its folder.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use convpass::data::{FileList, ImageDataset, Resize};
use convpass::train::{CrossValidation, ImagesRecord, Progress, RunRecord, peak_rss_mb};
use convpass::{AnyBackbone, Method, PetlConfig, PetlModel, Preprocessing};

use super::draw::Draw;
use super::job::FewShotJob;
use super::rates::Rates;
use crate::failure::{chain, is_not_finite};
use crate::memory::PassSize;
use crate::plan::PlannedRun;
use crate::processes::Processes;
use crate::run_folder::{
    Diverged, RunFolder, backbone_name, clear, finished, recorded, start_head,
};

/// The training of one model.
pub struct Training<'a> {
    pub draw: &'a Draw,
    pub rates: Rates,
    pub train: &'a FileList,
    /// The images that the model is measured on after the last epoch.
    pub held_out: Option<&'a FileList>,
    pub is_tested: bool,
    pub cross_validation: Option<CrossValidation>,
    pub out: PathBuf,
}

/// The images that several trainings share. They are decoded when they are first needed.
pub struct SharedImages<'a> {
    train: &'a FileList,
    held_out: Option<&'a FileList>,
    decoded: Option<(ImageDataset, Option<ImageDataset>)>,
}

/// The outcome of a training whose model is not tested.
pub enum Trial {
    Trained(Box<RunRecord>),
    /// Numbers became NaN or infinite, as the text says.
    Diverged(String),
}

impl<'a> SharedImages<'a> {
    pub fn new(train: &'a FileList, held_out: Option<&'a FileList>) -> Self {
        SharedImages { train, held_out, decoded: None }
    }

    fn decoded(
        &mut self,
        job: &FewShotJob,
        planned: &PlannedRun,
    ) -> Result<(ImageDataset, Option<ImageDataset>)> {
        if let Some(decoded) = &self.decoded {
            return Ok(decoded.clone());
        }
        let train = job.training_images(self.train, planned)?;
        let held_out = self.held_out.map(|list| ImageDataset::load_resized(list, job.test_resize));
        let decoded = (train, held_out.transpose()?);
        Ok(self.decoded.insert(decoded).clone())
    }
}

impl FewShotJob<'_> {
    /// Returns the model before the training, and the fields that the record must have.
    pub fn prepared(&self, training: &Training) -> Result<(PetlModel<AnyBackbone>, PlannedRun)> {
        let mut petl = PetlConfig::new(self.method.clone(), self.classes);
        petl.seed = training.draw.seed;
        petl.drop_path = self.args.training.drop_path.unwrap_or(petl.drop_path);
        let mut model = PetlModel::new(self.opened.backbone.clone(), &petl)?;
        let shorter_side = Some(self.shorter_side);
        let orientation = self.args.orientation.orientation();
        let preprocessing = self.opened.preprocessing(self.normalization, shorter_side);
        model.set_preprocessing(Preprocessing { orientation, ..preprocessing });
        model.set_class_names(self.class_names.clone())?;
        let head = training.draw.head.as_deref();
        let head = head.map(|file| start_head(&mut model, file)).transpose()?;
        let planned = self.planned(petl, training, head);
        let pass = PassSize {
            batch: planned.train.batch_size,
            image_size: self.opened.image_size(),
            keeps_blocks: self.method != Method::LinearProbe,
        };
        pass.check(&self.opened.backbone)?;
        Ok((model, planned))
    }

    fn planned(
        &self,
        model: PetlConfig,
        training: &Training,
        head_digest: Option<String>,
    ) -> PlannedRun {
        let (args, draw) = (self.args, training.draw);
        let images = training.train.entries().len();
        let mut train = args.train_config(draw.seed, images, self.normalization, training.rates);
        if training.held_out.is_some() {
            train.validate_every = train.epochs.max(1);
        }
        let test = training.is_tested.then(|| self.test.images.split_hash().to_owned());
        PlannedRun {
            task: format!("{}, {} a class", args.data_name(), draw.shots),
            model,
            train,
            backbone_digest: self.digest.clone(),
            precision: recorded(args.backbone.precision()),
            image_size: self.opened.image_size(),
            test_shorter_side: Some(self.shorter_side),
            train_split: training.train.split_hash(),
            val_split: training.held_out.map(FileList::split_hash),
            test_split: test,
            head_digest,
            cross_validation: training.cross_validation.clone(),
        }
    }

    /// Returns the folder of a training.
    pub fn folder<'f>(&self, out: &'f Path) -> RunFolder<'f> {
        let logs = self.args.logs;
        RunFolder {
            path: out,
            checkpoint_every: logs.checkpoint_every,
            tensorboard: logs.tensorboard,
        }
    }

    /// Decodes the images of a training.
    pub fn training_images(&self, list: &FileList, planned: &PlannedRun) -> Result<ImageDataset> {
        let orientation = self.args.orientation.orientation();
        let resize = Resize::bicubic(self.opened.image_size())?.with_orientation(orientation);
        // A random crop is cut from the image before it is resized.
        match planned.train.augment.as_ref().and_then(|augment| augment.crop.as_ref()) {
            Some(_) => Ok(self.args.threads.decoding(ImageDataset::stream(list, resize))),
            None => Ok(ImageDataset::load_resized(list, resize)?),
        }
    }

    /// Trains the model and writes its adapter. Returns the record without the fields of the test.
    pub fn train(
        &self,
        model: &mut PetlModel<AnyBackbone>,
        training: &Training,
        planned: PlannedRun,
        (train, held_out): (&ImageDataset, Option<&ImageDataset>),
    ) -> Result<RunRecord> {
        let (out, draw) = (training.out.as_path(), training.draw);
        std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
        training.train.save(out.join("train.txt"))?;
        let folder = self.folder(out);
        let mut progress = Progress::new(&format!("{}, seed {}", planned.task, draw.seed));
        let alone = Processes::default();
        let fit = folder.fit(model, train, held_out, &planned.train, &alone, &mut progress)?;
        drop(progress);
        Ok(RunRecord {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            task: planned.task,
            model: planned.model,
            train: planned.train,
            backbone: backbone_name(self.args.backbone.checkpoint()?)?,
            backbone_digest: planned.backbone_digest,
            precision: planned.precision,
            image_size: Some(planned.image_size),
            test_shorter_side: planned.test_shorter_side,
            shots: Some(draw.shots),
            train_split: planned.train_split,
            val_split: planned.val_split,
            test_split: planned.test_split,
            head_digest: planned.head_digest,
            adapter_digest: Some(folder.save_adapter(model)?),
            cross_validation: planned.cross_validation,
            trainable_params: model.trainable_params(),
            fit,
            test_top1: None,
            test: None,
            best_on_test: None,
            test_seconds: None,
            peak_rss_mb: peak_rss_mb(),
            images: ImagesRecord {
                train_pixels: train.pixel_hash().map(str::to_owned),
                ..self.images_record()
            },
        })
    }

    /// Trains a model that is not tested, unless that was done before.
    pub fn trial(&self, training: &Training, images: &mut SharedImages) -> Result<Trial> {
        let (mut model, planned) = self.prepared(training)?;
        if let Some(reason) = Diverged::before(&training.out, &planned)
            .context("use --force to replace the run, or choose another --out")?
        {
            return Ok(Trial::Diverged(reason));
        }
        if let Some(record) = finished(&training.out, &planned, &self.images_record())? {
            return Ok(Trial::Trained(record.into()));
        }
        let (train, held_out) = images.decoded(self, &planned)?;
        let run = planned.clone();
        match self.train(&mut model, training, planned, (&train, held_out.as_ref())) {
            Ok(record) => {
                let folder = self.folder(&training.out);
                folder.save_record(&record)?;
                folder.done()?;
                Ok(Trial::Trained(record.into()))
            }
            Err(error) if is_not_finite(&error) => {
                clear(&training.out)?;
                let reason = chain(&error);
                Diverged { run, reason: reason.clone() }.save(&training.out)?;
                Ok(Trial::Diverged(reason))
            }
            Err(error) => Err(error),
        }
    }

    /// Returns what the record says about the images beside their lists.
    pub fn images_record(&self) -> ImagesRecord {
        ImagesRecord {
            orientation: self.args.orientation.orientation(),
            class_names: self.class_names.clone(),
            preprocessing: None,
            train_pixels: None,
            skipped: self.skipped,
        }
    }
}
