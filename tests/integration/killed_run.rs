//! A process that is killed at any time leaves a state from which the run goes on, bit for bit.

use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Child, ChildStdout, Stdio};
use std::time::Duration;

use convpass::eval::PrefixCache;
use convpass::train::{
    JsonLog, Observer, RunCheckpoint, RunStart, Selection, StepReport, fit_resumable,
};
use convpass::{
    ConvBypassConfig, FrozenViT, ImageDataset, Method, PetlConfig, PetlModel, TrainConfig, fit,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::Device;

use crate::child;
use crate::resume::{bars, in_last_block, reports};
use crate::support::{root, train_config};

/// A run beside the bundled backbone.
struct Case {
    model: PetlModel,
    train: ImageDataset,
    validation: Option<ImageDataset>,
    config: TrainConfig,
    /// Steps between two writes of the state.
    every: usize,
}

const CASES: usize = 5;

/// The state is written every few steps and at each one, between features that are computed once,
/// tokens that are kept in a file and blocks that are computed twice.
fn case(index: usize, folder: &Path) -> Case {
    let file = root().join("assets/vit_fashion_mnist.safetensors");
    let backbone = FrozenViT::open(file, Device::Cpu).unwrap();
    let (side, depth) = (backbone.config().image_size.0 as usize, backbone.config().depth as usize);
    let best = Selection::BestOnValidation;
    let bypass = || Method::ConvBypass(ConvBypassConfig::default());
    let prefix = PrefixCache { folder: Some(folder.join("prefix")), bf16: false };
    let (method, drop_path, every, config) = match index {
        0 => (bypass(), 0.3, 3, train_config(4, 5)),
        // Where drop path leaves out a whole batch, a variable has no gradient in that step.
        1 => (bypass(), 0.95, 1, TrainConfig { selection: best, ..train_config(2, 1) }),
        2 => (Method::LinearProbe, 0.0, 2, TrainConfig { selection: best, ..train_config(6, 5) }),
        3 => (
            in_last_block(depth, 0.2),
            0.1,
            2,
            TrainConfig { prefix: Some(prefix), ..train_config(4, 5) },
        ),
        _ => (Method::BitFit, 0.2, 4, TrainConfig { recompute: true, ..train_config(4, 5) }),
    };
    let petl = PetlConfig { drop_path, seed: 5, ..PetlConfig::new(method, 3) };
    let images = if index == 1 { 10 } else { 25 };
    Case {
        model: PetlModel::new(backbone, &petl).unwrap(),
        train: bars(images, side, 0),
        validation: (config.selection == best).then(|| bars(9, side, 1)),
        config,
        every,
    }
}

/// Tells the parent process of the run, line by line.
struct Tell;

fn tell(line: String) {
    let mut out = std::io::stdout().lock();
    // The parent may have stopped listening.
    let _told = writeln!(out, "{line}").and_then(|()| out.flush());
}

impl Observer for Tell {
    fn start(&mut self, start: &RunStart) {
        tell(format!("from {}", start.steps_done()));
    }

    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        tell(format!("step {}", step.steps_done()));
        ControlFlow::Continue(())
    }
}

/// The process that is killed: one case in a folder, with its state there; or, as what the others
/// are compared with, all of them, uninterrupted and without a state.
fn child(folder: &Path, index: Option<usize>) {
    tch::set_num_threads(1);
    let run = |index: usize, folder: &Path, resumable: bool| {
        let Case { mut model, train, validation, config, every } = case(index, folder);
        let (validation, path) = (validation.as_ref(), folder.join("run.state.safetensors"));
        let mut log = JsonLog::open(folder.join("log.jsonl")).unwrap();
        let mut tell = Tell;
        let mut observers: Vec<&mut dyn Observer> = vec![&mut log, &mut tell];
        let run = if resumable {
            let checkpoint = RunCheckpoint { path, every };
            fit_resumable(&mut model, &train, validation, &config, &checkpoint, &mut observers)
        } else {
            fit(&mut model, &train, validation, &config, &mut observers)
        };
        log.finish().unwrap();
        std::fs::write(folder.join("report"), reports(&run.unwrap())).unwrap();
        // Last, as the sign that all is there.
        model.save_adapter(folder.join("adapter.safetensors")).unwrap();
    };
    match index {
        Some(index) => run(index, folder, true),
        None => (0..CASES).for_each(|index| {
            let folder = folder.join(index.to_string());
            std::fs::create_dir(&folder).unwrap();
            run(index, &folder, false);
        }),
    }
}

const FOLDER: &str = "CONVPASS_TEST_RESUME_IN";
const CASE: &str = "CONVPASS_TEST_RESUME_CASE";

fn start_child(folder: &Path, index: Option<usize>) -> (Child, BufReader<ChildStdout>) {
    let mut command = child::test("killed_run::a_killed_run_goes_on_bit_for_bit");
    command.env(FOLDER, folder);
    if let Some(index) = index {
        command.env(CASE, index.to_string());
    }
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap());
    (child, lines)
}

/// The steps that a process tells of, and where it started; all there are, or the first so many.
fn listen(lines: &mut BufReader<ChildStdout>, at_most: usize) -> (Option<usize>, usize) {
    let (mut from, mut last, mut steps, mut line) = (None, 0, 0, String::new());
    while steps < at_most {
        line.clear();
        if lines.read_line(&mut line).unwrap() == 0 {
            break;
        }
        match line.trim().split_once(' ') {
            Some(("from", step)) => from = step.parse().ok(),
            Some(("step", step)) => {
                last = step.parse().unwrap();
                steps += 1;
            }
            _ => {}
        }
    }
    (from, last)
}

/// The processes of one case, killed four times after a random number of steps and some
/// microseconds, which come to lie in a step, in a write, or before the first.
fn kill_and_resume(index: usize, folder: &Path, expected: &Path) -> usize {
    std::fs::create_dir(folder).unwrap();
    let every = case(index, folder).every;
    let mut rng = ChaCha8Rng::seed_from_u64(index as u64);
    let (mut kills, mut resumed, mut safe) = (0, 0, 0);
    loop {
        let (mut child, mut lines) = start_child(folder, Some(index));
        let ends = kills == 4;
        let until = if ends { usize::MAX } else { rng.random_range(0..=7) };
        let heard = listen(&mut lines, until);
        if !ends {
            std::thread::sleep(Duration::from_micros(rng.random_range(0..3000)));
            child.kill().unwrap();
        }
        let rest = listen(&mut lines, usize::MAX);
        let finished = child.wait().unwrap().success();
        if let Some(from) = heard.0.or(rest.0) {
            assert!(from >= safe, "case {index}: at {from} again, where {safe} was safe");
            resumed += usize::from(from > 0);
        }
        let reached = heard.1.max(rest.1);
        safe = safe.max(reached.saturating_sub(every));
        if finished {
            for name in ["adapter.safetensors", "report"] {
                let read = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
                assert!(read(folder) == read(expected), "case {index}: {name} differs");
            }
            assert_eq!(steps_of(folder), steps_of(expected), "case {index}");
            let unfinished = |name: &str| name.ends_with(".tmp");
            assert!(!names(folder).iter().any(|name| unfinished(name)), "{:?}", names(folder));
            std::fs::remove_file(folder.join("run.state.safetensors")).unwrap();
            safe = 0;
        } else {
            assert!(!ends, "case {index}: ended by itself");
            kills += 1;
        }
        if ends {
            return resumed;
        }
    }
}

fn names(folder: &Path) -> Vec<String> {
    let files = std::fs::read_dir(folder).unwrap();
    files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
}

/// Event and step of each line of the log.
fn steps_of(folder: &Path) -> Vec<(String, u64)> {
    let text = std::fs::read_to_string(folder.join("log.jsonl")).unwrap();
    let line = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        (line["event"].as_str().unwrap().to_owned(), line["step"].as_u64().unwrap())
    };
    text.lines().map(line).collect()
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        let index = std::env::var(CASE).ok().map(|index| index.parse().unwrap());
        return child(Path::new(&folder), index);
    }
    let folder = tempfile::tempdir().unwrap();
    let (mut whole, mut lines) = start_child(folder.path(), None);
    listen(&mut lines, usize::MAX);
    assert!(whole.wait().unwrap().success());
    let resumed = std::thread::scope(|scope| {
        let cases: Vec<_> = (0..CASES)
            .map(|index| {
                let killed = folder.path().join(format!("killed{index}"));
                let expected = folder.path().join(index.to_string());
                scope.spawn(move || kill_and_resume(index, &killed, &expected))
            })
            .collect();
        cases.into_iter().map(|case| case.join().unwrap()).sum::<usize>()
    });
    assert!(resumed >= 10, "{resumed} of 25 processes went on from a state");
}
