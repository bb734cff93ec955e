//! Finetunes a frozen ViT on a task in the VTAB-1k layout.
//!
//! Without arguments it compares six methods on bundled tasks and the bundled ViT, as a table and as the chart
//! `runs/demo/chart.svg`; with `--data`, `--task` and `--backbone` it runs one task of yours:
//!
//! ```text
//! cargo run --release --example vtab_finetune
//! cargo run --release --example vtab_finetune -- --data DIR --task NAME --backbone FILE --epochs 100 --out runs/NAME
//! ```
//!
//! `DIR/NAME` holds `train800.txt`, `val200.txt`, `train800val200.txt` and `test.txt`, each line `path label`.
//! `--out` gets `adapter.safetensors`, `run.json` and `log.jsonl`. Ctrl-C ends after the current step, with the
//! adapter saved. Until the run is done its state is there too, and the same command goes on from it, after a kill as
//! after Ctrl-C; the result is the same bit for bit.

#[path = "vtab_finetune/demo.rs"]
mod demo;

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use convpass::vtab::{self, PublishedInit, VtabFolder, VtabSplit};
use convpass::{
    Backbone, ConvBypassConfig, ConvInit, Error, FrozenConvNeXt, FrozenSwin, FrozenViT, Method,
    PetlConfig, PetlModel, Placement, SubLayers, SwinConfig, TensorFile, ViTConfig, evaluate,
};
use convpass::{
    CosineSchedule, EpochReport, Fit, JsonLog, Observer, Progress, RunCheckpoint, RunRecord,
    RunStart, Selection, StepReport, Stepped, TensorBoard, TrainConfig, fit, fit_resumable,
    peak_rss_mb,
};
use convpass::{ImageDataset, Normalization, PrefixCache};
use tch::{Cuda, Device};

/// Finetunes a frozen ViT on a task in the VTAB-1k layout; without --task, compares methods on bundled tasks, with
/// settings of their own where no flag says otherwise.
#[derive(Parser)]
#[command(version, args_override_self = true)]
struct Args {
    /// Folder that holds the task's folder; the bundled tasks are written here too.
    #[arg(long, default_value = "data")]
    data: PathBuf,
    /// Name of the task's folder.
    #[arg(long, requires = "backbone")]
    task: Option<String>,
    /// Checkpoint of a ViT, CLIP tower, DINOv2, Swin or ConvNeXt; the README lists the formats.
    #[arg(long)]
    backbone: Option<PathBuf>,
    /// Attention heads, where the checkpoint's width does not tell them.
    #[arg(long)]
    heads: Option<i64>,
    /// Image height and width; the position table is resized to it.
    #[arg(long)]
    image_size: Option<i64>,
    /// A method's name, for its defaults, or its config as JSON: {"name": "lora", "rank": 4}
    /// [default: conv_bypass].
    #[arg(long, value_parser = parse_method, requires = "task")]
    method: Option<Method>,
    /// h, the bottleneck of the bypass.
    #[arg(long = "bottleneck-dim", visible_alias = "h", default_value_t = 8)]
    bottleneck_dim: i64,
    /// s, the factor on the bypass [default: the task's published one, else 1].
    #[arg(long)]
    scale: Option<f64>,
    /// How the 3x3 convolution starts [default: the task's published one, else identity].
    #[arg(long, value_enum)]
    init: Option<Init>,
    #[arg(long, value_enum, default_value_t = Where::Both)]
    sub_layers: Where,
    #[arg(long)]
    sequential: bool,
    #[arg(long, default_value_t = 3)]
    kernel_size: i64,
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,
    /// Drop path rate at the last block [default: 0.1, for a linear probe 0].
    #[arg(long)]
    drop_path: Option<f64>,
    #[arg(long, default_value_t = 100)]
    epochs: usize,
    /// Epochs of warm-up [default: a tenth of the epochs, at least 1].
    #[arg(long)]
    warmup_epochs: Option<usize>,
    /// When the learning rate changes.
    #[arg(long, value_enum, default_value_t = Stepping::Epoch)]
    schedule: Stepping,
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    #[arg(long, default_value_t = 1e-4)]
    weight_decay: f64,
    /// imagenet, half, unit or clip [default: clip for a CLIP tower, else imagenet].
    #[arg(long)]
    normalization: Option<Normalization>,
    #[arg(long, default_value_t = 42)]
    seed: i64,
    /// Keep what the blocks in front of the first bypass make of each image: in `memory`, or in a folder.
    #[arg(long, value_name = "memory|DIR")]
    keep_prefix: Option<String>,
    /// Compute each block again in the backward pass: less memory, more time, the same result.
    #[arg(long)]
    recompute: bool,
    /// last: train on all 1,000, keep the last epoch; val: train on 800, keep the best epoch on the 200.
    #[arg(long, value_enum, default_value_t = Select::Last)]
    select: Select,
    /// Where adapter.safetensors, run.json and log.jsonl go [default: runs/TASK-METHOD].
    #[arg(long, requires = "task")]
    out: Option<PathBuf>,
    /// Steps after which the run's state is written to --out, and after each epoch; 0: never. The same command goes
    /// on from it.
    #[arg(long, value_name = "N", default_value_t = 50)]
    checkpoint_every: usize,
    /// Write an event file for TensorBoard to --out too.
    #[arg(long)]
    tensorboard: bool,
    /// Adapter whose head the run starts from, a linear probe's for instance.
    #[arg(long, requires = "task")]
    head: Option<PathBuf>,
    /// cpu or cuda.
    #[arg(long, value_enum, default_value_t = Processor::Cpu)]
    device: Processor,
    /// libtorch's threads; in the demo, runs side by side [default: all cores].
    #[arg(long)]
    threads: Option<NonZeroUsize>,
}

/// A method from its name or from JSON.
fn parse_method(text: &str) -> Result<Method, String> {
    let method = match text.starts_with('{') {
        true => serde_json::from_str(text),
        false => {
            let name = match text {
                "linear" => "linear_probe".to_owned(),
                "convpass" => "conv_bypass".to_owned(),
                name => name.replace('-', "_"),
            };
            serde_json::from_value(serde_json::json!({ "name": name }))
        }
    };
    method.map_err(|e| e.to_string())
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Init {
    Identity,
    #[value(aliases = ["xavier", "xavier-uniform"])]
    XavierUniform,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Where {
    Both,
    Attention,
    Mlp,
}

#[derive(Clone, Copy, ValueEnum)]
enum Stepping {
    /// Once after each epoch, as the published code does.
    Epoch,
    /// At each step.
    Step,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Select {
    Last,
    Val,
}

#[derive(Clone, Copy, ValueEnum)]
enum Processor {
    Cpu,
    Cuda,
}

fn main() -> ExitCode {
    convpass::keep_freed_memory();
    let stop = Arc::new(AtomicBool::new(false));
    match run(&Args::parse(), &stop) {
        // As a shell reports a program that Ctrl-C ended.
        Ok(()) if stop.load(Ordering::SeqCst) => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args, stop: &Arc<AtomicBool>) -> Result<()> {
    if let Some(threads) = args.threads {
        tch::set_num_threads(i32::try_from(threads.get()).context("--threads")?);
    }
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        eprintln!(
            "\nending after this step, from which the same command goes on; Ctrl-C again to quit at once"
        );
    })?;
    match &args.task {
        Some(task) => run_task(args, task, stop),
        None => demo::run(args, stop),
    }
}

/// One task of the user's.
fn run_task(args: &Args, name: &str, stop: &Arc<AtomicBool>) -> Result<()> {
    let file = args.backbone.as_deref().context("--backbone")?;
    let folder = VtabFolder::open(&args.data, name)?;
    let method = method(args, name);
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| PathBuf::from("runs").join(format!("{name}-{}", method.name())));
    let job = Job { args, file, folder: &folder, stop };
    let record = open_and_run(&job, method, &out)?;
    if let Some(top1) = record.test_top1 {
        let weights = match args.select {
            Select::Last => "last epoch",
            Select::Val => "best epoch on the 200",
        };
        println!("{name}: top-1 {top1:.2} % on the test images ({weights})");
    }
    println!("{}", out.display());
    Ok(())
}

/// A backbone, the size of its images, and the normalization that its family was trained with.
struct Opened<B> {
    backbone: B,
    image_size: (i64, i64),
    normalization: Normalization,
}

/// Runs the job beside the backbone in its file, of whatever family that is.
fn open_and_run(job: &Job, method: Method, out: &Path) -> Result<RunRecord> {
    let (args, file, device) = (job.args, job.file, device(job.args)?);
    let side = args.image_size.map(|side| (side, side));
    let mut vit = match ViTConfig::infer(file) {
        Err(Error::OtherBackbone { .. }) => {
            if args.heads.is_some() {
                bail!("{}: --heads is for plain ViTs", file.display());
            }
            let normalization = Normalization::ImageNet;
            if let Ok(mut swin) = SwinConfig::infer(file) {
                swin.image_size = side.unwrap_or(swin.image_size);
                let image_size = swin.image_size;
                let backbone = FrozenSwin::open_with(file, &swin, device)?;
                return job.run(Opened { backbone, image_size, normalization }, method, out);
            }
            // A convolutional network tells no size.
            let (backbone, image_size) =
                (FrozenConvNeXt::open(file, device)?, side.unwrap_or((224, 224)));
            return job.run(Opened { backbone, image_size, normalization }, method, out);
        }
        config => config?,
    };
    vit.num_heads = args.heads.unwrap_or(vit.num_heads);
    vit.image_size = side.unwrap_or(vit.image_size);
    let opened = Opened {
        backbone: FrozenViT::open_with(file, &vit, device)?,
        image_size: vit.image_size,
        normalization: match vit.pre_norm {
            true => Normalization::Clip,
            false => Normalization::ImageNet,
        },
    };
    job.run(opened, method, out)
}

fn device(args: &Args) -> Result<Device> {
    match args.device {
        Processor::Cpu => Ok(Device::Cpu),
        Processor::Cuda if Cuda::is_available() => Ok(Device::Cuda(0)),
        Processor::Cuda => {
            bail!(
                "no CUDA device: {}",
                convpass::cuda_load_error().unwrap_or("libtorch finds none")
            )
        }
    }
}

/// The method asked for; the flags of the bypass apply to Convpass by name.
fn method(args: &Args, task: &str) -> Method {
    match &args.method {
        Some(method) if *method != Method::ConvBypass(ConvBypassConfig::default()) => {
            method.clone()
        }
        _ => Method::ConvBypass(bypass_config(args, task)),
    }
}

/// The flags, and for a VTAB-1k task the published s and init where no flag says otherwise.
fn bypass_config(args: &Args, task: &str) -> ConvBypassConfig {
    let published = vtab::task(task).map(|row| match args.sub_layers {
        Where::Attention => row.convpass_attention,
        Where::Both | Where::Mlp => row.convpass,
    });
    let init = match (args.init, published.map(|choice| choice.conv_init)) {
        (Some(Init::XavierUniform), _) | (None, Some(PublishedInit::XavierUniform)) => {
            ConvInit::XavierUniform
        }
        _ => ConvInit::Identity,
    };
    ConvBypassConfig {
        bottleneck_dim: args.bottleneck_dim,
        kernel_size: args.kernel_size,
        scale: args.scale.or(published.map(|choice| choice.scale)).unwrap_or(1.0),
        dropout: args.dropout,
        conv_init: init,
        sub_layers: match args.sub_layers {
            Where::Both => SubLayers::Both,
            Where::Attention => SubLayers::Attention,
            Where::Mlp => SubLayers::Mlp,
        },
        placement: if args.sequential { Placement::Sequential } else { Placement::Parallel },
    }
}

/// The run's state in `--out`, until it is done.
const STATE: &str = "run.state.safetensors";

/// One run: a method on a task.
struct Job<'a> {
    args: &'a Args,
    file: &'a Path,
    folder: &'a VtabFolder,
    stop: &'a Arc<AtomicBool>,
}

impl Job<'_> {
    fn run<B: Backbone>(
        &self,
        Opened { backbone, image_size, normalization }: Opened<B>,
        method: Method,
        out: &Path,
    ) -> Result<RunRecord> {
        let (args, label) = (self.args, format!("{} {}", self.folder.name(), method.name()));
        let train_config = self.train_config(normalization);
        let mut model_config = PetlConfig::new(method, self.folder.num_classes());
        model_config.seed = args.seed;
        model_config.drop_path = args.drop_path.unwrap_or(model_config.drop_path);
        let mut model = PetlModel::new(backbone, &model_config)?;
        if let Some(file) = &args.head {
            start_head(&model, file)?;
        }
        println!(
            "{label}: {}, normalization {}",
            model.trainable_params(),
            train_config.normalization
        );
        std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;

        let load = |split| ImageDataset::load(self.folder.split(split), image_size);
        let (train, val) = match args.select {
            Select::Last => (load(VtabSplit::Train800Val200)?, None),
            Select::Val => (load(VtabSplit::Train800)?, Some(load(VtabSplit::Val200)?)),
        };
        let mut watch = Watch { progress: Progress::new(&label), stop: self.stop.clone() };
        let fit = self.fit(&mut model, &train, val.as_ref(), &train_config, out, &mut watch)?;
        model.save_adapter(out.join("adapter.safetensors"))?;

        let test = if fit.stopped { None } else { Some(load(VtabSplit::Test)?) };
        let start = Instant::now();
        let test_top1 = match &test {
            Some(test) => self.test(&model, test, &train_config, &mut watch)?,
            None => None,
        };
        let hash = |set: &ImageDataset| set.split_hash().to_owned();
        let record = RunRecord {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            task: self.folder.name().to_owned(),
            model: model_config,
            train: train_config,
            backbone: self.file.display().to_string(),
            backbone_digest: model.backbone().digest()?,
            train_split: hash(&train),
            val_split: val.as_ref().map(hash),
            test_split: test.as_ref().map(hash),
            trainable_params: model.trainable_params(),
            fit,
            test_top1,
            test_seconds: test_top1.map(|_| start.elapsed().as_secs_f64()),
            peak_rss_mb: peak_rss_mb(),
        };
        record.save(out.join("run.json"))?;
        let state = out.join(STATE);
        if record.test_top1.is_some() && args.checkpoint_every > 0 && state.exists() {
            std::fs::remove_file(&state).with_context(|| state.display().to_string())?;
        }
        Ok(record)
    }

    /// Trains, with the logs and the run's state in `out`.
    fn fit<B: Backbone>(
        &self,
        model: &mut PetlModel<B>,
        train: &ImageDataset,
        val: Option<&ImageDataset>,
        config: &TrainConfig,
        out: &Path,
        watch: &mut Watch,
    ) -> Result<Fit> {
        let mut log = JsonLog::open(out.join("log.jsonl"))?;
        let mut events = self.args.tensorboard.then(|| TensorBoard::create(out)).transpose()?;
        let mut observers: Vec<&mut dyn Observer> = vec![watch, &mut log];
        observers.extend(events.as_mut().map(|events| events as &mut dyn Observer));
        let fit = match self.args.checkpoint_every {
            0 => fit(model, train, val, config, &mut observers),
            every => {
                let checkpoint = RunCheckpoint { path: out.join(STATE), every };
                fit_resumable(model, train, val, config, &checkpoint, &mut observers)
            }
        }?;
        for ended in [log.finish(), events.map_or(Ok(()), TensorBoard::finish)] {
            if let Err(error) = ended {
                eprintln!("{error}: the run went on without this log");
            }
        }
        Ok(fit)
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

    fn train_config(&self, by_family: Normalization) -> TrainConfig {
        let args = self.args;
        let epochs = args.epochs;
        TrainConfig {
            epochs,
            batch_size: args.batch_size,
            schedule: CosineSchedule {
                lr: args.lr,
                warmup_epochs: args.warmup_epochs.unwrap_or((epochs / 10).max(1)),
                stepped: match args.schedule {
                    Stepping::Epoch => Stepped::AfterEpoch,
                    Stepping::Step => Stepped::EachStep,
                },
                ..CosineSchedule::default()
            },
            weight_decay: args.weight_decay,
            normalization: args.normalization.unwrap_or(by_family),
            seed: args.seed,
            augment: None,
            recompute: args.recompute,
            prefix: args.keep_prefix.as_ref().map(|place| PrefixCache {
                folder: (place != "memory").then(|| PathBuf::from(place)),
                bf16: false,
            }),
            selection: match args.select {
                Select::Last => Selection::LastEpoch,
                Select::Val => Selection::BestOnValidation,
            },
        }
    }
}

/// Copies the head of the adapter in `file` into `model`.
fn start_head<B: Backbone>(model: &PetlModel<B>, file: &Path) -> Result<()> {
    let adapter = TensorFile::open(file)?;
    let variables = model.var_store().variables();
    for name in ["head.weight", "head.bias"] {
        let value = adapter.tensor(name)?;
        let mut variable = variables.get(name).context(name)?.shallow_clone();
        if value.size() != variable.size() {
            bail!(
                "{}: {name} is {:?}, the task's {:?}",
                file.display(),
                value.size(),
                variable.size()
            );
        }
        tch::no_grad(|| variable.f_copy_(&value))?;
    }
    Ok(())
}

/// The progress bar, and Ctrl-C.
struct Watch {
    progress: Progress,
    stop: Arc<AtomicBool>,
}

impl Watch {
    fn go_on(&self) -> ControlFlow<()> {
        match self.stop.load(Ordering::SeqCst) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

impl Observer for Watch {
    fn start(&mut self, start: &RunStart) {
        self.progress.start(start);
    }

    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        let _shown = self.progress.step(step);
        self.go_on()
    }

    fn pass(&mut self, label: &str, done: usize, images: usize) -> ControlFlow<()> {
        let _shown = self.progress.pass(label, done, images);
        self.go_on()
    }

    fn epoch(&mut self, epoch: &EpochReport) {
        self.progress.epoch(epoch);
    }
}
