//! Shell completions and man pages.

use std::io;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;

use crate::{Cli, Outcome};

/// Prints a completion script for a shell.
///
/// For bash: `convpass completions bash > ~/.local/share/bash-completion/completions/convpass`
#[derive(clap::Args)]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

/// Writes man pages, one for each subcommand.
#[derive(clap::Args)]
pub struct ManArgs {
    /// Folder for the pages, such as ~/.local/share/man/man1.
    #[arg(long)]
    out: PathBuf,
}

pub fn completions(args: &CompletionsArgs) -> Result<Outcome> {
    clap_complete::generate(args.shell, &mut Cli::command(), "convpass", &mut io::stdout());
    Ok(Outcome::Done)
}

pub fn man(args: &ManArgs) -> Result<Outcome> {
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    clap_mangen::generate_to(Cli::command(), &args.out)
        .with_context(|| args.out.display().to_string())?;
    Ok(Outcome::Done)
}
