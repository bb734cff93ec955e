//! The command `convpass`: finetunes frozen vision transformers, compares methods, and uses
//! adapters.

mod audit;
mod error;
mod export;
mod failure;
mod few_shot;
mod files;
mod finetune;
mod flags;
mod inspect;
mod manual;
mod memory;
mod plan;
mod predict;
mod processes;
mod report;
mod run_folder;
mod search;
mod stop;
mod survey;
mod sweep;
mod targets;
mod trained;
mod zero_shot;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Adapts frozen vision transformers with convolutional bypasses and other methods.
///
/// A pretrained backbone stays as it is; an adapter of about 1 MB is trained for each task.
#[derive(Parser)]
#[command(name = "convpass", bin_name = "convpass", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Finetune(Box<finetune::FinetuneArgs>),
    Sweep(Box<sweep::SweepArgs>),
    FewShot(Box<few_shot::FewShotArgs>),
    ZeroShot(zero_shot::ZeroShotArgs),
    Predict(predict::PredictArgs),
    Export(export::ExportArgs),
    Report(report::ReportArgs),
    Search(search::SearchArgs),
    Audit(audit::AuditArgs),
    Inspect(inspect::InspectArgs),
    Completions(manual::CompletionsArgs),
    Man(manual::ManArgs),
}

fn main() -> ExitCode {
    convpass::keep_freed_memory();
    let result = match Cli::parse().command {
        Command::Finetune(args) => finetune::run(&args),
        Command::Sweep(args) => sweep::run(&args),
        Command::FewShot(args) => few_shot::run(&args),
        Command::ZeroShot(args) => zero_shot::run(&args),
        Command::Predict(args) => predict::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Search(args) => search::run(&args),
        Command::Audit(args) => audit::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Completions(args) => manual::completions(&args),
        Command::Man(args) => manual::man(&args),
    };
    match result {
        Ok(outcome) => outcome.into(),
        Err(error) => failure::report(&error),
    }
}

/// How a command ended, if it did not fail.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    /// The command did everything.
    Done,
    /// The command left something out and printed what.
    Partial,
    /// Ctrl-C ended the command early.
    Stopped,
}

impl Outcome {
    /// Returns `Stopped` if Ctrl-C ended the command, else `Done`.
    fn unless_stopped(stop: &stop::Stop) -> Self {
        if stop.is_asked() { Outcome::Stopped } else { Outcome::Done }
    }
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done => ExitCode::SUCCESS,
            Outcome::Partial => ExitCode::FAILURE,
            // A shell reports this code for a program that Ctrl-C ended.
            Outcome::Stopped => ExitCode::from(130),
        }
    }
}
