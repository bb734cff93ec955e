//! Learning rates that are chosen without validation images, and the vote of an ensemble.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use convpass::data::{
    BatchConfig, Batches, FileList, ImageDataset, Order, Orientation, PartialBatch, Resize,
};
use convpass::train::RunRecord;
use convpass::{AnyBackbone, Normalization, PetlModel};
use tch::Device;

use crate::few_shot::Corners;
use crate::process::{BACKBONE, convpass, photos, run};

const ENSEMBLE: [&str; 2] = ["--select", "ensemble"];
const CROSS_VALIDATION: [&str; 2] = ["--select", "cross-validation"];
/// One draw, and a method that is trained in seconds.
const ONE: [&str; 14] = [
    "--shots",
    "4",
    "--seeds",
    "0",
    "--method",
    "bitfit",
    "--augment",
    "none",
    "--epochs",
    "2",
    "--warmup-epochs",
    "0",
    "--threads",
    "1",
];
/// Its grid has three pairs of rates.
const PROBE: [&str; 2] = ["--method", "linear"];
const RATES: [&str; 4] = ["--lr", "1e-2", "--head-lr", "5e-2"];

fn flags<'a>(parts: &[&[&'a str]]) -> Vec<&'a str> {
    parts.concat()
}

/// The class that an adapter predicts for each image, from the disk and by plain loops.
fn predicted(adapter: &Path, list: &FileList) -> Vec<usize> {
    tch::set_num_threads(1);
    let backbone = AnyBackbone::open(BACKBONE, Device::Cpu).unwrap();
    let model = PetlModel::load_adapter(backbone, adapter).unwrap();
    let resize = Resize::center_crop(36, (32, 32)).unwrap().with_orientation(Orientation::Exif);
    let images = ImageDataset::load_resized(list, resize).unwrap();
    let config = BatchConfig {
        batch_size: 3,
        partial: PartialBatch::Keep,
        order: Order::Sequential,
        normalization: Normalization::Half,
        device: Device::Cpu,
    };
    let mut classes = Vec::new();
    for batch in Batches::new(&images, config).unwrap() {
        let logits = tch::no_grad(|| model.forward(&batch.unwrap().0, false).unwrap());
        for row in Vec::<Vec<f32>>::try_from(&logits).unwrap() {
            let mut best = 0usize;
            for (class, logit) in row.iter().enumerate() {
                best = if *logit > row[best] { class } else { best };
            }
            classes.push(best);
        }
    }
    classes
}

/// A row of votes.csv: set, label and answer, and the classes of the members.
fn votes(file: &Path, set: &str) -> (Vec<String>, Vec<Vec<usize>>) {
    let text = fs::read_to_string(file).unwrap();
    let mut lines = text.lines();
    // The names of the members have a comma, so that they are in quotes.
    let head = lines.next().unwrap();
    let members: Vec<_> = head.split('"').skip(1).step_by(2).map(str::to_owned).collect();
    let rows = lines.filter(|line| line.starts_with(&format!("{set},")));
    let number = |text: &str| text.parse::<usize>().unwrap();
    (members, rows.map(|line| line.split(',').skip(2).map(number).collect()).collect())
}

/// Sorts, counts and takes the first of the most frequent classes.
fn most_frequent(classes: &[usize]) -> usize {
    let count = |class: usize| classes.iter().filter(|other| **other == class).count();
    let most = (0..4).map(count).max().unwrap();
    (0..4).find(|class| count(*class) == most).unwrap()
}

fn json(file: PathBuf) -> serde_json::Value {
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

/// The files below a folder whose names end so, with their content.
fn contents(folder: &Path, ending: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in walkdir::WalkDir::new(folder) {
        let path = entry.unwrap().into_path();
        if path.to_string_lossy().ends_with(ending) {
            let content = fs::read(&path).unwrap();
            found.insert(path, content);
        }
    }
    found
}

#[test]
fn an_ensemble_answers_what_its_members_say() {
    let corners = Corners::new();
    let target = ["--target", "some=photos/test/some.txt:some-classes.txt"];
    let text = corners.trained("out", &flags(&[&ONE, &RATES, &ENSEMBLE, &target]));
    let run = corners.at("out/4shot-seed0");
    let record = json(run.join("ensemble.json"));
    assert_eq!((&record["select"], &record["shots"]), (&"ensemble".into(), &4.into()));
    let members = record["members"].as_array().unwrap();
    let rates: Vec<_> =
        members.iter().map(|m| [&m["lr"], &m["head_lr"]].map(|r| r.as_f64().unwrap())).collect();
    let grid = [2e-3, 1e-2, 5e-2].map(|lr| [1e-2, 5e-2, 2.5e-1].map(|head_lr| [lr, head_lr]));
    assert_eq!(rates, grid.concat());

    let (test, some) = (corners.at("photos/test"), corners.at("photos/test/some.txt"));
    let test = FileList::from_folders(test).unwrap();
    let some = FileList::read(corners.at("photos/test"), some, None).unwrap();
    let adapter = |folder: &str| run.join("members").join(folder).join("adapter.safetensors");
    let (names, rows) = votes(&run.join("votes.csv"), "test");
    assert_eq!((names.len(), rows.len()), (9, 12));
    let by_hand: Vec<_> = names.iter().map(|name| predicted(&adapter(name), &test)).collect();
    let mut right = 0;
    for (image, row) in rows.iter().enumerate() {
        let of_members: Vec<usize> = by_hand.iter().map(|classes| classes[image]).collect();
        assert_eq!(row[2..], of_members, "image {image}");
        assert_eq!(row[0], test.entries()[image].label as usize);
        assert_eq!(row[1], most_frequent(&of_members), "image {image}");
        right += usize::from(row[0] == row[1]);
    }
    assert!(by_hand.iter().any(|classes| *classes != by_hand[0]), "the members are not all equal");
    let top1 = 100.0 * right as f64 / 12.0;
    assert_eq!(record["test_top1"].as_f64(), Some(top1));
    assert!(text.contains(&format!("top-1 of the vote {top1:.2} %")), "{text}");
    let csv = fs::read_to_string(corners.at("out/results.csv")).unwrap();
    assert!(csv.starts_with("shots,seed,images,test_top1,some\n4,0,16,"), "{csv}");

    // The set has the classes west and east of the model, in this order.
    let (_, rows) = votes(&run.join("votes.csv"), "some");
    assert_eq!(rows.iter().map(|row| row[0]).collect::<Vec<_>>(), [3, 0]);
    assert!(rows.iter().flat_map(|row| &row[1..]).all(|class| [0, 3].contains(class)), "{rows:?}");
    assert_eq!(some.entries().len(), rows.len());

    a_member_is_the_run_with_its_rates(&corners, &adapter("lr=0.002,head_lr=0.25"));
    what_is_done_is_not_done_again(&corners);
    an_ensemble_is_no_adapter(&corners);
    another_run_is_not_overwritten(&corners);
}

fn a_member_is_the_run_with_its_rates(corners: &Corners, member: &Path) {
    corners.trained("one", &flags(&[&ONE, &["--lr", "2e-3", "--head-lr", "2.5e-1"]]));
    let one = fs::read(corners.at("one/4shot-seed0/adapter.safetensors")).unwrap();
    assert_eq!(one, fs::read(member).unwrap());
    assert_eq!(corners.record("one/4shot-seed0").train.head_lr_factor, 125.0);
}

fn what_is_done_is_not_done_again(corners: &Corners) {
    let run = corners.at("out/4shot-seed0");
    let logs = contents(&run, "log.jsonl");
    assert_eq!(logs.len(), 9);
    let before = votes(&run.join("votes.csv"), "test");
    let text =
        corners.trained("out", &flags(&[&ONE, &RATES, &ENSEMBLE, &["--target", "blue=blue"]]));
    assert!(text.contains("done before") && text.contains("blue "), "{text}");
    assert_eq!(contents(&run, "log.jsonl"), logs);
    assert_eq!(votes(&run.join("votes.csv"), "test"), before);
    assert_eq!(votes(&run.join("votes.csv"), "blue").1.len(), 8);
}

fn an_ensemble_is_no_adapter(corners: &Corners) {
    let mut predict = convpass("predict");
    predict.arg("--adapter").arg(corners.at("out/4shot-seed0")).arg(corners.at("blue"));
    let (status, text) = run(&mut predict);
    assert!(status == Some(1) && text.contains("holds an ensemble; give the folder"), "{text}");
}

fn another_run_is_not_overwritten(corners: &Corners) {
    let part = "holds another run (an ensemble)";
    corners.refused("out", &flags(&[&ONE, &RATES]), part);
    corners.refused("out", &flags(&[&ONE, &RATES, &CROSS_VALIDATION]), part);
    corners.refused("one", &flags(&[&ONE, &RATES, &ENSEMBLE]), "holds another run (one model)");
    let part = "holds another run (with given learning rates)";
    corners.refused("one", &flags(&[&ONE, &RATES, &CROSS_VALIDATION]), part);
    let part = "holds another run (an ensemble of other learning rates)";
    corners.refused("out", &flags(&[&ONE, &RATES, &ENSEMBLE, &["--lr", "1e-3"]]), part);
    let part = "was measured on other test images";
    let test = ["--test", "photos/train"];
    corners.refused("out", &flags(&[&ONE, &RATES, &ENSEMBLE, &test]), part);
    let part = "train.epochs: 2, planned is 1";
    corners.refused("out", &flags(&[&ONE, &RATES, &ENSEMBLE, &["--epochs", "1"]]), part);
    corners.trained("out", &flags(&[&ONE, &RATES, &["--force"]]));
    let run = corners.at("out/4shot-seed0");
    assert!(run.join("run.json").exists() && !run.join("ensemble.json").exists());
    assert!(!run.join("members").exists() && !run.join("votes.csv").exists());
}

#[test]
fn cross_validation_chooses_what_is_right_most_often_on_held_out_shots() {
    let corners = Corners::new();
    let text =
        corners.trained("out", &flags(&[&ONE, &RATES, &CROSS_VALIDATION, &["--folds", "2"]]));
    let run = corners.at("out/4shot-seed0");
    let record = corners.record("out/4shot-seed0");
    let found = record.cross_validation.as_ref().unwrap();
    assert_eq!((found.folds, found.tried.len()), (2, 9));

    let shots = FileList::read(corners.at("photos/train"), run.join("train.txt"), None).unwrap();
    for tried in &found.tried {
        let trial = run.join(format!("trials/lr={},head_lr={}", tried.lr, tried.head_lr));
        let mut right = 0;
        let mut held_out = Vec::new();
        for fold in ["fold-0", "fold-1"] {
            let fold = trial.join(fold);
            let trained = fs::read_to_string(fold.join("train.txt")).unwrap();
            let rest: String = fs::read_to_string(run.join("train.txt"))
                .unwrap()
                .lines()
                .filter(|line| !trained.lines().any(|other| other == *line))
                .map(|line| format!("{line}\n"))
                .collect();
            let file = corners.at("held-out.txt");
            fs::write(&file, &rest).unwrap();
            let list = FileList::read(corners.at("photos/train"), file, None).unwrap();
            assert_eq!(list.class_counts(), [2; 4]);
            let classes = predicted(&fold.join("adapter.safetensors"), &list);
            let pairs = classes.iter().zip(list.entries());
            right += pairs.filter(|(class, entry)| **class as i64 == entry.label).count();
            held_out.extend(rest.lines().map(str::to_owned));
            let record = RunRecord::load(fold.join("run.json")).unwrap();
            assert_eq!((record.test_split, record.test_top1), (None, None));
        }
        held_out.sort_unstable();
        held_out.dedup();
        assert_eq!(held_out.len(), shots.entries().len(), "each shot is held out once");
        assert_eq!((tried.correct, tried.images), (Some(right), 16));
    }
    // The first of the best.
    let most = found.tried.iter().map(|tried| tried.correct).max().unwrap();
    let best = found.tried.iter().find(|tried| tried.correct == most).unwrap();
    assert_eq!(record.train.schedule.lr, best.lr);
    assert_eq!(record.train.head_lr_factor, best.head_lr / best.lr);
    assert!(text.contains(&format!("chosen lr={}, head_lr={}", best.lr, best.head_lr)), "{text}");
    // The adapter is that of the chosen rates on all shots.
    let rates = [best.lr, best.head_lr].map(|rate| rate.to_string());
    corners.trained("one", &flags(&[&ONE, &["--lr", &rates[0], "--head-lr", &rates[1]]]));
    let adapter = |out: &str| fs::read(corners.at(out).join("adapter.safetensors")).unwrap();
    assert!(adapter("one/4shot-seed0") == adapter("out/4shot-seed0"));

    let logs = contents(&run, "log.jsonl");
    let again =
        corners.trained("out", &flags(&[&ONE, &RATES, &CROSS_VALIDATION, &["--folds", "2"]]));
    assert!(again.contains("done before") && contents(&run, "log.jsonl") == logs, "{again}");
    what_cannot_be_cross_validated_is_named(&corners);
}

fn what_cannot_be_cross_validated_is_named(corners: &Corners) {
    let base = flags(&[&ONE, &RATES, &CROSS_VALIDATION]);
    for (more, status, part) in [
        (&["--shots", "1"][..], 1, "class east has 1 images, but 2 are needed"),
        (&["--folds", "5"], 1, "class east"),
        (&["--folds", "1"], 1, "count must be 2 folds or more"),
        (&["--lr", "0"], 2, "need --lr and --head-lr above 0"),
        (&["--select", "fixed", "--folds", "2"], 2, "--folds needs --select cross-validation"),
    ] {
        let (found, text) = corners.few_shot("x", &flags(&[&base, more]));
        assert!(found == Some(status) && text.contains(part), "{more:?}: {text}");
    }
    assert!(!corners.at("x").exists());
}

/// A linear probe whose rates are stable with this weight decay, but for the highest.
const ONE_DIVERGES: [&str; 20] = [
    "--method",
    "linear",
    "--augment",
    "none",
    "--shots",
    "4",
    "--seeds",
    "0",
    "--lr",
    "1e-3",
    "--head-lr",
    "1e-3",
    "--epochs",
    "200",
    "--warmup-epochs",
    "0",
    "--weight-decay",
    "1000",
    "--threads",
    "1",
];

#[test]
fn what_diverges_is_left_out_and_is_an_error_if_nothing_is_left() {
    let corners = Corners::new();
    let ensemble = flags(&[&ONE_DIVERGES, &ENSEMBLE]);
    let told = "the member lr=0.001, head_lr=0.005 is left out";
    let text = corners.trained("out", &ensemble);
    assert!(text.contains(told), "{text}");
    let run = corners.at("out/4shot-seed0");
    let record = json(run.join("ensemble.json"));
    let members = record["members"].as_array().unwrap();
    assert_eq!(members.len(), 3, "a linear probe has the rates of the head alone");
    assert!(members[0]["adapter_digest"].is_string() && members[0]["diverged"].is_null());
    assert!(members[2]["adapter_digest"].is_null() && members[2]["diverged"].is_string());
    assert_eq!(votes(&run.join("votes.csv"), "test").0.len(), 2);
    // It is not trained again, and is told of again.
    let logs = contents(&run, "log.jsonl");
    assert!(corners.trained("out", &ensemble).contains(told));
    assert_eq!(contents(&run, "log.jsonl"), logs);

    corners.trained("chosen", &flags(&[&ONE_DIVERGES, &CROSS_VALIDATION]));
    let record = corners.record("chosen/4shot-seed0");
    let tried = record.cross_validation.unwrap().tried;
    assert_eq!(tried.iter().map(|t| t.correct.is_some()).collect::<Vec<_>>(), [true, true, false]);
    for select in [ENSEMBLE, CROSS_VALIDATION] {
        let (status, text) =
            corners.few_shot("none", &flags(&[&ONE_DIVERGES, &select, &["--weight-decay", "1e5"]]));
        let part = "all 3 learning rates that were tried diverged; the first: ";
        assert!(status == Some(3) && text.contains(part), "{text}");
        assert!(!corners.at("none/4shot-seed0/run.json").exists());
        assert!(!corners.at("none/4shot-seed0/ensemble.json").exists());
        fs::remove_dir_all(corners.at("none")).unwrap();
    }
}

/// The headers of the test images can be read, as before every run, and no image can be decoded.
#[test]
fn selection_decodes_no_test_image() {
    // Four folds of three pairs of rates and the model that was chosen, or three members.
    for (select, adapters) in [(CROSS_VALIDATION, 4 * 3 + 1), (ENSEMBLE, 3)] {
        let (corners, whole) = (Corners::new(), Corners::new());
        let settings = flags(&[&ONE, &RATES, &PROBE, &select, &["--target", "blue=blue"]]);
        whole.trained("out", &settings);
        for folder in ["photos/test", "blue"] {
            for (path, bytes) in contents(&corners.at(folder), ".png") {
                fs::write(path, &bytes[..60]).unwrap();
            }
        }
        let (status, text) = corners.few_shot("out", &settings);
        assert!(status == Some(1) && text.contains("photos/test/east/0.png"), "{text}");
        let run = corners.at("out/4shot-seed0");
        let trained = contents(&run, "adapter.safetensors");
        assert_eq!(trained.len(), adapters, "{text}");
        photos(&corners.at("photos/test"), &["east", "north", "south", "west"], 3, 0);
        photos(&corners.at("blue"), &["south", "north"], 4, 2);
        corners.trained("out", &settings);
        assert!(contents(&run, "adapter.safetensors") == trained);
        let results = |corners: &Corners| fs::read(corners.at("out/results.csv")).unwrap();
        assert_eq!(results(&corners), results(&whole));
    }
}
