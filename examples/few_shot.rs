//! Few-shot learning: trains on K images of each class for several K and seeds, and reports mean and deviation.
//!
//! ```text
//! cargo run --release --example few_shot -- --data TRAIN --test TEST --backbone FILE --out runs/few-shot
//! ```
//!
//! TRAIN and TEST are folders with a folder for each class, or lists with a line `path label` an image, relative to
//! the list. Training images are resized, then changed by colour jitter and RandAugment; of test images, resized so that
//! the shorter side is 8/7 of the input's, the centre is taken (256 and 224). The weights are the last epoch's.
//!
//! `--out` gets `Kshot-seedS/` with `run.json`, `adapter.safetensors` and the list of the images drawn, and
//! `results.csv`. A run that is there is not run again, and one that was cut off goes on where it was.

#[path = "shared/backbone.rs"]
mod backbone;
#[path = "shared/precision.rs"]
mod precision;
#[path = "shared/state.rs"]
mod state;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use convpass::{
    Augment, Backbone, CosineSchedule, FileList, Fit, ImageDataset, Method, Normalization,
    Observer, PetlConfig, PetlModel, Progress, Resize, RunRecord, Spread, TrainConfig, evaluate,
    fit_resumable, peak_rss_mb,
};

use backbone::{Opened, Processor, Source, Visit};
use precision::Precision;

/// Steps after which a run's state is written, and at the end of each epoch.
const CHECKPOINT_EVERY: usize = 50;

#[derive(Parser)]
#[command(about = "Trains on a few images of each class")]
struct Args {
    /// Training images: a folder with a folder for each class, or a list.
    #[arg(long)]
    data: PathBuf,
    /// Test images, likewise.
    #[arg(long)]
    test: PathBuf,
    /// Checkpoint of a ViT, CLIP tower, DINOv2, Swin or ConvNeXt; the README lists the formats.
    #[arg(long)]
    backbone: PathBuf,
    /// How the frozen backbone is kept and computed with; what is trained is f32 all the same.
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    precision: Precision,
    /// Images of each class.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16")]
    shots: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_value = "0,1,2")]
    seeds: Vec<i64>,
    /// Take what there is of a class with fewer images.
    #[arg(long)]
    at_most: bool,
    /// A method's name, for its defaults, or its config as JSON: {"name": "lora", "rank": 4}.
    #[arg(long, value_parser = parse_method, default_value = "conv_bypass")]
    method: Method,
    #[arg(long, value_enum, default_value_t = Augmentation::FewShot)]
    augment: Augmentation,
    #[arg(long, default_value_t = 100)]
    epochs: usize,
    #[arg(long, default_value_t = 5e-3)]
    lr: f64,
    #[arg(long, default_value_t = 1e-4)]
    weight_decay: f64,
    /// Images a step; all of them where there are fewer.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// imagenet, half, unit or clip [default: clip for a CLIP tower, else imagenet].
    #[arg(long)]
    normalization: Option<Normalization>,
    /// Run on the first CUDA device.
    #[arg(long)]
    cuda: bool,
    #[arg(long)]
    out: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Augmentation {
    FewShot,
    None,
}

/// A method from its name or from JSON.
fn parse_method(text: &str) -> Result<Method, String> {
    let method = match text.starts_with('{') {
        true => serde_json::from_str(text),
        false => serde_json::from_value(serde_json::json!({ "name": text.replace('-', "_") })),
    };
    method.map_err(|e| e.to_string())
}

fn main() -> Result<()> {
    convpass::keep_freed_memory();
    let args = Args::parse();
    let processor = if args.cuda { Processor::Cuda } else { Processor::Cpu };
    let (data, test) = read(&args.data, &args.test)?;
    let _guard = args.precision.guard(processor.device()?)?;
    let (heads, image_size) = (None, None);
    let (file, precision) = (args.backbone.as_path(), args.precision);
    let source = Source { file, heads, image_size, processor, precision };
    source.open(Task { args: &args, data, test })
}

/// What is run on a backbone, of whatever family it is.
struct Task<'a> {
    args: &'a Args,
    data: FileList,
    test: FileList,
}

impl Visit for Task<'_> {
    type Output = ();

    fn visit<B: Backbone>(self, opened: Opened<B>) -> Result<()> {
        let Task { args, data, test } = self;
        let (rows, columns) = opened.image_size;
        let shorter = rows.max(columns) * 8 / 7;
        let test = ImageDataset::stream(&test, Resize::center_crop(shorter, (rows, columns))?);
        let job = Job { args, data, test, opened };
        let mut results = Vec::new();
        for &shots in &args.shots {
            let mut top1 = Vec::new();
            for &seed in &args.seeds {
                let (images, found) = job.run(shots, seed)?;
                results.push((shots, seed, images, found));
                save(&args.out.join("results.csv"), &results)?;
                top1.push(found);
            }
            if let Some(Spread { mean, deviation, seeds }) = Spread::of(&top1) {
                let deviation = deviation.unwrap_or_default();
                println!("{shots} a class: top-1 {mean:.2} % +- {deviation:.2} over {seeds} seeds");
            }
        }
        Ok(())
    }
}

/// Training and test images under the same labels.
fn read(data: &Path, test: &Path) -> Result<(FileList, FileList)> {
    let list = |file: &Path| FileList::read(file.parent().unwrap_or(Path::new("")), file, None);
    let data = if data.is_dir() { FileList::from_folders(data) } else { list(data) }?;
    if !test.is_dir() {
        return Ok((data, list(test)?));
    }
    if data.class_names().is_empty() {
        bail!("{}: --test must be a list where --data is one", test.display());
    }
    let test = FileList::from_folders_of(test, data.class_names())?;
    Ok((data, test))
}

struct Job<'a, B> {
    args: &'a Args,
    data: FileList,
    test: ImageDataset,
    opened: Opened<B>,
}

impl<B: Backbone> Job<'_, B> {
    /// The number of training images, and top-1 in percent.
    fn run(&self, shots: usize, seed: i64) -> Result<(usize, f64)> {
        let args = self.args;
        let list = match args.at_most {
            true => self.data.few_shot_at_most(shots, seed)?,
            false => self.data.few_shot(shots, seed)?,
        };
        let images = list.entries().len();
        let Opened { backbone, image_size: size, .. } = &self.opened;
        let resize = Resize::bicubic(*size)?;
        let classes = list.num_classes().max(self.test.num_classes());
        let petl = PetlConfig { seed, ..PetlConfig::new(args.method.clone(), classes) };
        let mut model = PetlModel::new(backbone.clone(), &petl)?;
        let out = args.out.join(format!("{shots}shot-seed{seed}"));
        let mut record = RunRecord {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            task: args.data.display().to_string(),
            model: petl,
            train: self.train_config(seed, images),
            backbone: args.backbone.display().to_string(),
            backbone_digest: backbone.digest()?,
            precision: args.precision.recorded(),
            image_size: Some(*size),
            train_split: ImageDataset::stream(&list, resize).split_hash().to_owned(),
            val_split: None,
            test_split: Some(self.test.split_hash().to_owned()),
            head_digest: None,
            trainable_params: model.trainable_params(),
            fit: Fit { epochs: vec![], selected_epoch: None, stopped: true, seconds: 0.0 },
            test_top1: None,
            best_on_test: None,
            test_seconds: None,
            peak_rss_mb: None,
        };
        if let Some(top1) = finished(&out.join("run.json"), &record)? {
            state::remove(&out)?;
            println!("{}: top-1 {top1:.2} %, from an earlier run", out.display());
            return Ok((images, top1));
        }
        std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
        list.save(out.join("train.txt"))?;

        let train = ImageDataset::load_resized(&list, resize)?;
        let mut progress = Progress::new(&format!("{shots}-shot, seed {seed}"));
        let checkpoint = state::checkpoint(&out, CHECKPOINT_EVERY);
        record.fit =
            fit_resumable(&mut model, &train, None, &record.train, &checkpoint, &mut progress)?;
        model.save_adapter(out.join("adapter.safetensors"))?;
        let start = std::time::Instant::now();
        let watch = &mut |done, images| progress.pass("test", done, images);
        let normalization = record.train.normalization;
        let top1 = evaluate(&model, &self.test, normalization, args.batch_size, watch)?.top1();
        drop(progress);
        record.test_top1 = Some(top1);
        record.test_seconds = Some(start.elapsed().as_secs_f64());
        record.peak_rss_mb = peak_rss_mb();
        record.save(out.join("run.json"))?;
        state::remove(&out)?;
        println!("{}: top-1 {top1:.2} %, {:.0} s", out.display(), record.fit.seconds);
        Ok((images, top1))
    }

    fn train_config(&self, seed: i64, images: usize) -> TrainConfig {
        let args = self.args;
        TrainConfig {
            epochs: args.epochs,
            batch_size: args.batch_size.min(images),
            schedule: CosineSchedule {
                lr: args.lr,
                warmup_epochs: (args.epochs / 10).max(1),
                ..CosineSchedule::default()
            },
            weight_decay: args.weight_decay,
            normalization: args.normalization.unwrap_or(self.opened.normalization),
            seed,
            augment: match args.augment {
                Augmentation::FewShot => Some(Augment::few_shot()),
                Augmentation::None => None,
            },
            ..TrainConfig::default()
        }
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
        let splits = (run.train_split.clone(), run.test_split.clone());
        (model, train, run.backbone_digest.clone(), run.precision.clone(), splits)
    };
    ensure!(
        key(&found) == key(expected),
        "{}: of another run; choose another --out",
        file.display()
    );
    Ok(found.test_top1)
}

fn save(file: &Path, results: &[(usize, i64, usize, f64)]) -> Result<()> {
    let mut table = csv::Writer::from_path(file)?;
    table.write_record(["shots", "seed", "images", "test_top1"])?;
    for row in results {
        table.serialize(row)?;
    }
    Ok(table.flush()?)
}
