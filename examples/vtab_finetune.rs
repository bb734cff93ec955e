//! Finetunes a frozen backbone on one task in the layout of VTAB-1k; without arguments, runs the demo.
//!
//! ```text
//! cargo run --release --example vtab_finetune
//! cargo run --release --example vtab_finetune -- --data ROOT --task NAME --backbone FILE --out runs/NAME
//! ```
//!
//! This is the main job of the library in one file: open a backbone, put a method beside it, read images, train,
//! evaluate, save. The default hyper-parameters are the published ones (AdamW, 100 epochs with 10 of warm-up, batches
//! of 64, drop path 0.1), and a task of VTAB-1k gets its published scale and initialization. The full-featured program is
//! `convpass finetune`.
//!
//! `ROOT/NAME` holds `train800.txt`, `val200.txt`, `train800val200.txt` and `test.txt`; each line is `path label`.
//! `--out` gets `adapter.safetensors` and `run.json`. After a kill the same command resumes, and the adapter is the
//! same byte for byte.
//!
//! The demo compares a linear probe, LoRA and Convpass on two bundled tasks. `docs/demo.md` says how its settings were
//! chosen.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use convpass::backbone::ResizeMode;
use convpass::data::bundled::{self, BundledTask};
use convpass::data::vtab::{self, PublishedInit, VtabFolder, VtabSplit};
use convpass::data::{ImageDataset, Normalization, Resize};
use convpass::eval::evaluate;
use convpass::petl::ConvInit;
use convpass::train::{
    CosineSchedule, Observer, Progress, RunCheckpoint, RunRecord, Stepped, TrainConfig,
    fit_resumable,
};
use convpass::{AnyBackbone, Method, PetlConfig, PetlModel, Preprocessing};
use tch::Device;

/// Finetunes a frozen backbone on a task; without --task, runs the demo (of these flags, --data and --out apply).
#[derive(Parser)]
struct Args {
    /// Folder of the tasks' folders.
    #[arg(long, default_value = "data")]
    data: PathBuf,
    /// Name of the task's folder.
    #[arg(long, requires = "backbone")]
    task: Option<String>,
    /// Checkpoint of the backbone.
    #[arg(long, requires = "task")]
    backbone: Option<PathBuf>,
    /// A method's name (convpass, lora, linear, adapter, ..) or its config as JSON: {"name": "lora", "rank": 4}.
    #[arg(long, default_value = "convpass")]
    method: String,
    /// The scale s of Convpass [default: the task's published one, else 1].
    #[arg(long)]
    scale: Option<f64>,
    /// Epochs; a tenth of them, at least one, is warm-up.
    #[arg(long, default_value_t = 100)]
    epochs: usize,
    /// Change the learning rate at each step, not once after each epoch: for short runs.
    #[arg(long)]
    by_step: bool,
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Drop path rate of the last block [default: 0.1; for a linear probe 0].
    #[arg(long)]
    drop_path: Option<f64>,
    /// imagenet, half, unit or clip [default: that of the backbone].
    #[arg(long)]
    normalization: Option<Normalization>,
    #[arg(long, default_value_t = 42)]
    seed: i64,
    /// Threads of libtorch [default: all cores].
    #[arg(long)]
    threads: Option<i32>,
    /// Folder of the results [default: runs/TASK; of the demo runs/demo].
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> Result<()> {
    convpass::keep_freed_memory();
    let args = Args::parse();
    if let Some(threads) = args.threads {
        ensure!(threads > 0, "--threads must be at least 1");
        tch::set_num_threads(threads);
    }
    let (Some(task), Some(backbone)) = (&args.task, &args.backbone) else { return demo(&args) };
    let out = args.out.clone().unwrap_or_else(|| Path::new("runs").join(task));
    finetune(&args, task, backbone, &out)
}

/// Trains one task on its 1,000 images, keeps the last epoch and evaluates it on the test images.
fn finetune(args: &Args, task: &str, file: &Path, out: &Path) -> Result<()> {
    let folder = VtabFolder::open(&args.data, task)?;
    let backbone = AnyBackbone::open(file, Device::Cpu)?;
    let preprocessing = backbone.preprocessing().clone();
    let image_size = preprocessing.image_size;
    let normalization = args.normalization.unwrap_or_else(|| Normalization::of(&preprocessing));
    let mut config = PetlConfig::new(method(args, task)?, folder.num_classes());
    config.seed = args.seed;
    config.drop_path = args.drop_path.unwrap_or(config.drop_path);
    let mut model = PetlModel::new(backbone, &config)?;
    // The adapter says how its images were prepared: squashed to the size, and normalized so.
    let squashed = Preprocessing { resize: ResizeMode::Squash, ..preprocessing };
    model.set_preprocessing(squashed.with_normalization(normalization));

    let train = ImageDataset::load(folder.split(VtabSplit::Train800Val200), image_size)?;
    // Streamed: there may be more test images than fit in memory.
    let test = ImageDataset::stream(folder.split(VtabSplit::Test), Resize::bicubic(image_size)?);
    let warmup_epochs = (args.epochs / 10).max(1);
    let stepped = if args.by_step { Stepped::EachStep } else { Stepped::AfterEpoch };
    let config = TrainConfig {
        epochs: args.epochs,
        batch_size: args.batch_size,
        schedule: CosineSchedule { warmup_epochs, stepped, ..CosineSchedule::with_lr(args.lr) },
        normalization,
        seed: args.seed,
        ..TrainConfig::default()
    };
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let state = RunCheckpoint { path: out.join("run.state.safetensors"), every: 50 };
    let mut progress = Progress::new(task);
    let fit = fit_resumable(&mut model, &train, None, &config, &state, &mut progress)?;

    let started = Instant::now();
    let mut watch = |done, images| progress.pass("test", done, images);
    let tested = evaluate(&model, &test, config.normalization, config.batch_size, &mut watch)?;
    model.save_adapter(out.join("adapter.safetensors"))?;
    RunRecord {
        test_split: Some(test.split_hash().to_owned()),
        test_top1: Some(tested.top1()),
        test: Some(tested.scores()),
        test_seconds: Some(started.elapsed().as_secs_f64()),
        ..RunRecord::new(task, file.display().to_string(), &model, &config, &train, fit)?
    }
    .save(out.join("run.json"))?;
    // Everything is saved, so that there is nothing left to resume.
    std::fs::remove_file(&state.path).with_context(|| state.path.display().to_string())?;
    println!("{task}: top-1 {:.2} % on the test images; {}", tested.top1(), out.display());
    Ok(())
}

/// The method asked for. Convpass, asked for by name, gets the published scale and initialization of the task.
fn method(args: &Args, task: &str) -> Result<Method> {
    let mut method: Method = args.method.parse()?;
    if let Method::ConvBypass(bypass) = &mut method {
        if let (Some(row), false) = (vtab::task(task), args.method.starts_with('{')) {
            bypass.scale = row.convpass.scale;
            bypass.conv_init = match row.convpass.conv_init {
                PublishedInit::Identity => ConvInit::Identity,
                PublishedInit::XavierUniform => ConvInit::XavierUniform,
            };
        }
        bypass.scale = args.scale.unwrap_or(bypass.scale);
    }
    Ok(method)
}

/// The demo's tasks, the flags of all its runs, and those of each method.
const TASKS: [BundledTask; 2] = [BundledTask::Location, BundledTask::Digits];
const SHARED: &str = "--normalization half --epochs 12 --by-step --batch-size 20 --drop-path 0";
const METHODS: [(&str, &str); 3] = [
    ("Linear probe", "--method linear --lr 0.128"),
    ("LoRA", r#"--method {"name":"lora","rank":11,"alpha":11} --lr 0.008"#),
    ("Convpass", r#"--method {"name":"conv_bypass","dropout":0} --lr 0.016"#),
];

/// Runs each method on each bundled task and prints a table. The runs are processes of one thread, side by side: at
/// this size that is faster than one run after the other on all cores.
fn demo(args: &Args) -> Result<()> {
    let started = Instant::now();
    let root = args.out.as_deref().unwrap_or(Path::new("runs/demo"));
    let backbone = root.join("vit.safetensors");
    bundled::write_backbone(&backbone)?;
    for task in TASKS {
        bundled::write(&args.data, task, 32, 0)?;
    }
    let mut runs = Vec::new();
    for (method, flags) in METHODS {
        for task in TASKS {
            let out = root.join(format!("{task}-{}", method.replace(' ', "-")));
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["--task", task.name(), "--threads", "1"]).args(SHARED.split(' '));
            command.args(flags.split(' ')).arg("--data").arg(&args.data);
            command.arg("--backbone").arg(&backbone).arg("--out").arg(&out);
            let run = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
            runs.push((format!("{method} on {task}"), run, out.join("run.json")));
        }
    }
    // All have ended before the first failure is told: none is left behind.
    let mut ended = Vec::new();
    for (name, run, record) in runs {
        let output = run.wait_with_output()?;
        println!("{name}: {}", output.status);
        ended.push((name, output, record));
    }
    let mut records = Vec::new();
    for (name, output, record) in ended {
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{name}: {}", said.trim());
        records.push(RunRecord::load(record)?);
    }
    print_table(&records);
    let seconds = started.elapsed().as_secs_f64();
    println!("{seconds:.0} s in all; adapters and records: {}", root.display());
    Ok(())
}

/// Prints top-1 on the test images, what each method trains beside the head, and in one sentence who leads.
fn print_table(records: &[RunRecord]) {
    let [first, second] = TASKS.map(BundledTask::name);
    println!("\n{:<14}{first:>12}{second:>12}{:>8}{:>12}", "top-1 %", "mean", "parameters");
    let mut means = Vec::new();
    for (records, (method, _)) in records.chunks(TASKS.len()).zip(METHODS) {
        let [first, second] = [0, 1].map(|task| records[task].test_top1.unwrap_or(f64::NAN));
        let (mean, params) = ((first + second) / 2.0, records[0].trainable_params.method);
        println!("{method:<14}{first:>12.1}{second:>12.1}{mean:>8.1}{params:>12}");
        means.push((mean, method));
    }
    means.sort_by(|a, b| b.0.total_cmp(&a.0));
    let [(best, leader), (next, second), ..] = means[..] else { return };
    println!(
        "\n{leader} leads {second} by {:.1} points in the mean of the two tasks.",
        best - next
    );
}
