//! `convpass finetune`: one run on one task.

mod args;
mod job;
mod watch;

use std::path::PathBuf;

use anyhow::Result;
use convpass::data::vtab::VtabFolder;

use args::Select;
pub use args::{Args, MethodArg, Spec, parse_method};
use job::Job;

use crate::Outcome;
use crate::stop::Stop;

pub fn run(args: &Args) -> Result<Outcome> {
    args.threads.apply()?;
    let stop = Stop::on_ctrl_c("ending after this step, from which the same command goes on")?;
    if args.spec.is_some() {
        // A sweep holds the other end, and lets go of it to end this run, or by ending itself.
        let flag = stop.clone();
        std::thread::spawn(move || {
            let _ended = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            flag.ask();
        });
    }
    let name = &args.task;
    let folder = VtabFolder::open(&args.data, name)?;
    let method = args.chosen_method();
    let default = PathBuf::from("runs").join(format!("{name}-{}", method.name()));
    let out = args.out.as_deref().unwrap_or(&default);
    let guard = args.backbone.precision().guard(args.backbone.device.device()?)?;
    let opened = args.backbone.open(&args.file.backbone)?;
    let record = Job { args, folder: &folder, method, out, stop: &stop }.run(opened)?;
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
    Ok(Outcome::unless_stopped(&stop))
}
