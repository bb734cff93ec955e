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
#[path = "vtab_finetune/args.rs"]
mod args;
#[path = "shared/backbone.rs"]
mod backbone;
#[path = "vtab_finetune/demo.rs"]
mod demo;
#[path = "shared/failure.rs"]
mod failure;
#[path = "vtab_finetune/flags.rs"]
mod flags;
#[path = "shared/head.rs"]
mod head;
#[path = "vtab_finetune/job.rs"]
mod job;
#[path = "shared/method.rs"]
mod method;
#[path = "shared/precision.rs"]
mod precision;
#[path = "vtab_finetune/results.rs"]
mod results;
#[path = "shared/run_folder.rs"]
mod run_folder;
#[path = "vtab_finetune/side_by_side.rs"]
mod side_by_side;
#[path = "vtab_finetune/watch.rs"]
mod watch;
#[path = "shared/whole_file.rs"]
mod whole_file;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use clap::Parser;
use convpass::vtab::VtabFolder;

use args::{Args, Select, chosen_method};
use job::Job;

fn main() -> ExitCode {
    convpass::keep_freed_memory();
    let stop = Arc::new(AtomicBool::new(false));
    match run(&Args::parse(), &stop) {
        // As a shell reports a program that Ctrl-C ended.
        Ok(()) if stop.load(Ordering::SeqCst) => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
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
    let method = chosen_method(args, name);
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
