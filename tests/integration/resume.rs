//! A run that was cut off goes on, bit for bit, and never from what is not its own.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::time::Duration;

use convpass::eval::PrefixCache;
use convpass::petl::ConvBypassVariant;
use convpass::train::{
    CosineSchedule, Fit, JsonLog, Observer, RunCheckpoint, RunStart, Selection, Silent, StepReport,
    Stepped, fit_resumable,
};
use convpass::{
    Autocast, ConvBypassConfig, Error, FrozenViT, ImageDataset, Method, Normalization, PetlConfig,
    PetlModel, TrainConfig, fit,
};
use ndarray::Array4;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::child;
use crate::small::small_vit;

/// Three classes of square images by where they are bright, and noise that differs by `salt`.
fn bars(count: usize, side: usize, salt: usize) -> ImageDataset {
    let images = Array4::from_shape_fn((count, side, side, 3), |(n, row, column, channel)| {
        let lit = column * 3 / side == n % 3;
        let noise = ((n * 31 + row * 17 + column * 7 + channel * 3 + salt * 5) % 96) as u8;
        if lit { 120 + noise } else { noise }
    });
    let labels = (0..count).map(|n| (n % 3) as i64).collect();
    ImageDataset::from_arrays(images, labels, 3).unwrap()
}

fn config(epochs: usize, batch_size: usize) -> TrainConfig {
    TrainConfig {
        epochs,
        batch_size,
        schedule: CosineSchedule {
            lr: 1e-2,
            warmup_epochs: 1,
            stepped: Stepped::EachStep,
            ..CosineSchedule::default()
        },
        normalization: Normalization::Half,
        seed: 9,
        ..TrainConfig::default()
    }
}

/// Bypasses in the last of `depth` blocks alone.
fn in_last_block(depth: usize, dropout: f64) -> Method {
    let bypass = ConvBypassConfig { dropout, ..Default::default() };
    let blocks = (0..depth).map(|block| if block + 1 < depth { 0 } else { 8 }).collect();
    Method::ConvBypassVariant(ConvBypassVariant { blocks: Some(blocks), ..bypass.into() })
}

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
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/vit_fashion_mnist.safetensors");
    let backbone = FrozenViT::open(file, Device::Cpu).unwrap();
    let (side, depth) = (backbone.config().image_size.0 as usize, backbone.config().depth as usize);
    let best = Selection::BestOnValidation;
    let bypass = || Method::ConvBypass(ConvBypassConfig::default());
    let prefix = PrefixCache { folder: Some(folder.join("prefix")), bf16: false };
    let (method, drop_path, every, config) = match index {
        0 => (bypass(), 0.3, 3, config(4, 5)),
        // Where drop path leaves out a whole batch, a variable has no gradient in that step.
        1 => (bypass(), 0.95, 1, TrainConfig { selection: best, ..config(2, 1) }),
        2 => (Method::LinearProbe, 0.0, 2, TrainConfig { selection: best, ..config(6, 5) }),
        3 => (
            in_last_block(depth, 0.2),
            0.1,
            2,
            TrainConfig { prefix: Some(prefix), ..config(4, 5) },
        ),
        _ => (Method::BitFit, 0.2, 4, TrainConfig { recompute: true, ..config(4, 5) }),
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

/// What a run reports, but for its times.
fn reports(fit: &Fit) -> String {
    let epochs = fit.epochs.iter().map(|e| (e.epoch, e.lr, e.loss, e.accuracy, e.val_top1));
    format!("{:?} {:?} {}", epochs.collect::<Vec<_>>(), fit.selected_epoch, fit.stopped)
}

const FOLDER: &str = "CONVPASS_TEST_RESUME_IN";
const CASE: &str = "CONVPASS_TEST_RESUME_CASE";

fn start_child(folder: &Path, index: Option<usize>) -> (Child, BufReader<ChildStdout>) {
    let mut command = child::test("resume::a_killed_run_goes_on_bit_for_bit");
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

/// Nothing is drawn in its runs, so that other tests in this process do not disturb them.
fn quiet_model(drop_path: f64) -> PetlModel {
    let backbone = small_vit();
    let config = PetlConfig { seed: 5, drop_path, ..PetlConfig::new(in_last_block(2, 0.0), 3) };
    PetlModel::new(backbone, &config).unwrap()
}

fn weights(model: &PetlModel) -> BTreeMap<String, Tensor> {
    let copy = |(name, weight): (String, Tensor)| (name, weight.detach().copy());
    model.var_store().variables().into_iter().map(copy).collect()
}

/// Ends a run after so many steps and batches of validation, as Ctrl-C does.
struct Stop {
    after: usize,
    /// Steps and seconds of the runs before.
    from: Option<(usize, f64)>,
}

impl Stop {
    fn after(after: usize) -> Self {
        Stop { after, from: None }
    }

    fn count(&mut self) -> ControlFlow<()> {
        self.after = self.after.saturating_sub(1);
        if self.after == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

impl Observer for Stop {
    fn start(&mut self, start: &RunStart) {
        self.from = Some((start.steps_done(), start.seconds));
    }

    fn step(&mut self, _step: &StepReport) -> ControlFlow<()> {
        self.count()
    }

    fn pass(&mut self, _label: &str, _done: usize, _images: usize) -> ControlFlow<()> {
        self.count()
    }
}

#[test]
fn a_run_that_was_ended_goes_on_from_that_step() {
    let (train, val) = (bars(14, 16, 0), bars(9, 16, 1));
    let config = TrainConfig { selection: Selection::BestOnValidation, ..config(3, 4) };
    let mut whole = quiet_model(0.0);
    let expected = fit(&mut whole, &train, Some(&val), &config, &mut Silent).unwrap();
    // An epoch is three steps and three batches of validation, of which the last is the last word.
    for after in (1..18).filter(|after| after % 6 != 0) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let checkpoint = RunCheckpoint { path, every: 1000 };
        let run = |observer: &mut dyn Observer| {
            let mut model = quiet_model(0.0);
            let run = fit_resumable(&mut model, &train, Some(&val), &config, &checkpoint, observer);
            (model, run.unwrap())
        };
        let (_, stopped) = run(&mut Stop::after(after));
        assert!(stopped.stopped);
        let mut rest = Stop::after(usize::MAX);
        let (model, fit) = run(&mut rest);
        let (steps, seconds) = rest.from.unwrap();
        assert_eq!(steps, after / 6 * 3 + (after % 6).min(3), "{after}");
        assert_eq!(weights(&model), weights(&whole), "{after}");
        assert_eq!(reports(&fit), reports(&expected), "{after}");
        assert!(0.0 < seconds && seconds <= stopped.seconds.min(fit.seconds));

        // Once more, where all is done.
        let mut none = Stop::after(1);
        let (model, again) = run(&mut none);
        assert_eq!((none.from.unwrap().0, none.after), (9, 1));
        assert_eq!(weights(&model), weights(&whole));
        assert_eq!(reports(&again), reports(&expected));
    }
}

/// A state in the middle of a run.
struct Interrupted {
    _folder: tempfile::TempDir,
    checkpoint: RunCheckpoint,
    train: ImageDataset,
    val: ImageDataset,
    config: TrainConfig,
}

impl Interrupted {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = RunCheckpoint { path: folder.path().join("run.state"), every: 2 };
        let (train, val) = (bars(14, 16, 0), bars(9, 16, 1));
        let config = TrainConfig { selection: Selection::BestOnValidation, ..config(3, 4) };
        let state = Interrupted { _folder: folder, checkpoint, train, val, config };
        state.go_on(&mut quiet_model(0.0), &mut Stop::after(7)).unwrap();
        state
    }

    fn go_on(&self, model: &mut PetlModel, observer: &mut dyn Observer) -> convpass::Result<Fit> {
        let Interrupted { checkpoint, train, val, config, .. } = self;
        fit_resumable(model, train, Some(val), config, checkpoint, observer)
    }

    fn path(&self) -> &PathBuf {
        &self.checkpoint.path
    }

    /// The error that it is refused with, beside an unchanged model and file.
    fn refused(&self) -> Error {
        let (mut model, file) = (quiet_model(0.0), std::fs::read(self.path()).unwrap());
        let error = self.go_on(&mut model, &mut Silent).unwrap_err();
        assert_eq!(weights(&model), weights(&quiet_model(0.0)));
        assert_eq!(std::fs::read(self.path()).unwrap(), file);
        error
    }
}

#[test]
fn a_state_that_is_cut_off_or_changed_is_refused() {
    let run = Interrupted::new();
    let whole = std::fs::read(run.path()).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let damaged = |bytes: &[u8]| {
        std::fs::write(run.path(), bytes).unwrap();
        let error = run.refused();
        let named = error.to_string().starts_with(&run.path().display().to_string());
        assert!(named, "{error}");
        error
    };
    let lengths = (0..header + 40).step_by(37).chain((header..whole.len()).step_by(4999));
    for length in lengths.chain([whole.len() - 1]) {
        let error = damaged(&whole[..length]);
        let cut = matches!(error, Error::CorruptFile { .. } | Error::UnknownFormat { .. });
        assert!(cut, "{length}: {error}");
    }
    for at in (header..whole.len()).step_by(6007) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        let error = damaged(&bytes);
        assert!(matches!(error, Error::CorruptFile { .. }), "{at}: {error}");
    }
    // Counts that no run comes to, of the same length as the true ones.
    let text = String::from_utf8_lossy(&whole[..header]).into_owned();
    let place = text.find(r#"\"epoch\":1,\"step\":1"#).unwrap();
    for (from, to) in [(r#"epoch\":1"#, r#"epoch\":2"#), (r#"step\":1"#, r#"step\":2"#)] {
        let at = place + text[place..].find(from).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        assert!(matches!(damaged(&bytes), Error::CorruptFile { .. }));
    }
    let adapter = run.path().with_extension("adapter");
    quiet_model(0.0).save_adapter(&adapter).unwrap();
    let error = damaged(&std::fs::read(&adapter).unwrap());
    assert!(matches!(error, Error::UnknownFormat { .. }), "{error}");

    std::fs::write(run.path(), &whole).unwrap();
    run.go_on(&mut quiet_model(0.0), &mut Silent).unwrap();
}

#[test]
fn the_state_of_another_run_is_refused_by_the_field_that_differs() {
    let run = Interrupted::new();
    let expect = |result: convpass::Result<Fit>, field: &str| match result.unwrap_err() {
        Error::OtherRun { file, field: found, expected, found: value } => {
            assert_eq!((found.as_str(), &file), (field, run.path()));
            assert_ne!(expected, value);
        }
        error => panic!("{field}: {error}"),
    };
    let with = |config: TrainConfig| {
        let Interrupted { checkpoint, train, val, .. } = &run;
        let (model, silent) = (&mut quiet_model(0.0), &mut Silent);
        fit_resumable(model, train, Some(val), &config, checkpoint, silent)
    };
    let base = || run.config.clone();
    let schedule = |change: fn(&mut CosineSchedule)| {
        let mut config = base();
        change(&mut config.schedule);
        with(config)
    };
    expect(with(TrainConfig { epochs: 4, ..base() }), "train.epochs");
    expect(with(TrainConfig { batch_size: 5, ..base() }), "train.batch_size");
    expect(schedule(|s| s.lr = 2e-2), "train.schedule.lr");
    expect(schedule(|s| s.min_lr = 1e-6), "train.schedule.min_lr");
    expect(schedule(|s| s.warmup_lr = 1e-5), "train.schedule.warmup_lr");
    expect(schedule(|s| s.warmup_epochs = 2), "train.schedule.warmup_epochs");
    expect(schedule(|s| s.stepped = Stepped::AfterEpoch), "train.schedule.stepped");
    expect(with(TrainConfig { weight_decay: 0.0, ..base() }), "train.weight_decay");
    let normalization = Normalization::Unit;
    expect(with(TrainConfig { normalization, ..base() }), "train.normalization");
    expect(with(TrainConfig { seed: 10, ..base() }), "train.seed");
    let selection = Selection::LastEpoch;
    expect(with(TrainConfig { selection, ..base() }), "train.selection");
    expect(with(TrainConfig { recompute: true, ..base() }), "train.recompute");
    let prefix = Some(PrefixCache::default());
    expect(with(TrainConfig { prefix, ..base() }), "train.prefix");

    let of = |model: &mut PetlModel, train: &ImageDataset, val: Option<&ImageDataset>| {
        fit_resumable(model, train, val, &run.config, &run.checkpoint, &mut Silent)
    };
    let model = || quiet_model(0.0);
    expect(of(&mut quiet_model(0.5), &run.train, Some(&run.val)), "model.drop_path");
    let backbone = FrozenViT::random(model().backbone().config(), 4, Device::Cpu).unwrap();
    let mut beside = PetlModel::new(backbone, model().config()).unwrap();
    expect(of(&mut beside, &run.train, Some(&run.val)), "backbone");
    let petl = PetlConfig { seed: 6, ..model().config().clone() };
    let mut seeded = PetlModel::new(model().backbone().clone(), &petl).unwrap();
    expect(of(&mut seeded, &run.train, Some(&run.val)), "model.seed");
    let started = model();
    let _moved =
        tch::no_grad(|| started.var_store().variables()["head.bias"].shallow_clone().fill_(0.5));
    expect(of(&mut { started }, &run.train, Some(&run.val)), "weights_at_start");
    expect(of(&mut model(), &bars(14, 16, 7), Some(&run.val)), "train_images.split");
    expect(of(&mut model(), &run.train, Some(&bars(9, 16, 7))), "val_images.split");

    {
        let _guard = Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
        expect(run.go_on(&mut model(), &mut Silent), "autocast");
    }

    // And its own is still there.
    run.go_on(&mut model(), &mut Silent).unwrap();
}

#[test]
fn what_a_killed_process_left_is_removed_and_what_cannot_be_is_refused() {
    let run = Interrupted::new();
    let beside = |name: &str| run.path().with_file_name(name);
    std::fs::write(beside(".run.state.aB3xYz.tmp"), "half").unwrap();
    std::fs::write(beside(".other.aB3xYz.tmp"), "another's").unwrap();
    run.go_on(&mut quiet_model(0.0), &mut Silent).unwrap();
    assert!(!beside(".run.state.aB3xYz.tmp").exists() && beside(".other.aB3xYz.tmp").exists());

    let go_on = |path: PathBuf, every| {
        let (model, checkpoint) = (&mut quiet_model(0.0), RunCheckpoint { path, every });
        let Interrupted { train, val, config, .. } = &run;
        fit_resumable(model, train, Some(val), config, &checkpoint, &mut Silent).unwrap_err()
    };
    assert!(matches!(go_on(run.path().clone(), 0), Error::Config { .. }));
    assert!(matches!(go_on(beside("none").join("run.state"), 1), Error::Io { .. }));
    std::fs::create_dir(beside("folder")).unwrap();
    assert!(matches!(go_on(beside("folder"), 1), Error::Io { .. }));
}
