//! What `--help` prints, held against `help.txt`, and what wrong arguments do.
//!
//! `CONVPASS_WRITE_HELP=1 cargo test -p convpass-cli help` writes the file anew.

use std::path::Path;
use std::process::{Command, Output};

const SUBCOMMANDS: [&str; 12] = [
    "finetune",
    "sweep",
    "few-shot",
    "zero-shot",
    "predict",
    "export",
    "report",
    "search",
    "audit",
    "inspect",
    "completions",
    "man",
];

fn convpass(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_convpass-program")).args(arguments).output().unwrap()
}

fn printed(arguments: &[&str]) -> String {
    let output = convpass(arguments);
    assert!(output.status.success(), "{arguments:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    // clap pads lines whose help begins on the next one.
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

#[test]
fn help_is_as_it_was() {
    let mut text = printed(&["--help"]);
    for subcommand in SUBCOMMANDS {
        text +=
            &format!("\n=== convpass {subcommand} --help\n\n{}", printed(&[subcommand, "--help"]));
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help.txt");
    if std::env::var_os("CONVPASS_WRITE_HELP").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&file).unwrap();
    for (number, (found, expected)) in text.lines().zip(expected.lines()).enumerate() {
        assert_eq!(found, expected, "line {} of help.txt", number + 1);
    }
    assert_eq!(text.lines().count(), expected.lines().count());
}

/// The file is as long as the help of every subcommand, so that none is forgotten.
#[test]
fn every_subcommand_is_listed() {
    let text = printed(&["--help"]);
    let commands = text.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    let named = |line: &str| line.split_whitespace().next().map(str::to_owned);
    let found: Vec<String> = commands.lines().filter_map(named).collect();
    let found: Vec<&str> =
        found.iter().map(String::as_str).filter(|name| *name != "help").collect();
    assert_eq!(found, SUBCOMMANDS);
}

#[test]
fn wrong_arguments_are_named_and_exit_with_2() {
    let run = ["finetune", "--task", "dtd", "--backbone", "x"];
    let run = |flags: &[&'static str]| [&run[..], flags].concat();
    for (arguments, part) in [
        (vec!["finetune", "--task", "dtd"], "--backbone"),
        (run(&["--seeds", "1"]), "--seeds"),
        (run(&["--precision", "f8"]), "f8"),
        (run(&["--method", "lorra"]), "lorra"),
        (run(&["--method", r#"{"name": "lora", "rnk": 4}"#]), "rnk"),
        (run(&["--cuda"]), "--cuda"),
        (run(&["--batch-size", "0"]), "--batch-size"),
        // Flags that belong to a mode, outside it.
        (run(&["--method", "lora", "--scale", "2"]), "--scale needs --method convpass"),
        (run(&["--select", "val", "--also-best-on-test", "1"]), "--also-best-on-test needs"),
        (vec!["sweep", "--plan", "plan.toml", "--seeds", "1"], "--seeds"),
        (vec!["sweep", "--plan", "plan.toml", "--dropout", "0"], "--dropout"),
        (vec!["sweep", "--methods", "lora,bitfit", "--h", "4"], "--bottleneck-dim needs convpass"),
        (vec!["report", "runs", "--data", "data"], "--backbone"),
        (vec!["report", "runs", "--fresh"], "--backbone"),
        (vec!["few-shot", "--data", "x"], "--test"),
        (vec!["zero-shot", "--data", "x"], "--classes"),
        (vec!["predict", "--adapter", "x"], "IMAGES"),
        (vec!["export", "--adapter", "x"], "--out"),
        (vec!["export", "--out", "x"], "--backbone"),
        (vec!["export", "--adapter", "x", "--out", "y", "--format", "safetensors"], "--names"),
        (vec!["export", "--adapter", "x", "--out", "y", "--names", "timm"], "--names needs"),
        (vec!["serve"], "serve"),
    ] {
        let output = convpass(&arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
}

#[test]
fn a_seed_may_be_negative() {
    let output = convpass(&["finetune", "--task", "t", "--backbone", "none", "--seed", "-1"]);
    assert_eq!(output.status.code(), Some(1), "the task is missing, and the seed is fine");
}

#[test]
fn completions_and_man_pages_are_made() {
    for shell in ["bash", "zsh", "fish"] {
        assert!(printed(&["completions", shell]).contains("few-shot"), "{shell}");
    }
    let folder = tempfile::tempdir().unwrap();
    printed(&["man", "--out", folder.path().to_str().unwrap()]);
    assert!(folder.path().join("convpass-finetune.1").exists());
}

/// The launcher finds libtorch, or says what to set.
#[test]
fn the_launcher_starts_the_program_or_says_what_to_set() {
    let launcher = || Command::new(env!("CARGO_BIN_EXE_convpass"));
    let output = launcher().arg("--version").env_remove("LIBTORCH").output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("convpass "));
    let folder = tempfile::tempdir().unwrap();
    let output = launcher().arg("--version").env("LIBTORCH", folder.path()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("LIBTORCH is"), "{said}");
}
