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

use std::ffi::OsString;
use std::path::{Path, PathBuf};
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
    CosineSchedule, Observer, Progress, RunCheckpoint, RunRecord, Silent, Stepped, TrainConfig,
    fit_resumable,
};
use convpass::{AnyBackbone, Method, PetlConfig, PetlModel, Preprocessing};
use tch::Device;

/// Finetunes a frozen backbone on a task; without --task, runs the demo, whose settings every flag overrides.
#[derive(Parser)]
#[command(args_override_self = true)]
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
    let (Some(task), Some(backbone)) = (&args.task, &args.backbone) else {
        return demo(&args);
    };
    let out = args.out.clone().unwrap_or_else(|| Path::new("runs").join(task));
    let record = finetune(&args, task, backbone, &out, &mut Progress::new(task))?;
    let top1 = record.test_top1.unwrap_or(f64::NAN);
    println!("{task}: top-1 {top1:.2} % on the test images; {}", out.display());
    Ok(())
}

/// Trains one task on its 1,000 images, keeps the last epoch and evaluates it on the test images.
fn finetune(
    args: &Args,
    task: &str,
    file: &Path,
    out: &Path,
    observer: &mut dyn Observer,
) -> Result<RunRecord> {
    let folder = VtabFolder::open(&args.data, task)?;
    let backbone = AnyBackbone::open(file, Device::Cpu)?;
    let preprocessing = backbone.preprocessing().clone();
    let image_size = preprocessing.image_size;
    let normalization = args.normalization.or_else(|| Normalization::of(&preprocessing));
    let normalization = normalization.context("--normalization is needed for this backbone")?;
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
    let fit = fit_resumable(&mut model, &train, None, &config, &state, observer)?;

    let started = Instant::now();
    let mut watch = |done, images| observer.pass("test", done, images);
    let tested = evaluate(&model, &test, config.normalization, config.batch_size, &mut watch)?;
    model.save_adapter(out.join("adapter.safetensors"))?;
    let record = RunRecord {
        test_split: Some(test.split_hash().to_owned()),
        test_top1: Some(tested.top1()),
        test_seconds: Some(started.elapsed().as_secs_f64()),
        ..RunRecord::new(task, file.display().to_string(), &model, &config, &train, fit)?
    };
    record.save(out.join("run.json"))?;
    // Everything is saved, so that there is nothing left to resume.
    std::fs::remove_file(&state.path).with_context(|| state.path.display().to_string())?;
    Ok(record)
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
    ("Linear probe", "--method linear --lr 1e-2"),
    ("LoRA", r#"--method {"name":"lora","rank":11,"alpha":11} --lr 8e-3"#),
    ("Convpass", r#"--method {"name":"conv_bypass","dropout":0} --lr 1.6e-2"#),
];

/// Runs each method on each bundled task and prints a table.
fn demo(args: &Args) -> Result<()> {
    let started = Instant::now();
    let root = args.out.as_deref().unwrap_or(Path::new("runs/demo"));
    let backbone = root.join("vit.safetensors");
    bundled::write_backbone(&backbone)?;
    let [first, second] = TASKS.map(BundledTask::name);
    let mut table = format!("{:<14}{first:>12}{second:>12}{:>8}", "top-1 %", "mean");
    table += &format!("{:>12}{:>9}\n", "parameters", "seconds");
    let mut means = Vec::new();
    for (name, flags) in METHODS {
        let flags = format!("vtab_finetune {SHARED} {flags}");
        let flags = flags.split(' ').map(OsString::from).chain(std::env::args_os().skip(1));
        let run = Args::parse_from(flags);
        let (mut top1, mut params, mut seconds) = (Vec::new(), 0, 0.0);
        for task in TASKS {
            bundled::write(&run.data, task, 32, 0)?;
            let out = root.join(format!("{task}-{}", name.to_lowercase().replace(' ', "-")));
            let record = finetune(&run, task.name(), &backbone, &out, &mut Silent)?;
            top1.push(record.test_top1.unwrap_or(f64::NAN));
            params = record.trainable_params.method;
            seconds += record.fit.seconds;
            println!(
                "{name} on {task}: {:.1} %, {:.0} s",
                top1[top1.len() - 1],
                record.fit.seconds
            );
        }
        let mean = (top1[0] + top1[1]) / 2.0;
        table += &format!("{name:<14}{:>12.1}{:>12.1}{mean:>8.1}", top1[0], top1[1]);
        table += &format!("{params:>12}{seconds:>9.0}\n");
        means.push((mean, name));
    }
    means.sort_by(|a, b| b.0.total_cmp(&a.0));
    let ((best, leader), (next, second)) = (means[0], means[1]);
    println!(
        "\n{table}\n{leader} leads {second} by {:.1} points in the mean of the two tasks.",
        best - next
    );
    println!(
        "{:.0} s in all; adapters and records: {}",
        started.elapsed().as_secs_f64(),
        root.display()
    );
    Ok(())
}
