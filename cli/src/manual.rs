//! `convpass completions` and `convpass man`: shell completions and manual pages.

use std::io;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;

use crate::flags::OutFlag;
use crate::{Cli, Outcome};

/// Prints a script that makes a shell complete the subcommands and flags.
///
/// The script goes to standard output; each shell has a folder of its own for such scripts.
#[derive(clap::Args)]
#[command(
    after_long_help = "Example:\n  convpass completions bash > ~/.local/share/bash-completion/completions/convpass"
)]
pub struct CompletionsArgs {
    /// Shell that the script is for.
    #[arg(value_enum)]
    shell: Shell,
}

/// Writes manual pages, one for the program and one for each subcommand.
///
/// They hold the same text as --help.
#[derive(clap::Args)]
#[command(
    mut_arg("out", |arg| arg.help("Folder for the pages [default: man]")),
    after_long_help = "Example:\n  convpass man --out ~/.local/share/man/man1\n  man convpass-finetune"
)]
pub struct ManArgs {
    #[command(flatten)]
    out: OutFlag,
}

pub fn completions(args: &CompletionsArgs) -> Result<Outcome> {
    clap_complete::generate(args.shell, &mut Cli::command(), "convpass", &mut io::stdout());
    Ok(Outcome::Done)
}

pub fn man(args: &ManArgs) -> Result<Outcome> {
    let out = args.out.folder(|| PathBuf::from("man"));
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    clap_mangen::generate_to(Cli::command(), &out).with_context(|| out.display().to_string())?;
    Ok(Outcome::Done)
}
