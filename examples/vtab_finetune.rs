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
//!
//! `--all` runs tasks x methods x seeds, by default the 19 of VTAB-1k with the published s and init, `--plan` what a
//! TOML file says (`vtab_finetune/bundled.toml` is one). What is done already is skipped, so that the same command
//! goes on after a stop. The table is printed and written to `results.csv` and `results.json`:
//!
//! ```text
//! cargo run --release --example vtab_finetune -- --all --data DIR --backbone FILE --methods convpass,lora --seeds 0,1,2
//! cargo run --release --example vtab_finetune -- --plan examples/vtab_finetune/bundled.toml
//! ```

#[path = "vtab_finetune/all.rs"]
mod all;
#[path = "shared/backbone.rs"]
mod backbone;
#[path = "vtab_finetune/demo.rs"]
mod demo;
#[path = "vtab_finetune/flags.rs"]
mod flags;
#[path = "shared/precision.rs"]
mod precision;
#[path = "vtab_finetune/results.rs"]
mod results;
#[path = "vtab_finetune/side_by_side.rs"]
mod side_by_side;

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use convpass::vtab::{VtabFolder, VtabSplit};
use convpass::{
    Backbone, BestOnTest, ConvBypassConfig, ConvInit, CosineSchedule, EpochReport, Fit,
    ImageDataset, Method, Normalization, Observer, PetlConfig, PetlModel, Placement, PrefixCache,
    Progress, RunRecord, Selection, StepReport, Stepped, SubLayers, TensorFile, TrainConfig,
    evaluate, fit, peak_rss_mb, published_choice,
};
use convpass::{JsonLog, RunCheckpoint, RunStart, TensorBoard, fit_resumable};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use backbone::{Opened, Processor, Source, Visit};
use precision::Precision;

/// Finetunes a frozen ViT on a task in the VTAB-1k layout; without --task, compares methods on bundled tasks, with
/// settings of their own where no flag says otherwise.
#[derive(Parser)]
#[command(version, args_override_self = true)]
struct Args {
    /// Folder that holds the tasks' folders; the bundled tasks are written here too [default: data].
    #[arg(long)]
    data: Option<PathBuf>,
    /// Name of the task's folder.
    #[arg(long, requires = "backbone")]
    task: Option<String>,
    /// Checkpoint of a ViT, CLIP tower, DINOv2, Swin or ConvNeXt; the README lists the formats.
    #[arg(long)]
    backbone: Option<PathBuf>,
    /// What the frozen backbone computes in; what is trained is f32 all the same.
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    precision: Precision,
    /// Attention heads, where the checkpoint's width does not tell them.
    #[arg(long)]
    heads: Option<i64>,
    /// Image height and width; the position table is resized to it.
    #[arg(long)]
    image_size: Option<i64>,
    /// A method's name, for its defaults, or its config as JSON: {"name": "lora", "rank": 4}
    /// [default: conv_bypass].
    #[arg(long, value_parser = parse_method, requires = "task")]
    method: Option<MethodArg>,
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
    /// last: train on all 1,000, keep the last epoch; val: train on 800, keep the best epoch on the 200; trial: train
    /// on 800, keep the last epoch, report it on the 200 and leave the test images alone.
    #[arg(long, value_enum, default_value_t = Select::Last)]
    select: Select,
    /// Look at the test images each N epochs and record the best of them beside, as best-on-test. The adapter is the
    /// last epoch's all the same.
    #[arg(long, value_name = "N")]
    also_best_on_test: Option<NonZeroUsize>,
    /// Where adapter.safetensors, run.json and log.jsonl go [default: runs/TASK-METHOD; of --all runs/all, of --plan runs/PLAN].
    #[arg(long)]
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
    #[command(flatten)]
    all: flags::AllArgs,
    /// The configs of a run of a plan, as JSON: they stand for all flags above that say the same.
    #[arg(long, hide = true, value_parser = parse_spec)]
    spec: Option<Spec>,
}

impl Args {
    fn data(&self) -> &Path {
        self.data.as_deref().unwrap_or(Path::new("data"))
    }

    fn source<'a>(&self, file: &'a Path) -> Source<'a> {
        Source {
            file,
            heads: self.heads,
            image_size: self.image_size,
            processor: self.device,
            precision: self.precision,
        }
    }
}

/// What a run is of, in the words of its record.
#[derive(Clone, Serialize, Deserialize)]
struct Spec {
    model: PetlConfig,
    train: TrainConfig,
}

fn parse_spec(text: &str) -> Result<Spec, String> {
    serde_json::from_str(text).map_err(|e| e.to_string())
}

/// A method, and whether a config was given or the name alone.
#[derive(Clone)]
struct MethodArg {
    method: Method,
    by_name: bool,
}

/// A method from its name or from JSON.
fn parse_method(text: &str) -> Result<MethodArg, String> {
    let by_name = !text.starts_with('{');
    let method = match by_name {
        false => serde_json::from_str(text),
        true => {
            let name = match text {
                "linear" => "linear_probe".to_owned(),
                "bitfit" => "bit_fit".to_owned(),
                "adaptformer" => "adapt_former".to_owned(),
                "convpass" => "conv_bypass".to_owned(),
                name => name.replace('-', "_"),
            };
            serde_json::from_value(serde_json::json!({ "name": name }))
        }
    };
    method.map(|method| MethodArg { method, by_name }).map_err(|e| e.to_string())
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
    Trial,
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
    let (flag, pressed) = (stop.clone(), AtomicBool::new(false));
    ctrlc::set_handler(move || {
        if pressed.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        flag.store(true, Ordering::SeqCst);
        eprintln!(
            "\nending after this step, from which the same command goes on; Ctrl-C again to quit at once"
        );
    })?;
    if args.spec.is_some() {
        // Whoever runs the plan holds the other end, and lets go of it to end this run, or by ending itself.
        let flag = stop.clone();
        std::thread::spawn(move || {
            let _ended = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            flag.store(true, Ordering::SeqCst);
        });
    }
    let plan = args.all.plan(args)?;
    match (&args.task, plan) {
        (_, Some(plan)) => all::run(args, plan, stop),
        (Some(task), None) => run_task(args, task, stop),
        (None, None) if args.out.is_some() || args.also_best_on_test.is_some() => {
            bail!("--out and --also-best-on-test go with --task, --all or --plan")
        }
        (None, None) => demo::run(args, stop),
    }
}

/// One task of the user's.
fn run_task(args: &Args, name: &str, stop: &Arc<AtomicBool>) -> Result<()> {
    let file = args.backbone.as_deref().context("--backbone")?;
    let folder = VtabFolder::open(args.data(), name)?;
    let method = method(args, name);
    let default = PathBuf::from("runs").join(format!("{name}-{}", method.name()));
    let out = args.out.as_deref().unwrap_or(&default);
    let job = Job { args, file, folder: &folder, method, out, stop };
    let guard = args.precision.guard(args.device.device()?)?;
    let record = args.source(file).open(&job)?;
    drop(guard);
    if let Some(top1) = record.test_top1 {
        let weights = match args.select {
            Select::Val => "best epoch on the 200",
            _ => "last epoch",
        };
        println!("{name}: top-1 {top1:.2} % on the test images ({weights})");
    }
    if let Some(best) = record.best_on_test {
        println!("{name}: best-on-test {:.2} % (epoch {})", best.top1, best.epoch + 1);
    }
    println!("{}", out.display());
    Ok(())
}

/// The method asked for; the flags of the bypass apply to Convpass by name.
fn method(args: &Args, task: &str) -> Method {
    match &args.method {
        Some(arg) if !(arg.by_name && matches!(arg.method, Method::ConvBypass(_))) => {
            arg.method.clone()
        }
        _ => Method::ConvBypass(bypass_config(args, task)),
    }
}

/// The flags, and for a VTAB-1k task the published s and init where no flag says otherwise.
fn bypass_config(args: &Args, task: &str) -> ConvBypassConfig {
    let sub_layers = match args.sub_layers {
        Where::Both => SubLayers::Both,
        Where::Attention => SubLayers::Attention,
        Where::Mlp => SubLayers::Mlp,
    };
    let (scale, init) = published_choice(task, sub_layers).unwrap_or((1.0, ConvInit::Identity));
    ConvBypassConfig {
        bottleneck_dim: args.bottleneck_dim,
        kernel_size: args.kernel_size,
        scale: args.scale.unwrap_or(scale),
        dropout: args.dropout,
        conv_init: match args.init {
            Some(Init::Identity) => ConvInit::Identity,
            Some(Init::XavierUniform) => ConvInit::XavierUniform,
            None => init,
        },
        sub_layers,
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
    method: Method,
    out: &'a Path,
    stop: &'a Arc<AtomicBool>,
}

impl Visit for &Job<'_> {
    type Output = RunRecord;

    fn visit<B: Backbone>(self, opened: Opened<B>) -> Result<RunRecord> {
        self.run(opened)
    }
}

impl Job<'_> {
    fn run<B: Backbone>(
        &self,
        Opened { backbone, image_size, normalization }: Opened<B>,
    ) -> Result<RunRecord> {
        let (args, out) = (self.args, self.out);
        let Spec { model: model_config, train: train_config } = self.spec(normalization)?;
        let label = format!("{} {}", self.folder.name(), model_config.method.name());
        let mut model = PetlModel::new(backbone, &model_config)?;
        let head_digest = match &args.head {
            Some(file) => {
                start_head(&model, file)?;
                Some(file_digest(file)?)
            }
            None => None,
        };
        println!(
            "{label}: {}, normalization {}",
            model.trainable_params(),
            train_config.normalization
        );
        std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;

        let load = |split| ImageDataset::load(self.folder.split(split), image_size);
        let best_on_test = args.also_best_on_test.is_some();
        let (train, watched) = match args.select {
            Select::Last if best_on_test => {
                (load(VtabSplit::Train800Val200)?, Some(load(VtabSplit::Test)?))
            }
            Select::Last => (load(VtabSplit::Train800Val200)?, None),
            Select::Val | Select::Trial => {
                (load(VtabSplit::Train800)?, Some(load(VtabSplit::Val200)?))
            }
        };
        let progress = Progress::new(&label);
        let mut watch = Watch { progress, watches_test: best_on_test, stop: self.stop.clone() };
        let mut fit =
            self.fit(&mut model, &train, watched.as_ref(), &train_config, out, &mut watch)?;
        model.save_adapter(out.join("adapter.safetensors"))?;
        let best_on_test = best_on_test.then(|| split_off(&mut fit, &train_config)).flatten();

        let (val, test) = match args.select {
            Select::Last => (None, watched),
            Select::Val | Select::Trial => (watched, None),
        };
        let test = match test {
            _ if fit.stopped || args.select == Select::Trial => None,
            None => Some(load(VtabSplit::Test)?),
            test => test,
        };
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
            backbone: match args.precision {
                Precision::F32 => self.file.display().to_string(),
                precision => format!("{} in {precision}", self.file.display()),
            },
            backbone_digest: model.backbone().digest()?,
            image_size: Some(image_size),
            train_split: hash(&train),
            val_split: val.as_ref().map(hash),
            test_split: test.as_ref().map(hash),
            head_digest,
            trainable_params: model.trainable_params(),
            fit,
            test_top1,
            best_on_test,
            test_seconds: test_top1.map(|_| start.elapsed().as_secs_f64()),
            peak_rss_mb: peak_rss_mb(),
        };
        record.save(out.join("run.json"))?;
        let state = out.join(STATE);
        let is_trial = args.select == Select::Trial && !record.fit.stopped;
        if (record.test_top1.is_some() || is_trial) && args.checkpoint_every > 0 && state.exists() {
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

    /// The configs of the run: a plan's, or the flags'.
    fn spec(&self, by_family: Normalization) -> Result<Spec> {
        if self.args.also_best_on_test.is_some() && self.args.select != Select::Last {
            bail!("--also-best-on-test goes with --select last");
        }
        if let Some(spec) = &self.args.spec {
            return Ok(spec.clone());
        }
        let mut model = PetlConfig::new(self.method.clone(), self.folder.num_classes());
        model.seed = self.args.seed;
        model.drop_path = self.args.drop_path.unwrap_or(model.drop_path);
        Ok(Spec { model, train: self.train_config(by_family) })
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

/// SHA-256 of a file in hex.
fn file_digest(file: &Path) -> Result<String> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    Ok(format!("{:x}", Sha256::digest(bytes)))
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
    /// What the run evaluates on its way are the test images.
    watches_test: bool,
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
        let label = if self.watches_test { "test" } else { label };
        let _shown = self.progress.pass(label, done, images);
        self.go_on()
    }

    fn epoch(&mut self, epoch: &EpochReport) {
        // The line of an epoch says `val`.
        let val_top1 = epoch.val_top1.filter(|_| !self.watches_test);
        self.progress.epoch(&EpochReport { val_top1, ..*epoch });
    }
}
