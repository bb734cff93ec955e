//! Classifies images with an adapter: a line for each image, as text, JSON or CSV.
//!
//! ```text
//! cargo run --release --example predict -- --adapter runs/pets/adapter.safetensors --classes pets.txt photos/ cat.jpg
//! find / -name '*.jpg' | cargo run --release --example predict -- --adapter runs/pets --format csv -
//! ```
//!
//! ```text
//! photos/rex.jpg  beagle 0.9712  basset 0.0201  boxer 0.0031
//! ```
//!
//! Images are files, folders (every `.jpg`, `.jpeg` and `.png` below them, by name) and `-` for a list on standard
//! input, a path a line. The backbone, the normalization and the image size are those of the `run.json` beside the
//! adapter, unless a flag says otherwise, and an image is squeezed or its centre taken as that run's test images were;
//! what counts is said on standard error. An image that cannot be read is named there too, the others are classified, and
//! the exit status is 1.

#[path = "shared/backbone.rs"]
mod backbone;
#[path = "predict/decode_ahead.rs"]
mod decode_ahead;
#[path = "shared/failure.rs"]
mod failure;
#[path = "predict/output.rs"]
mod output;
#[path = "shared/precision.rs"]
mod precision;

use std::io::{self, BufWriter};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use convpass::{Backbone, Normalization, PetlModel, Resize, RunRecord};
use tch::{Kind, Tensor};

use backbone::{Opened, Processor, Source, Untold, Visit};
use decode_ahead::{Decoded, decode_ahead};
use output::{Format, Prediction, Writer};
use precision::Precision;

/// Batches that are decoded while the model computes.
const BATCHES_AHEAD: usize = 2;

/// Classifies images with an adapter.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The adapter's file, or the folder of its run.
    #[arg(long)]
    adapter: PathBuf,
    /// The backbone's file [default: the one that the run names].
    #[arg(long)]
    backbone: Option<PathBuf>,
    /// Names of the classes, a line each, label 0 first [default: their numbers].
    #[arg(long)]
    classes: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// How many classes are said of each image, the most probable first.
    #[arg(long, default_value = "3")]
    top: NonZeroUsize,
    /// imagenet, half, unit or clip [default: the run's].
    #[arg(long)]
    normalization: Option<Normalization>,
    /// How the frozen backbone is kept and computed with [default: the run's, else f32].
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    #[command(flatten)]
    untold: Untold,
    #[arg(long, default_value = "32")]
    batch_size: NonZeroUsize,
    /// cpu or cuda.
    #[arg(long, value_enum, default_value_t = Processor::Cpu)]
    device: Processor,
    /// Threads that decode, beside libtorch's own [default: one a core].
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Files, folders, or - for a list on standard input.
    #[arg(required = true, value_name = "IMAGES")]
    images: Vec<PathBuf>,
}

fn main() -> ExitCode {
    convpass::keep_freed_memory();
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => failure::report(&error),
    }
}

/// Whether every image was classified.
fn run(args: &Args) -> Result<bool> {
    let adapter = match args.adapter.is_dir() {
        true => args.adapter.join("adapter.safetensors"),
        false => args.adapter.clone(),
    };
    let beside = adapter.with_file_name("run.json");
    let record = match beside.exists() {
        true => Some(RunRecord::load(&beside)?),
        false => None,
    };
    let Some(file) = args.backbone.clone().or(record.as_ref().map(|r| r.backbone.clone().into()))
    else {
        bail!("--backbone is needed: there is no {}", beside.display());
    };
    // Images that are not square have the size that the backbone's file tells.
    let side = record.as_ref().and_then(|record| record.image_size);
    let side = side.filter(|(rows, columns)| rows == columns).map(|(rows, _)| rows);
    let precision = match (args.precision, &record) {
        (Some(precision), _) => precision,
        (None, Some(record)) => Precision::of(record)?,
        (None, None) => Precision::F32,
    };
    let source = Source {
        file: &file,
        untold: Untold { image_size: args.untold.image_size.or(side), ..args.untold },
        processor: args.device,
        precision,
    };
    let _guard = precision.guard(args.device.device()?)?;
    source.open(Predict { args, adapter: &adapter, beside: &beside, record: record.as_ref() })
}

struct Predict<'a> {
    args: &'a Args,
    adapter: &'a Path,
    /// Where the run's record is, or would be.
    beside: &'a Path,
    record: Option<&'a RunRecord>,
}

impl Visit for Predict<'_> {
    type Output = bool;

    fn visit<B: Backbone>(self, opened: Opened<B>) -> Result<bool> {
        let args = self.args;
        let normalization = self.normalization(opened.normalization)?;
        self.say_size(opened.image_size);
        let resize = match self.record {
            Some(record) => record.test_resize(opened.image_size)?,
            None => Resize::bicubic(opened.image_size)?,
        };
        let model = PetlModel::load_adapter(opened.backbone, self.adapter)?;
        let classes = self.classes(model.config().num_classes)?;
        let batch_size = args.batch_size.get();
        let images = decode_ahead(
            args.images.clone(),
            resize,
            args.threads.map_or_else(std::thread::available_parallelism, Ok)?,
            BATCHES_AHEAD.saturating_mul(batch_size),
        )?;
        let mut writer = Writer::new(args.format, BufWriter::new(io::stdout().lock()), classes);
        let mut batches = Batches { images, size: batch_size, all_read: true };
        let written = batches.classify(&model, opened.image_size, normalization, args, &mut writer);
        match written.and_then(|()| Ok(writer.finish()?)) {
            Err(error) if is_broken_pipe(&error) => Ok(batches.all_read),
            Err(error) => Err(error),
            Ok(0) if batches.all_read => bail!("there is no image to classify"),
            Ok(_) => Ok(batches.all_read),
        }
    }
}

impl Predict<'_> {
    /// The flag's or the run's; a wrong one changes every probability, so none is guessed.
    fn normalization(&self, by_family: Normalization) -> Result<Normalization> {
        let recorded = self.record.map(|record| record.train.normalization);
        let beside = self.beside.display();
        match (self.args.normalization, recorded) {
            (Some(flag), Some(recorded)) if flag != recorded => {
                eprintln!("normalization: {flag} by flag, where {beside} says {recorded}");
                Ok(flag)
            }
            (_, Some(recorded)) => {
                eprintln!("normalization: {recorded}, from {beside}");
                Ok(recorded)
            }
            (Some(flag), None) => {
                eprintln!("normalization: {flag}, by flag");
                Ok(flag)
            }
            (None, None) => bail!(
                "--normalization is needed ({by_family} is usual for this family): there is no {beside}"
            ),
        }
    }

    fn say_size(&self, (rows, columns): (i64, i64)) {
        let origin = match (self.args.untold.image_size, self.record.and_then(|r| r.image_size)) {
            (Some(_), _) => "by flag".to_owned(),
            (None, Some(size)) if size == (rows, columns) => {
                format!("from {}", self.beside.display())
            }
            _ => "from the backbone".to_owned(),
        };
        let centre = self.record.and_then(|record| record.test_shorter_side);
        let centre = centre.map_or("", |_| ", the centre of what keeps its aspect ratio");
        eprintln!("images: {rows} x {columns}, {origin}{centre}");
    }

    /// A name for each class.
    fn classes(&self, count: i64) -> Result<Vec<String>> {
        let Some(file) = &self.args.classes else {
            return Ok((0..count).map(|label| label.to_string()).collect());
        };
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let text = text.trim_start_matches('\u{feff}').trim_end();
        let names: Vec<String> = text.lines().map(|name| name.trim().to_owned()).collect();
        if names.len() as i64 != count {
            let (file, found) = (file.display(), names.len());
            bail!(
                "{file}: expected {count} lines, one for each class of the adapter, found {found}"
            );
        }
        Ok(names)
    }
}

/// The images that can be read, in batches.
struct Batches<I> {
    images: I,
    size: usize,
    /// Whether none was left out so far.
    all_read: bool,
}

impl<I: Iterator<Item = Decoded>> Batches<I> {
    fn classify<B: Backbone>(
        &mut self,
        model: &PetlModel<B>,
        (rows, columns): (i64, i64),
        normalization: Normalization,
        args: &Args,
        writer: &mut Writer<impl io::Write>,
    ) -> Result<()> {
        let device = args.device.device()?;
        loop {
            let (paths, pixels) = self.next();
            if paths.is_empty() {
                return Ok(());
            }
            let images = Tensor::f_from_slice(&pixels)?
                .f_view([paths.len() as i64, rows, columns, 3])?
                .f_to_device(device)?;
            let images = normalization.normalize(&images)?;
            let logits = tch::no_grad(|| model.forward(&images, false))?;
            for (path, predictions) in paths.iter().zip(top(&logits, args.top.get())?) {
                writer.write(path, &predictions)?;
            }
            writer.flush()?;
        }
    }

    /// The next images that can be read, and their pixels; the others are named.
    fn next(&mut self) -> (Vec<PathBuf>, Vec<u8>) {
        let (mut paths, mut pixels) = (Vec::new(), Vec::new());
        while paths.len() < self.size
            && let Some((path, decoded)) = self.images.next()
        {
            match decoded {
                Ok(image) => {
                    pixels.extend(image);
                    paths.push(path);
                }
                Err(reason) => {
                    eprintln!("{reason}");
                    self.all_read = false;
                }
            }
        }
        (paths, pixels)
    }
}

/// The most probable classes of each row of logits `[B, K]`, the first first.
fn top(logits: &Tensor, count: usize) -> Result<Vec<Vec<Prediction>>> {
    let count = logits.size()[1].min(i64::try_from(count)?);
    let probabilities = logits.f_softmax(-1, Kind::Float)?;
    let (values, labels) = probabilities.f_topk(count, -1, true, true)?;
    let values: Vec<f32> = values.f_reshape([-1])?.try_into()?;
    let labels: Vec<i64> = labels.f_reshape([-1])?.try_into()?;
    let pairs: Vec<_> = labels
        .into_iter()
        .zip(values)
        .map(|(label, probability)| Prediction { label: label as usize, probability })
        .collect();
    Ok(pairs.chunks(count as usize).map(<[_]>::to_vec).collect())
}

/// Whether whoever read the output has had enough, which is no error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}
