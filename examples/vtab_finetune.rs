//! Finetunes a frozen backbone on one task in the layout of VTAB-1k; without arguments, runs the demo.
//!
//! ```text
//! cargo run --release --example vtab_finetune
//! cargo run --release --example vtab_finetune -- --data ROOT --task NAME --backbone FILE --out runs/NAME
//! ```
//!
//! This is the main job of the library in one file: open a backbone, put a method beside it, read images, train,
//! evaluate, save. The default hyper-parameters are the published ones (AdamW, 100 epochs with 10 of warm-up, batches
//! of 64, drop path 0.1), and a task of VTAB-1k gets its published scale and initialization.
//!
//! `ROOT/NAME` holds `train800.txt`, `val200.txt`, `train800val200.txt` and `test.txt`; each line is `path label`.
//! `--out` gets `adapter.safetensors` and `run.json`. After a kill the same command resumes, and the adapter is the
//! same byte for byte.
//!
//! The demo compares a linear probe, LoRA and Convpass on two bundled tasks. `docs/demo.md` says how its settings were
//! chosen.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use convpass::data::bundled::{self, BundledTask};
use convpass::data::vtab::{self, PublishedInit, VtabFolder, VtabSplit};
use convpass::data::{ImageDataset, Normalization, Resize};
use convpass::eval::evaluate;
use convpass::petl::ConvInit;
use convpass::train::{
    CosineSchedule, Observer, Progress, RunCheckpoint, RunRecord, TrainConfig, fit_resumable,
};
use convpass::{FrozenViT, Method, PetlConfig, PetlModel};
use tch::Device;

/// Finetunes a frozen backbone on a task; without --task, runs the demo.
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
    #[arg(long, default_value_t = 100)]
    epochs: usize,
    /// Epochs of warm-up [default: a tenth of the epochs, at least 1].
    #[arg(long)]
    warmup_epochs: Option<usize>,
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Drop path rate of the last block [default: 0.1; for a linear probe 0].
    #[arg(long)]
    drop_path: Option<f64>,
    /// imagenet, half, unit or clip.
    #[arg(long, default_value_t = Normalization::ImageNet)]
    normalization: Normalization,
    #[arg(long, default_value_t = 42)]
    seed: i64,
    /// Threads of libtorch [default: all cores].
    #[arg(long)]
    threads: Option<i32>,
    /// Folder of the results [default: runs/TASK-METHOD; of the demo runs/demo].
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
    match (&args.task, &args.backbone) {
        (Some(task), Some(backbone)) => finetune(&args, task, backbone),
        _ => demo(&args.data, args.out.as_deref().unwrap_or(Path::new("runs/demo"))),
    }
}

/// Trains one task on its 1,000 images, keeps the last epoch and evaluates it on the test images.
fn finetune(args: &Args, task: &str, file: &Path) -> Result<()> {
    let folder = VtabFolder::open(&args.data, task)?;
    let method = method(args, task)?;
    let label = format!("{task} {}", method.name());
    let out = args.out.clone().unwrap_or_else(|| Path::new("runs").join(label.replace(' ', "-")));
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;

    let backbone = FrozenViT::open(file, Device::Cpu)?;
    let image_size = backbone.config().image_size;
    let mut config =
        PetlConfig { seed: args.seed, ..PetlConfig::new(method, folder.num_classes()) };
    config.drop_path = args.drop_path.unwrap_or(config.drop_path);
    let mut model = PetlModel::new(backbone, &config)?;
    println!("{label}: {}", model.trainable_params());

    let train = ImageDataset::load(folder.split(VtabSplit::Train800Val200), image_size)?;
    // Streamed: there may be more test images than fit in memory.
    let test = ImageDataset::stream(folder.split(VtabSplit::Test), Resize::bicubic(image_size)?);
    let warmup_epochs = args.warmup_epochs.unwrap_or((args.epochs / 10).max(1));
    let config = TrainConfig {
        epochs: args.epochs,
        batch_size: args.batch_size,
        schedule: CosineSchedule { warmup_epochs, ..CosineSchedule::with_lr(args.lr) },
        normalization: args.normalization,
        seed: args.seed,
        ..TrainConfig::default()
    };
    let state = RunCheckpoint { path: out.join("run.state.safetensors"), every: 50 };
    let mut progress = Progress::new(&label);
    let fit = fit_resumable(&mut model, &train, None, &config, &state, &mut progress)?;

    let started = Instant::now();
    let mut watch = |done, images| progress.pass("test", done, images);
    let tested = evaluate(&model, &test, config.normalization, config.batch_size, &mut watch)?;
    model.save_adapter(out.join("adapter.safetensors"))?;
    let backbone = file.display().to_string();
    RunRecord {
        test_split: Some(test.split_hash().to_owned()),
        test_top1: Some(tested.top1()),
        test_seconds: Some(started.elapsed().as_secs_f64()),
        ..RunRecord::new(task, backbone, &model, &config, &train, fit)?
    }
    .save(out.join("run.json"))?;
    // Everything is saved, so that there is nothing left to resume.
    std::fs::remove_file(&state.path).with_context(|| state.path.display().to_string())?;
    println!("{label}: top-1 {:.2} % on the test images; {}", tested.top1(), out.display());
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

const TASKS: [BundledTask; 2] = [BundledTask::Orientation, BundledTask::Count];
/// The flags of every run of the demo, and those of each method.
const SHARED: &str = "--normalization half --epochs 15 --batch-size 20 --drop-path 0";
const METHODS: [(&str, &str); 3] = [
    ("Linear probe", "--method linear --lr 1e-2"),
    ("LoRA", r#"--method {"name":"lora","rank":11,"alpha":11} --lr 4e-3"#),
    ("Convpass", "--method convpass --lr 4e-3"),
];

/// Runs each method on each bundled task, each run in a process with a thread of its own, and prints a table.
fn demo(data: &Path, out: &Path) -> Result<()> {
    let started = Instant::now();
    let backbone = out.join("vit.safetensors");
    bundled::write_backbone(&backbone)?;
    for task in TASKS {
        bundled::write(data, task, 32, 0)?;
    }
    let workers = std::thread::available_parallelism()?.get();
    println!("{} runs, {workers} at a time", TASKS.len() * METHODS.len());
    // Workers take jobs from the end: the slowest method first.
    let jobs = (0..METHODS.len()).flat_map(|method| TASKS.map(|task| (method, task)));
    let (jobs, done) = (Mutex::new(jobs.collect::<Vec<_>>()), Mutex::new(Vec::new()));
    let work = || -> Result<()> {
        loop {
            let Some((method, task)) = jobs.lock().expect("no holder panics").pop() else {
                return Ok(());
            };
            let record = run_apart(METHODS[method], task, data, &backbone, out)?;
            done.lock().expect("no holder panics").push((method, task, record));
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })?;
    print_table(&done.into_inner().expect("no holder panics"));
    println!("{:.0} s in all; each run is in {}", started.elapsed().as_secs_f64(), out.display());
    Ok(())
}

/// Calls this program for one run of the demo.
fn run_apart(
    (name, flags): (&str, &str),
    task: BundledTask,
    data: &Path,
    backbone: &Path,
    out: &Path,
) -> Result<RunRecord> {
    let out = out.join(format!("{task}-{}", name.to_lowercase().replace(' ', "-")));
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--task", task.name(), "--threads", "1"]).args(flags.split(' '));
    command.args(SHARED.split(' ')).arg("--data").arg(data).arg("--backbone").arg(backbone);
    let output = command.arg("--out").arg(&out).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{task}, {name}: {}", said.trim());
    let record = RunRecord::load(out.join("run.json"))?;
    println!(
        "{task}, {name}: {:.1} %, {:.0} s",
        record.test_top1.unwrap_or(0.0),
        record.fit.seconds
    );
    Ok(record)
}

/// Top-1 on the test images by method and task, what the method trains, and one sentence on who leads.
fn print_table(done: &[(usize, BundledTask, RunRecord)]) {
    let [first, second] = TASKS.map(BundledTask::name);
    println!(
        "\n{:<14}{first:>13}{second:>13}{:>9}{:>12}{:>10}",
        "top-1 %", "mean", "parameters", "seconds"
    );
    let mut means = [0.0; METHODS.len()];
    for (method, (name, _)) in METHODS.iter().enumerate() {
        let of = |task| done.iter().find(|run| (run.0, run.1) == (method, task)).map(|run| &run.2);
        let records: Vec<_> = TASKS.into_iter().filter_map(of).collect();
        let top1: Vec<f64> = records.iter().filter_map(|record| record.test_top1).collect();
        means[method] = top1.iter().sum::<f64>() / top1.len() as f64;
        let seconds: f64 = records.iter().map(|record| record.fit.seconds).sum();
        let [params, ..] =
            records.iter().map(|r| r.trainable_params.method).collect::<Vec<_>>()[..]
        else {
            return;
        };
        println!(
            "{name:<14}{:>13.1}{:>13.1}{:>9.1}{params:>12}{seconds:>10.0}",
            top1[0], top1[1], means[method]
        );
    }
}
