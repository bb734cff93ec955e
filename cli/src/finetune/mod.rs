//! `convpass finetune`: one run on one task.

mod args;
mod images;
mod job;
mod watch;

use std::time::Duration;

use anyhow::Result;
use convpass::Method;
use convpass::train::RunRecord;

use args::Select;
pub use args::{FinetuneArgs, RunSpec};
use images::RunLists;
use job::FinetuneJob;

use crate::Outcome;
use crate::failure::{Usage, chain};
use crate::processes::Processes;
use crate::run_folder::FolderLock;
use crate::stop::Stop;

pub fn run(args: &FinetuneArgs) -> Result<Outcome> {
    if args.looks.also_best_on_test.is_some() && args.select != Select::Last {
        return Err(Usage("--also-best-on-test needs --select last".to_owned()).into());
    }
    let method = args.method.chosen(args.task.as_deref().unwrap_or_default())?;
    args.threads.apply()?;
    let processes = processes(args)?;
    let outcome = share(args, method, &processes);
    if let Err(error) = &outcome {
        processes.leave(&chain(error));
    }
    outcome
}

/// Returns the processes that share the run. A sweep runs each of its runs in one process.
fn processes(args: &FinetuneArgs) -> Result<Processes> {
    if args.spec.is_some() {
        return Ok(Processes::default());
    }
    let timeout = Duration::from_secs(args.process_timeout.get().into());
    Processes::connect(|| args.backbone.device.device(), timeout)
}

/// Does the part of this process of the run.
fn share(args: &FinetuneArgs, method: Method, processes: &Processes) -> Result<Outcome> {
    let stop = Stop::on_ctrl_c("ending after this step; the same command continues from there")?;
    if args.spec.is_some() {
        end_with_stdin(stop.clone());
    }
    let lists = RunLists::read(args)?;
    let out = args.folder(method.name());
    let _guard = args.backbone.precision().guard(args.backbone.device.device()?)?;
    let opened = args.backbone.open(args.backbone.checkpoint()?)?;
    let lock = processes.is_first().then(|| match &args.spec {
        // The process of a sweep that was killed ends by itself after its step.
        Some(_) => FolderLock::wait(&out),
        None => FolderLock::take(&out),
    });
    let _lock = lock.transpose()?;
    let job = FinetuneJob { args, lists: &lists, method, out: &out, stop: &stop, processes };
    let Some(record) = job.run(&opened)? else { return Ok(Outcome::unless_stopped(&stop)) };
    say(args, &record);
    println!("{}", out.display());
    // Another process of the run may have been asked to stop.
    Ok(if record.fit.stopped { Outcome::Stopped } else { Outcome::unless_stopped(&stop) })
}

/// Ends the run when standard input is closed. A sweep holds the other end; it closes it to end the
/// run, and the end is also closed if the sweep itself ends.
fn end_with_stdin(stop: Stop) {
    std::thread::spawn(move || {
        let _ended = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        stop.ask();
    });
}

/// Prints the results.
fn say(args: &FinetuneArgs, record: &RunRecord) {
    let task = &record.task;
    if let Some(top1) = record.test_top1 {
        let weights = match args.select {
            Select::Val => "best epoch on the validation images",
            _ => "last epoch",
        };
        println!("{task}: top-1 {top1:.2} % on the test images ({weights})");
    }
    if let Some(scores) = &record.test {
        let top5 = scores.top5.map(|top5| format!("top-5 {top5:.2} %, ")).unwrap_or_default();
        println!(
            "{task}: {top5}balanced accuracy {:.2} %, macro F1 {:.2} %, calibration error {:.2} %",
            scores.balanced_accuracy, scores.macro_f1, scores.ece
        );
    }
    if let Some(best) = record.best_on_test {
        println!("{task}: best-on-test {:.2} % (epoch {})", best.top1, best.epoch + 1);
    }
}
