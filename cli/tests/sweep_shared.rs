//! Several processes that work on one plan.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::process::{convpass, run};

const PLAN: &str = r#"
tasks = ["digits"]
seeds = [0, 1]
trials = 3

[train]
normalization = "half"
epochs = 2
warmup_epochs = 0
batch_size = 50

[[methods]]
label = "Linear probe"
method = { name = "linear_probe" }
grid = { lr = [1e-3, 1e-1, 1e30] }

[[methods]]
label = "Second probe"
head = "Linear probe"
method = { name = "linear_probe" }
train = { epochs = 20 }
grid = { lr = [1e-4, 1e-3, 1e-2] }
"#;
/// Three trials and two seeds each.
const RUNS: usize = 10;

fn sweep(folder: &Path, out: &str) -> Command {
    let mut command = convpass("sweep");
    command.args(["--plan", "plan.toml", "--out", out, "--threads", "1", "--jobs", "1"]);
    command.current_dir(folder);
    command
}

fn started(folder: &Path, out: &str) -> Child {
    let mut command = sweep(folder, out);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Returns what the process said, and how many runs it made itself.
fn ended(process: Child) -> (String, usize) {
    let output = process.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    let text = text.concat();
    // A run that diverged is a failed run.
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("tasks missing: 0, runs failed: 1"), "{text}");
    let made = text.lines().filter(|line| line.starts_with('[') && line.ends_with(" s")).count();
    (text, made)
}

fn adapters(out: &Path) -> Vec<Vec<u8>> {
    let of = |method: &str, run: &str| {
        fs::read(out.join("digits").join(method).join(run).join("adapter.safetensors")).unwrap()
    };
    let runs = ["seed-0", "seed-1"];
    ["linear-probe", "second-probe"]
        .iter()
        .flat_map(|method| runs.map(|run| of(method, run)))
        .collect()
}

#[test]
fn processes_divide_the_runs_of_a_plan_and_one_that_is_killed_loses_nothing() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    fs::write(folder.join("plan.toml"), PLAN).unwrap();
    let (_, alone) = ended(started(folder, "alone"));
    assert_eq!(alone, RUNS - 1, "all but the one that diverges");

    let together: Vec<_> = (0..3).map(|_| started(folder, "together")).collect();
    let together: Vec<_> = together.into_iter().map(ended).collect();
    let made: usize = together.iter().map(|(_, made)| made).sum();
    assert_eq!(made, RUNS - 1, "{together:#?}");
    assert_eq!(adapters(&folder.join("together")), adapters(&folder.join("alone")));
    let csv = |out: &str| {
        let text = fs::read_to_string(folder.join(out).join("results.csv")).unwrap();
        // The seconds differ.
        let rows = text.lines().map(|line| line.rsplit_once(',').unwrap().0.to_owned());
        rows.map(|row| row.rsplit_once(',').unwrap().0.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(csv("together"), csv("alone"));

    let mut killed = started(folder, "killed");
    let status = || run(sweep(folder, "killed").arg("--status"));
    let deadline = Instant::now() + Duration::from_secs(120);
    let text = loop {
        let (code, text) = status();
        assert_eq!(code, Some(0), "{text}");
        if text.contains("trial lr=0.0001: made by") {
            break text;
        }
        assert!(Instant::now() < deadline, "{text}");
        sleep(Duration::from_millis(20));
    };
    assert!(text.contains(&format!("of {RUNS} runs")), "{text}");
    killed.kill().unwrap();
    killed.wait().unwrap();
    let (text, made) = ended(started(folder, "killed"));
    assert!(made < RUNS - 1, "{text}");
    assert_eq!(adapters(&folder.join("killed")), adapters(&folder.join("alone")));
    let (_, text) = status();
    assert!(
        text.contains("of 10 runs 9 are done, 0 are made now, 0 are open, 1 diverged"),
        "{text}"
    );
}
