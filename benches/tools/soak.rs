//! Trains, evaluates, saves, loads and swaps adapters in one process for a long time, and fails if memory, open files
//! or threads grow.
//!
//! ```text
//! $ cargo run --release --example soak -- --minutes 60
//! 1.0 min: 46 rounds, 61.932 MB in use, 205.1 MB resident, 6 files, 1 threads
//! ..
//! .. rounds in 60.0 min: .. after the warm-up, .. at the end; in use +.. %, resident +.. %
//! ```
//!
//! The model is the bundled ViT, the images are drawn; half of the evaluations decode them from JPEG files. Memory is
//! what the program has allocated and not freed, at the ends of rounds, and the resident memory, once in a minute after
//! freed memory is given back to the kernel: glibc keeps freed blocks between blocks in use, in another order each time.
//! The medians of the last tenth of the time are compared with those of the second tenth, as the first one is a
//! warm-up. More than 1 % of growth of either is a failure.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use convpass::data::{Resize, bundled};
use convpass::eval::evaluate;
use convpass::petl::{LowBitConfig, VptConfig};
use convpass::train::{CosineSchedule, RunCheckpoint, Silent, fit_resumable};
use convpass::{
    AdapterInfo, FileList, FrozenViT, ImageDataset, LoraConfig, Method, Normalization, PetlConfig,
    PetlModel, TrainConfig,
};
use image::{Rgb, RgbImage};
use tch::{Device, Kind, Tensor};

const CLASSES: usize = 4;
const IMAGES: usize = 24;
const NORMALIZATION: Normalization = Normalization::Half;
/// The growth of resident memory that is a failure, in percent.
const LIMIT: f64 = 1.0;

#[derive(Parser)]
#[command(about = "Looks for growth of memory, open files and threads over a long time")]
struct Args {
    #[arg(long, default_value_t = 60.0)]
    minutes: f64,
    /// libtorch's threads [default: all cores].
    #[arg(long)]
    threads: Option<i32>,
}

/// What the process holds at the end of a round.
#[derive(Clone, Copy, Debug)]
struct Held {
    seconds: f64,
    /// What is allocated and not freed.
    in_use_mb: f64,
    /// `None` in rounds that do not give freed memory back.
    resident_mb: Option<f64>,
    files: usize,
    threads: usize,
}

fn main() -> Result<()> {
    convpass::keep_freed_memory();
    let args = Args::parse();
    ensure!(args.minutes > 0.0 && args.minutes.is_finite(), "--minutes must be above 0");
    if let Some(threads) = args.threads {
        tch::set_num_threads(threads);
    }
    let folder = tempfile::tempdir().context("a temporary folder")?;
    let soak = Soak::new(folder.path())?;
    let (start, end) = (Instant::now(), 60.0 * args.minutes);
    // One element a round must not count as growth.
    let mut held: Vec<Held> = Vec::with_capacity(1 << 17);
    let mut minutes = 0;
    while start.elapsed().as_secs_f64() < end {
        soak.round(held.len())?;
        // Often enough for a short run too.
        let is_told =
            start.elapsed().as_secs_f64() >= f64::from(minutes + 1) * end.min(3600.0) / 60.0;
        let now = Held::now(start.elapsed(), is_told)?;
        held.push(now);
        if is_told {
            minutes += 1;
            println!("{:.1} min: {} rounds, {now}", now.seconds / 60.0, held.len());
        }
    }
    report(&held, end)
}

/// Compares the last tenth of the time with the tenth that follows the warm-up.
fn report(held: &[Held], end: f64) -> Result<()> {
    let tenth = end / 10.0;
    let within = |from: f64, to: f64| {
        held.iter().copied().filter(move |held| held.seconds >= from && held.seconds < to)
    };
    let before = Held::usual(within(tenth, 2.0 * tenth)).context("no round after the warm-up")?;
    let after = Held::usual(within(end - tenth, f64::MAX)).context("no round at the end")?;
    let growth = |before: f64, after: f64| 100.0 * (after / before - 1.0);
    let in_use = growth(before.in_use_mb, after.in_use_mb);
    let resident = before.resident_mb.zip(after.resident_mb);
    let resident = resident.map(|(before, after)| growth(before, after));
    let resident = resident.context("too short a time to look at resident memory")?;
    println!(
        "{} rounds in {:.1} min: {before} after the warm-up, {after} at the end; in use {in_use:+.2} %, \
         resident {resident:+.2} %",
        held.len(),
        end / 60.0
    );
    for (what, growth) in [("memory in use", in_use), ("resident memory", resident)] {
        ensure!(growth <= LIMIT, "{what} grew by {growth:.2} %, more than {LIMIT} %");
    }
    ensure!(after.files <= before.files, "{} open files, {} before", after.files, before.files);
    ensure!(
        after.threads <= before.threads,
        "{} threads, {} before",
        after.threads,
        before.threads
    );
    Ok(())
}

struct Soak {
    folder: PathBuf,
    weights: PathBuf,
    images: ImageDataset,
    streamed: ImageDataset,
    probe: Tensor,
}

impl Soak {
    fn new(folder: &Path) -> Result<Self> {
        let weights = folder.join("vit.safetensors");
        bundled::write_backbone(&weights)?;
        let size = FrozenViT::open(&weights, Device::Cpu)?.config().image_size;
        let list = write_images(folder)?;
        let probe = Tensor::linspace(-1.0, 1.0, 3 * size.0 * size.1, (Kind::Float, Device::Cpu));
        Ok(Soak {
            folder: folder.to_path_buf(),
            weights,
            images: ImageDataset::load(&list, size)?,
            streamed: ImageDataset::stream(&list, Resize::bicubic(size)?),
            probe: probe.view([1, 3, size.0, size.1]),
        })
    }

    /// One run of a method, from opening the backbone to a swap of its adapter for a new one.
    fn round(&self, round: usize) -> Result<()> {
        let bypass = || Method::ConvBypass(Default::default());
        let method = match round % 5 {
            0 => bypass(),
            1 => Method::Lora(LoraConfig::default()),
            2 => Method::Vpt(VptConfig::default()),
            3 => Method::LowBit(LowBitConfig { bits: 2, method: Box::new(bypass()) }),
            _ => Method::BitFit,
        };
        let backbone = FrozenViT::open(&self.weights, Device::Cpu)?;
        let seed = round as i64;
        let config = PetlConfig { seed, ..PetlConfig::new(method, CLASSES as i64) };
        let mut model = PetlModel::new(backbone.clone(), &config)?;
        let fresh = self.folder.join("fresh.safetensors");
        model.save_adapter(&fresh)?;
        let untrained = self.logits(&model)?;

        let state = self.folder.join("state");
        self.train(&mut model, &state, seed)?;
        let set = if round.is_multiple_of(2) { &self.images } else { &self.streamed };
        evaluate(&model, set, NORMALIZATION, 8, &mut |_, _| ControlFlow::Continue(()))?;
        let trained = self.folder.join("trained.safetensors");
        model.save_adapter(&trained)?;

        let mut loaded = PetlModel::load_adapter(backbone, &trained)?;
        ensure!(self.logits(&loaded)? == self.logits(&model)?, "what was saved is not what loads");
        loaded.load_weights(&fresh)?;
        ensure!(self.logits(&loaded)? == untrained, "the swapped adapter is not the saved one");
        ensure!(AdapterInfo::read(&trained)?.config.seed == seed, "the metadata is another");
        std::fs::remove_file(&state).context("the state of the run")
    }

    fn train(&self, model: &mut PetlModel, state: &Path, seed: i64) -> Result<()> {
        let schedule = CosineSchedule { warmup_epochs: 0, ..CosineSchedule::default() };
        let train = TrainConfig {
            epochs: 1,
            batch_size: 8,
            schedule,
            normalization: NORMALIZATION,
            seed,
            ..TrainConfig::default()
        };
        let checkpoint = RunCheckpoint { path: state.to_path_buf(), every: 1 };
        fit_resumable(model, &self.images, None, &train, &checkpoint, &mut Silent)?;
        Ok(())
    }

    fn logits(&self, model: &PetlModel) -> Result<Tensor> {
        Ok(tch::no_grad(|| model.forward(&self.probe, false))?)
    }
}

/// Writes images with bars by their class.
fn write_images(folder: &Path) -> Result<FileList> {
    let mut lines = String::new();
    for index in 0..IMAGES {
        let class = index % CLASSES;
        let image = RgbImage::from_fn(64, 48, |x, y| {
            let lit = if x as usize * CLASSES / 64 == class { 120 } else { 0 };
            let noise = (index as u32 * 31 + x * 7 + y * 17) % 96;
            Rgb([lit + noise as u8, noise as u8, lit])
        });
        image.save(folder.join(format!("{index}.jpg")))?;
        lines += &format!("{index}.jpg {class}\n");
    }
    let file = folder.join("list.txt");
    std::fs::write(&file, lines)?;
    Ok(FileList::read(folder, &file, Some(CLASSES as i64))?)
}

impl Held {
    fn now(since: Duration, gives_back: bool) -> Result<Self> {
        let count = |folder: &str| -> Result<usize> {
            Ok(std::fs::read_dir(folder).with_context(|| folder.to_owned())?.count())
        };
        Ok(Held {
            seconds: since.as_secs_f64(),
            in_use_mb: in_use() as f64 / 1e6,
            resident_mb: if gives_back { Some(resident_mb()?) } else { None },
            files: count("/proc/self/fd")?,
            threads: count("/proc/self/task")?,
        })
    }

    /// Returns the medians of memory, and the most open files and threads.
    fn usual(rounds: impl Iterator<Item = Held>) -> Option<Held> {
        let rounds: Vec<Held> = rounds.collect();
        let most = |of: fn(&Held) -> usize| rounds.iter().map(of).max().unwrap_or_default();
        Some(Held {
            in_use_mb: median(rounds.iter().map(|held| held.in_use_mb).collect())?,
            resident_mb: median(rounds.iter().filter_map(|held| held.resident_mb).collect()),
            files: most(|held| held.files),
            threads: most(|held| held.threads),
            ..*rounds.last()?
        })
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Gives freed memory back to the kernel and returns the resident memory.
fn resident_mb() -> Result<f64> {
    give_back();
    let statm = std::fs::read_to_string("/proc/self/statm").context("/proc/self/statm")?;
    let pages: f64 = statm.split(' ').nth(1).context("/proc/self/statm")?.parse()?;
    Ok(pages * 4096.0 / 1e6)
}

#[allow(unsafe_code)]
fn give_back() {
    // SAFETY: the call may be made at any time, from any thread.
    let _given = unsafe { libc::malloc_trim(0) };
}

/// Returns the bytes that are allocated and not freed.
#[allow(unsafe_code)]
fn in_use() -> usize {
    // SAFETY: as above.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Held { in_use_mb, resident_mb, files, threads, .. } = self;
        write!(f, "{in_use_mb:.3} MB in use, ")?;
        if let Some(resident) = resident_mb {
            write!(f, "{resident:.1} MB resident, ")?;
        }
        write!(f, "{files} files, {threads} threads")
    }
}
