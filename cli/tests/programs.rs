//! The programs that users run, as processes: a plan that is stopped, goes on and refuses; few-shot runs and what they
//! reach on other sets; predictions of odd files.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use convpass::data::bundled::{self, BundledTask};
use convpass::train::RunRecord;

const BACKBONE: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/vit_fashion_mnist.safetensors");

/// A subcommand of the program.
fn convpass(subcommand: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_convpass-program"));
    command.arg(subcommand);
    command
}

/// What a program did: its status, and its two outputs in one.
fn run(command: &mut Command) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (status.code(), text)
}

const PLAN: &str = r#"
tasks = ["digits", "absent"]
seeds = [0, 1]
trials = 2

[train]
normalization = "half"
epochs = 2
warmup_epochs = 0
batch_size = 50

[[methods]]
label = "Linear probe"
method = { name = "linear_probe" }
grid = { lr = [1e-3, 1e-1] }

[[methods]]
label = "BitFit"
head = "Linear probe"
method = { name = "bit_fit" }
train = { epochs = 1 }
grid = { lr = [0, 1e-3] }
"#;

/// Runs the plan in a folder, with more flags.
fn run_plan(folder: &Path, flags: &[&str]) -> (Option<i32>, String) {
    let mut command = convpass("sweep");
    command.args(["--plan", "plan.toml", "--out", "out", "--threads", "1"]).args(flags);
    run(command.current_dir(folder))
}

#[test]
fn a_plan_selects_on_validation_skips_what_is_done_and_keeps_what_is_another() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("plan.toml"), PLAN).unwrap();
    let (status, text) = run_plan(root.path(), &[]);
    assert_eq!(status, Some(1), "one task is missing: {text}");
    assert!(text.contains("absent is left out") && text.contains("train800val200.txt"), "{text}");
    assert!(text.contains("tasks missing: 1, runs failed: 0"), "{text}");
    assert!(text.contains("in neither G nor A: digits"), "{text}");

    // Trials never see the test images, and start from the head of a trial.
    let out = root.path().join("out/digits");
    let record = |path: &str| RunRecord::load(out.join(path).join("run.json")).unwrap();
    let trial = record("bitfit/trials/lr=0");
    assert_eq!((trial.test_split, trial.test_top1), (None, None));
    assert!(trial.val_split.is_some());
    let results = fs::read(root.path().join("out/results.json")).unwrap();
    let results: serde_json::Value = serde_json::from_slice(&results).unwrap();
    let selected = &results["selected"][0];
    assert_eq!(
        (&selected["task"], &selected["method"]),
        (&"digits".into(), &"Linear probe".into())
    );
    // The first of the best.
    let trials = selected["trials"].as_array().unwrap();
    let top1 = |trial: &serde_json::Value| trial["val_top1"].as_f64().unwrap();
    let best = trials.iter().map(top1).fold(0.0, f64::max);
    let chosen = trials.iter().find(|trial| top1(trial) == best).unwrap();
    assert_eq!(selected["setting"], chosen["setting"]);
    let probe = match selected["setting"]["lr"].as_f64().unwrap() {
        0.1 => record("linear-probe/trials/lr=0.1"),
        _ => record("linear-probe/trials/lr=0.001"),
    };
    // At a learning rate of 0 what is left is the head that it started from.
    assert_eq!(trial.fit.epochs[0].val_top1, probe.fit.epochs[1].val_top1);
    let csv = fs::read_to_string(root.path().join("out/results.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + 4, "{csv}");

    // All is done; a cut record is not taken for one, and is not written over.
    let (_, text) = run_plan(root.path(), &[]);
    assert_eq!(text.matches("done before").count(), 8, "{text}");
    let cut = out.join("bitfit/seed-1/run.json");
    fs::write(&cut, "{\"version\"").unwrap();
    fs::remove_file(out.join("bitfit/seed-0/adapter.safetensors")).unwrap();
    let (_, text) = run_plan(root.path(), &[]);
    assert_eq!(text.matches("done before").count(), 6, "{text}");
    assert!(text.contains("left as it is") && text.contains("runs failed: 1"), "{text}");
    assert_eq!(fs::read_to_string(&cut).unwrap(), "{\"version\"");
    assert!(out.join("bitfit/seed-0/adapter.safetensors").exists());

    // Another setting of the user's: named, and only moved when told to.
    let (_, text) = run_plan(root.path(), &["--normalization", "unit"]);
    assert!(text.contains("train.normalization: \"half\", planned is \"unit\""), "{text}");
    let (_, text) = run_plan(root.path(), &["--set-aside", "--also-best-on-test", "1"]);
    assert!(out.join("bitfit/.seed-1.before-1/run.json").exists(), "{text}");
    assert!(
        text.contains("chosen on what it reports") && text.contains("runs failed: 0"),
        "{text}"
    );
    let seen = record("bitfit/seed-1");
    assert!(seen.fit.epochs.iter().all(|epoch| epoch.val_top1.is_none()));
    assert!(seen.best_on_test.unwrap().top1 >= seen.test_top1.unwrap());
}

#[test]
fn a_plan_with_a_slip_is_refused_before_anything_runs() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("plan.toml"), PLAN.replace("lr = [1e-3, 1e-1]", "rank = [1, 2]"))
        .unwrap();
    let (status, text) = run_plan(root.path(), &[]);
    assert!(status == Some(1) && text.contains("plan.toml:12: "), "{text}");
    let mut both = convpass("sweep");
    let (status, text) = run(both.args(["--plan", "plan.toml", "--lr", "1e-3"]));
    assert!(status == Some(2) && text.contains("cannot be used with"), "{text}");
    assert!(!root.path().join("out").exists());
}

/// A folder with a trained probe of the digits in `run`, and the data.
fn trained() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    bundled::write(root.path(), BundledTask::Digits, 32, 0).unwrap();
    let mut command = convpass("finetune");
    command.args(["--data", ".", "--task", "digits", "--method", "linear_probe", "--out", "run"]);
    command.args(["--backbone", BACKBONE, "--normalization", "half", "--epochs", "20"]);
    command.args(["--lr", "1e-1", "--batch-size", "50"]);
    let (status, text) = run(command.current_dir(root.path()));
    assert_eq!(status, Some(0), "{text}");
    root
}

#[test]
fn predictions_agree_with_the_run_and_odd_files_are_named() {
    let root = trained();
    let predict = || {
        let mut command = convpass("predict");
        command.current_dir(root.path()).args(["--adapter", "run"]);
        command
    };
    // The share of right ones is the run's, in the order of the list.
    let list = fs::read_to_string(root.path().join("digits/test.txt")).unwrap();
    let (paths, labels): (Vec<_>, Vec<_>) =
        list.lines().map(|line| line.rsplit_once(' ').unwrap()).unzip();
    let mut command = predict();
    command.args(["--format", "csv", "--top", "1", "--batch-size", "60", "-"]);
    let mut process = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = process.stdin.take().unwrap();
    for path in &paths {
        writeln!(stdin, "digits/{path}\r\n").unwrap();
    }
    drop(stdin);
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("normalization: half, from run/run.json"), "{said}");
    assert!(said.contains("images: 32 x 32, from run/run.json"), "{said}");
    let mut rows = csv::Reader::from_reader(&*output.stdout);
    let rows: Vec<csv::StringRecord> = rows.records().map(Result::unwrap).collect();
    assert_eq!(rows.len(), paths.len());
    assert!(rows.iter().zip(&paths).all(|(row, path)| row[0] == format!("digits/{path}")));
    let right = rows.iter().zip(&labels).filter(|(row, label)| row[2] == ***label).count();
    let record = RunRecord::load(root.path().join("run/run.json")).unwrap();
    let top1 = 100.0 * right as f64 / paths.len() as f64;
    assert!((top1 - record.test_top1.unwrap()).abs() < 0.3, "{top1}");

    // Odd ones among good ones.
    let odd = root.path().join("odd/deeper");
    fs::create_dir_all(&odd).unwrap();
    fs::create_dir(root.path().join("empty")).unwrap();
    fs::write(odd.join("text.JPG"), "no image").unwrap();
    fs::write(odd.join("list.txt"), "not looked at").unwrap();
    fs::copy(root.path().join("digits").join(paths[0]), odd.join("a, \"b\".png")).unwrap();
    let names: String = (0..10).map(|n| format!("digit {n}\r\n")).collect();
    fs::write(root.path().join("classes.txt"), names).unwrap();
    let mut command = predict();
    command.args(["--format", "json", "--classes", "classes.txt", "odd", "nosuch.png", "empty"]);
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert_eq!(status.code(), Some(1));
    let said = String::from_utf8(stderr).unwrap();
    for part in ["text.JPG: neither JPEG nor PNG", "nosuch.png: ", "empty: no .jpg"] {
        assert!(said.contains(part), "{said}");
    }
    assert!(!said.contains("list.txt"), "{said}");
    let line: serde_json::Value = serde_json::from_slice(&stdout).unwrap();
    assert_eq!(line["image"], "odd/deeper/a, \"b\".png");
    assert_eq!(line["predictions"].as_array().unwrap().len(), 3);
    assert!(line["predictions"][0]["class"].as_str().unwrap().starts_with("digit "));

    // Nothing to do, and what does not fit.
    let error = |flags: &[&str]| {
        let (status, text) = run(predict().args(flags));
        assert_eq!(status, Some(1), "{text}");
        text
    };
    assert!(error(&["empty"]).contains("no .jpg"));
    assert!(error(&["--classes", "digits/val200.txt", "odd"]).contains("expected 10 lines"));
    fs::rename(root.path().join("run/run.json"), root.path().join("run.json")).unwrap();
    assert!(error(&["odd"]).contains("--backbone is needed"));
    // The adapter itself says how images are prepared.
    let (_, text) = run(predict().args(["--backbone", BACKBONE, "odd"]));
    assert!(text.contains("normalization: half, from run/adapter.safetensors"), "{text}");
}

#[cfg(unix)]
#[test]
fn whoever_reads_predictions_may_stop_reading() {
    let root = trained();
    let mut command = convpass("predict");
    command.current_dir(root.path()).args(["--adapter", "run", "--batch-size", "4", "digits"]);
    let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(process.stdout.take());
    let output = process.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && !said.contains("panicked"), "{said}");
}

/// Photos of 40 x 30 in a folder for each class, which is lit in another corner; `hue` is the domain.
fn photos(folder: &Path, classes: &[&str], each: u32, hue: usize) {
    for class in classes {
        let place = ["east", "north", "south", "west"].iter().position(|name| name == class);
        let (left, top) = ((place.unwrap() % 2) as u32 * 20, (place.unwrap() / 2) as u32 * 15);
        fs::create_dir_all(folder.join(class)).unwrap();
        for i in 0..each {
            let photo = image::RgbImage::from_fn(40, 30, |x, y| {
                let is_lit = (left..left + 20).contains(&x) && (top..top + 15).contains(&y);
                let mut pixel = [((x * 7 + y * 13 + i * 31) % 90) as u8; 3];
                pixel[hue] += if is_lit { 160 } else { 0 };
                image::Rgb(pixel)
            });
            photo.save(folder.join(class).join(format!("{i}.png"))).unwrap();
        }
    }
}

#[test]
fn few_shot_runs_start_from_heads_and_are_measured_on_other_sets() {
    let root = tempfile::tempdir().unwrap();
    let at = |path: &str| root.path().join(path);
    let all = ["east", "north", "south", "west"];
    photos(&at("photos/train"), &all, 5, 0);
    photos(&at("photos/test"), &all, 3, 0);
    photos(&at("blue"), &["south", "north"], 4, 2);
    let list: String = ["west/0.png 0", "east/1.png 1"].map(|line| format!("{line}\n")).concat();
    fs::write(at("photos/test/some.txt"), list).unwrap();
    fs::write(at("some-classes.txt"), "3\n0\n").unwrap();
    let few_shot = |out: &str, flags: &[&str]| {
        let mut command = convpass("few-shot");
        command.args(["--data", "photos/train", "--test", "photos/test", "--backbone", BACKBONE]);
        command.args(["--normalization", "half", "--shots", "2,4", "--seeds", "0,3", "--out", out]);
        command.args(["--lr", "3e-2", "--name", "corners", "--batch-size", "8"]).args(flags);
        run(command.current_dir(root.path()))
    };
    let record = |path: &str| RunRecord::load(at(path).join("run.json")).unwrap();
    let csv = |out: &str| fs::read_to_string(at(out).join("results.csv")).unwrap();

    let probe = ["--method", "linear", "--augment", "none", "--epochs", "20"];
    let (status, text) = few_shot("probe", &probe);
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("4 a class: top-1 "), "{text}");
    let trained = record("probe/4shot-seed3");
    assert_eq!(
        (trained.task.as_str(), trained.test_shorter_side),
        ("corners, 4 a class", Some(36))
    );
    assert_eq!(trained.fit.epochs.len(), 20);
    let folder: Vec<_> = ["train.txt", "log.jsonl", "adapter.safetensors"]
        .map(|name| at("probe/4shot-seed3").join(name))
        .to_vec();
    assert!(folder.iter().all(|file| file.exists()));

    // At a learning rate of next to nothing what is left is the head that each run started from.
    let still = ["--method", "bitfit", "--protocol", "domain_generalization", "--epochs", "1"];
    let still: Vec<_> =
        still.iter().chain(&["--lr", "1e-12", "--test-resize", "36"]).copied().collect();
    let (status, text) = few_shot("tuned", &[&still[..], &["--head", "probe"]].concat());
    assert_eq!(status, Some(0), "{text}");
    for run in ["2shot-seed0", "2shot-seed3", "4shot-seed0", "4shot-seed3"] {
        let (tuned, probe) = (record(&format!("tuned/{run}")), record(&format!("probe/{run}")));
        assert_eq!(tuned.test_top1, probe.test_top1, "{run}");
        assert!(tuned.head_digest.is_some() && tuned.train.weight_decay == 0.0);
    }

    // A target that is new is measured and nothing trained anew; then all is known.
    let targets =
        ["--target", "blue=blue", "--target", "some=photos/test/some.txt:some-classes.txt"];
    let flags = [&probe[..], &targets].concat();
    let (status, text) = few_shot("probe", &flags);
    assert_eq!(status, Some(0), "{text}");
    assert_eq!(text.matches("done before").count(), 4, "{text}");
    assert!(text.contains("4 a class: blue "), "{text}");
    let known = csv("probe");
    assert!(known.starts_with("shots,seed,images,test_top1,blue,some\n2,0,8,"), "{known}");
    let (_, text) = few_shot("probe", &flags);
    assert!(!text.contains("images") && csv("probe") == known, "{text}");
    // Other images under the same names are another set.
    let measured = || fs::read_to_string(at("probe/4shot-seed3/measured.json")).unwrap();
    let before = measured();
    fs::copy(at("photos/test/west/0.png"), at("blue/north/0.png")).unwrap();
    few_shot("probe", &flags);
    assert_ne!(measured(), before);

    // `predict` looks at an image as the test did.
    let mut predict = convpass("predict");
    predict.args([
        "--adapter",
        "probe/4shot-seed3",
        "--format",
        "csv",
        "--top",
        "1",
        "photos/test",
    ]);
    let (status, text) = run(predict.current_dir(root.path()));
    assert_eq!(status, Some(0), "{text}");
    let class = |name: &str| all.iter().position(|class| *class == name).unwrap().to_string();
    let rows = text.lines().filter(|line| line.starts_with("photos/test/"));
    let fields = rows.map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
    let right = fields.filter(|row| row[2] == class(row[0].split('/').nth(2).unwrap())).count();
    assert_eq!(100.0 * right as f64 / 12.0, trained.test_top1.unwrap(), "{text}");

    // What does not fit is named.
    let refused = |out: &str, flags: &[&str], part: &str| {
        let (status, text) = few_shot(out, flags);
        assert!(status == Some(1) && text.contains(part), "{text}");
    };
    refused("probe", &[&probe[..4], &["--epochs", "3"]].concat(), "train.epochs: 20, planned is 3");
    refused("x", &["--target", "a=blue", "--target", "a=blue"], "two sets are called a");
    photos(&at("odd"), &["south"], 1, 1);
    fs::rename(at("odd/south"), at("odd/up")).unwrap();
    refused("x", &["--target", "odd=odd"], "found up");
    refused("x", &["--target", "seed=blue"], "seed is what another column");
    refused("x", &["--head", "nowhere"], "--head nowhere");
    refused("x", &["--head", "probe", "--seeds", "5"], "2shot-seed5");
    refused("x", &["--shots", "2"], "there twice");
    refused("x", &["--shots", "6"], "6");
    refused("x", &["--test-resize", "5"], "--test-resize");
    fs::write(at("names.txt"), "one\ntwo\n").unwrap();
    refused("x", &["--classes", "names.txt"], "east");
    let lists = ["--data", "photos/test/some.txt", "--test", "photos/test/some.txt"];
    fs::write(at("names.txt"), "one\n").unwrap();
    refused("x", &[&lists[..], &["--classes", "names.txt"]].concat(), "some.txt");
    assert!(!at("x").exists());
}
