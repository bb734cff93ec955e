//! A run that was cut off goes on, bit for bit, and never from what is not its own.

use std::ops::ControlFlow;
use std::path::PathBuf;

use convpass::data::FileList;
use convpass::eval::PrefixCache;
use convpass::petl::ConvBypassVariant;
use convpass::train::{
    CosineSchedule, Fit, Observer, RunCheckpoint, RunStart, Selection, Silent, StepReport, Stepped,
    fit_resumable,
};
use convpass::{
    Autocast, ConvBypassConfig, Error, FrozenViT, ImageDataset, Method, Normalization, PetlConfig,
    PetlModel, TrainConfig, fit,
};
use ndarray::Array4;
use tch::Kind;

use crate::support::{device, small_vit, train_config, weights};

/// Three classes of square images by where they are bright, and noise that differs by `salt`.
pub fn bars(count: usize, side: usize, salt: usize) -> ImageDataset {
    let images = Array4::from_shape_fn((count, side, side, 3), |(n, row, column, channel)| {
        let lit = column * 3 / side == n % 3;
        let noise = ((n * 31 + row * 17 + column * 7 + channel * 3 + salt * 5) % 96) as u8;
        if lit { 120 + noise } else { noise }
    });
    let labels = (0..count).map(|n| (n % 3) as i64).collect();
    ImageDataset::from_arrays(images, labels, 3).unwrap()
}

/// Bypasses in the last of `depth` blocks alone.
pub fn in_last_block(depth: usize, dropout: f64) -> Method {
    let bypass = ConvBypassConfig { dropout, ..Default::default() };
    let blocks = (0..depth).map(|block| if block + 1 < depth { 0 } else { 8 }).collect();
    Method::ConvBypassVariant(ConvBypassVariant { blocks: Some(blocks), ..bypass.into() })
}

/// What a run reports, but for its times.
pub fn reports(fit: &Fit) -> String {
    let epochs = fit.epochs.iter().map(|e| (e.epoch, e.lr, e.loss, e.accuracy, e.val_top1));
    format!("{:?} {:?} {}", epochs.collect::<Vec<_>>(), fit.selected_epoch, fit.stopped)
}

/// Nothing is drawn in its runs, so that other tests in this process do not disturb them.
fn quiet_model(drop_path: f64) -> PetlModel {
    let backbone = small_vit();
    let config = PetlConfig { seed: 5, drop_path, ..PetlConfig::new(in_last_block(2, 0.0), 3) };
    PetlModel::new(backbone, &config).unwrap()
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
    let config = TrainConfig { selection: Selection::BestOnValidation, ..train_config(3, 4) };
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
        let config = TrainConfig { selection: Selection::BestOnValidation, ..train_config(3, 4) };
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
    expect(with(TrainConfig { head_lr_factor: 5.0, ..base() }), "train.head_lr_factor");
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
    let backbone = FrozenViT::random(model().backbone().config(), 4, device()).unwrap();
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
        let _guard = Autocast::enter(device(), Kind::BFloat16).unwrap();
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

#[test]
fn a_run_does_not_continue_on_images_that_changed_under_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let write = |index: u8, grey: u8| {
        let image = image::RgbImage::from_pixel(16, 16, image::Rgb([grey; 3]));
        image.save(folder.path().join(format!("{index}.png"))).unwrap();
    };
    (0..8).for_each(|index| write(index, 20 * index));
    let lines: String = (0..8).map(|index| format!("{index}.png {}\n", index % 2)).collect();
    let list = folder.path().join("list.txt");
    std::fs::write(&list, lines).unwrap();
    let checkpoint = RunCheckpoint { path: folder.path().join("run.state"), every: 1 };
    let go_on = |observer: &mut dyn Observer| {
        let list = FileList::read(folder.path(), &list, Some(2)).unwrap();
        let train = ImageDataset::load(&list, (16, 16)).unwrap();
        let mut model = quiet_model(0.0);
        fit_resumable(&mut model, &train, None, &train_config(2, 4), &checkpoint, observer)
    };
    assert!(go_on(&mut Stop::after(1)).unwrap().stopped);
    write(3, 7);
    match go_on(&mut Silent).unwrap_err() {
        Error::OtherRun { field, .. } => assert_eq!(field, "train_images.split_pixels"),
        error => panic!("{error}"),
    }
    write(3, 60);
    assert!(!go_on(&mut Silent).unwrap().stopped);
}
