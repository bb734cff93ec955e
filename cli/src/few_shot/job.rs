//! The runs: each trains on the images that were drawn for it and is measured on all sets.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use convpass::data::{
    BatchConfig, FileList, ImageDataset, Normalization, Order, PartialBatch, Resize,
};
use convpass::eval::{Evaluation, evaluate_logits};
use convpass::train::{ImagesRecord, Observer, Progress, RunRecord, peak_rss_mb};
use convpass::{AnyBackbone, Backbone, Method, PetlConfig, PetlModel, Preprocessing};

use super::args::FewShotArgs;
use super::measured::{Measured, MeasuredSet};
use super::{Sets, TEST, save, say};
use crate::failure::finite;
use crate::flags::Opened;
use crate::memory::PassSize;
use crate::plan::PlannedRun;
use crate::processes::Processes;
use crate::run_folder::{RunFolder, backbone_name, clear, finished, recorded, start_head};
use crate::targets::TargetSet;

/// The training images that were drawn for a run, and the adapter that its head starts from.
pub struct Draw {
    pub shots: usize,
    pub seed: i64,
    pub list: FileList,
    /// The folder of the run.
    out: PathBuf,
    head: Option<PathBuf>,
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
                let list = if args.at_most {
                    data.few_shot_at_most(shots, seed)?
                } else {
                    data.few_shot(shots, seed)?
                };
                let name = format!("{shots}shot-seed{seed}");
                let head = args.head.head.as_deref();
                let head = head.map(|head| head_of(head, &name)).transpose()?;
                draws.push(Draw { shots, seed, list, out: out.join(name), head });
            }
        }
        Ok(draws)
    }
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

    /// Trains and tests a draw, unless that was done before, and measures its adapter on the
    /// targets.
    fn run(&self, draw: &Draw) -> Result<DrawResult> {
        let out = &draw.out;
        let mut petl = PetlConfig::new(self.method.clone(), self.classes);
        petl.seed = draw.seed;
        petl.drop_path = self.args.training.drop_path.unwrap_or(petl.drop_path);
        let mut model = PetlModel::new(self.opened.backbone.clone(), &petl)?;
        let shorter_side = Some(self.shorter_side);
        let orientation = self.args.orientation.orientation();
        let preprocessing = self.opened.preprocessing(self.normalization, shorter_side);
        model.set_preprocessing(Preprocessing { orientation, ..preprocessing });
        model.set_class_names(self.class_names.clone())?;
        let head = draw.head.as_deref().map(|file| start_head(&mut model, file)).transpose()?;
        let planned = self.planned(petl, draw, head)?;
        let pass = PassSize {
            batch: planned.train.batch_size,
            image_size: self.opened.image_size(),
            keeps_blocks: self.method != Method::LinearProbe,
        };
        pass.check(&self.opened.backbone)?;
        let folder = RunFolder {
            path: out,
            checkpoint_every: self.args.logs.checkpoint_every,
            tensorboard: self.args.logs.tensorboard,
        };
        if self.args.force.force {
            clear(out)?;
        }
        let is_done = finished(out, &planned, &self.images_record())?.is_some();
        let (model, mut known) = if is_done {
            (None, Measured::load(out)?)
        } else {
            let (model, known) = self.train(model, draw, folder, planned)?;
            (Some(model), known)
        };
        folder.done()?;
        let Some(test_top1) = known.top1(&self.test) else {
            bail!("{}: was measured on other test images; choose another --out", out.display());
        };
        let when = if is_done { ", done before" } else { "" };
        println!("{}: top-1 {test_top1:.2} %{when}", out.display());
        let targets = self.targets(out, model, &mut known)?;
        let (shots, seed, images) = (draw.shots, draw.seed, draw.list.entries().len());
        Ok(DrawResult { shots, seed, images, test_top1, targets })
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

    /// Returns the fields that the record of the run must have.
    fn planned(
        &self,
        model: PetlConfig,
        draw: &Draw,
        head_digest: Option<String>,
    ) -> Result<PlannedRun> {
        let (args, images) = (self.args, draw.list.entries().len());
        Ok(PlannedRun {
            task: format!("{}, {} a class", args.data_name(), draw.shots),
            model,
            train: args.train_config(draw.seed, images, self.normalization),
            backbone_digest: self.digest.clone(),
            precision: recorded(args.backbone.precision()),
            image_size: self.opened.image_size(),
            test_shorter_side: Some(self.shorter_side),
            train_split: draw.list.split_hash(),
            val_split: None,
            test_split: Some(self.test.images.split_hash().to_owned()),
            head_digest,
        })
    }

    /// Trains and tests a draw, and writes its adapter and its record.
    fn train(
        &self,
        mut model: PetlModel<AnyBackbone>,
        draw: &Draw,
        folder: RunFolder,
        planned: PlannedRun,
    ) -> Result<(PetlModel<AnyBackbone>, Measured)> {
        let out = folder.path;
        std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
        draw.list.save(out.join("train.txt"))?;
        let orientation = self.args.orientation.orientation();
        let resize = Resize::bicubic(self.opened.image_size())?.with_orientation(orientation);
        // A random crop is cut from the image before it is resized.
        let train = match planned.train.augment.as_ref().and_then(|augment| augment.crop.as_ref()) {
            Some(_) => self.args.threads.decoding(ImageDataset::stream(&draw.list, resize)),
            None => ImageDataset::load_resized(&draw.list, resize)?,
        };
        let mut progress = Progress::new(&format!("{}, seed {}", planned.task, draw.seed));
        let alone = Processes::default();
        let fit = folder.fit(&mut model, &train, None, &planned.train, &alone, &mut progress)?;
        drop(progress);
        let adapter_digest = Some(folder.save_adapter(&model)?);
        let start = Instant::now();
        let mut known = Measured::none(out);
        let tested = self.evaluate(&model, &self.test)?;
        known.add(&self.test, tested.top1())?;
        let test_seconds = Some(start.elapsed().as_secs_f64());
        let record = RunRecord {
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
            val_split: None,
            test_split: planned.test_split,
            head_digest: planned.head_digest,
            adapter_digest,
            trainable_params: model.trainable_params(),
            fit,
            test_top1: Some(tested.top1()),
            test: Some(tested.scores()),
            best_on_test: None,
            test_seconds,
            peak_rss_mb: peak_rss_mb(),
            images: ImagesRecord {
                train_pixels: train.pixel_hash().map(str::to_owned),
                ..self.images_record()
            },
        };
        folder.save_record(&record)?;
        Ok((model, known))
    }

    /// Returns what the record says about the images beside their lists.
    fn images_record(&self) -> ImagesRecord {
        ImagesRecord {
            orientation: self.args.orientation.orientation(),
            class_names: self.class_names.clone(),
            preprocessing: None,
            train_pixels: None,
            skipped: self.skipped,
        }
    }

    /// Loads the model of a run that is done.
    fn adapted(&self, out: &Path) -> Result<PetlModel<AnyBackbone>> {
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
        let config = BatchConfig {
            batch_size: self.args.input.batch_size(),
            partial: PartialBatch::Keep,
            order: Order::Sequential,
            normalization: self.normalization,
            device: model.var_store().device(),
        };
        let mut progress = Progress::new(&set.name);
        let watch = &mut |done, images| progress.pass(&set.name, done, images);
        let logits = &mut |images: &_| model.forward(images, false);
        let found = evaluate_logits(logits, &set.images, set.subset.as_ref(), config, watch)?;
        finite(&found, &set.name)?;
        Ok(found)
    }
}
