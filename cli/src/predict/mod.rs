//! `convpass predict`: classifies images with an adapter.

mod decode_ahead;
mod output;

use std::io::{self, BufWriter};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use convpass::data::{Normalization, Orientation, Resize};
use convpass::{AnyBackbone, Backbone, PetlModel};
use tch::{Kind, Tensor};

use decode_ahead::{Decoded, decode_ahead};
use output::{ClassScore, Writer};

use crate::Outcome;
use crate::flags::{
    BackboneFlags, ClassFlag, FormatFlag, InputFlags, OF_RUN_BACKBONE, OF_RUN_SIZE, Opened,
    OrientationFlag, ResizeFlags, ThreadFlags,
};
use crate::memory::PassSize;
use crate::run_folder::class_names;
use crate::trained::TrainedAdapter;

/// Batches that are decoded while the model computes.
const BATCHES_AHEAD: usize = 2;

/// Classifies images with an adapter, and prints a line for each image.
///
/// The backbone, the preprocessing and the precision are those of the run.json beside the adapter,
/// or of the adapter itself, unless a flag says otherwise; standard error says which. The names of
/// the classes are those of --classes, else those in the adapter, else numbers. An image that
/// cannot be read is named on standard error, the others are classified, and the exit code is 1.
/// With --format json each line is a JSON object.
#[derive(clap::Args)]
#[command(
    mut_arg("backbone", |arg| arg.help(OF_RUN_BACKBONE)),
    mut_arg("image_size", |arg| arg.help(OF_RUN_SIZE)),
    mut_arg("precision", |arg| arg.help(
        "Dtype of the frozen weights: f32, bf16, f16, int8, autocast-bf16 or int8-dynamic [default: that of the run]"
    )),
    mut_arg("normalization", |arg| arg.help(
        "Mean and standard deviation that pixels are normalized with: imagenet, half, unit or clip [default: those of the run]"
    )),
    mut_arg("ignore_exif", |arg| arg.help(
        "Use photos as their pixels are stored, not turned as their EXIF orientation says [default: as in the run]"
    )),
    mut_arg("resize", |arg| arg.help(
        "Resize both sides to the image size (squash), or the shorter side to this many pixels, after which the centre is cut out [default: as in the run]"
    )),
    mut_arg("interpolation", |arg| arg.help("Filter of the resize [default: that of the run]")),
    mut_arg("classes", |arg| arg.help(
        "Text file with the name of one class on each line, in the order of the labels [default: the names in the adapter, else numbers]"
    )),
    after_long_help = "Examples:\n  convpass predict --adapter runs/pets photos/ cat.jpg\n  find . -name '*.jpg' | convpass predict --adapter runs/pets --format csv -"
)]
pub struct PredictArgs {
    /// Images: files, folders, or - for a list of paths on standard input.
    #[arg(required = true, value_name = "IMAGES")]
    images: Vec<PathBuf>,
    /// Adapter: its file, or the folder of its run.
    #[arg(long, value_name = "PATH")]
    adapter: PathBuf,
    #[command(flatten)]
    threads: ThreadFlags,
    #[command(flatten)]
    classes: ClassFlag,
    #[command(flatten)]
    input: InputFlags,
    #[command(flatten)]
    orientation: OrientationFlag,
    #[command(flatten)]
    resize: ResizeFlags,
    #[command(flatten)]
    backbone: BackboneFlags,
    #[command(flatten)]
    format: FormatFlag,
    /// Classes that are printed for each image, the most probable first.
    #[arg(long, value_name = "N", default_value = "3", help_heading = "Output")]
    top: NonZeroUsize,
}

pub fn run(args: &PredictArgs) -> Result<Outcome> {
    args.threads.apply()?;
    let trained = TrainedAdapter::read(&args.adapter)?;
    let file = trained.checkpoint(&args.backbone)?;
    let flags = trained.flags(&args.backbone)?;
    let _guard = flags.precision().guard(flags.device.device()?)?;
    let opened = flags.open(&file)?;
    let all_read = Predict { args, trained }.run(opened)?;
    Ok(if all_read { Outcome::Done } else { Outcome::Partial })
}

struct Predict<'a> {
    args: &'a PredictArgs,
    trained: TrainedAdapter,
}

impl Predict<'_> {
    /// Classifies the images and returns whether all of them could be read.
    fn run(&self, opened: Opened) -> Result<bool> {
        let (args, image_size) = (self.args, opened.image_size());
        let batch = args.input.batch_size();
        PassSize { batch, image_size, keeps_blocks: false }.check(&opened.backbone)?;
        let normalization = self.normalization(&opened)?;
        self.say_size(image_size);
        let resize = match &self.trained.record {
            Some(record) => record.test_resize(image_size)?,
            None => self.resize(&opened)?,
        };
        let resize = args.resize.apply(resize)?;
        if args.resize.any() {
            eprintln!("resize: {}, by flag", args.resize);
        }
        let orientation =
            if args.orientation.ignore_exif { Orientation::Stored } else { self.orientation() };
        if orientation.is_stored() {
            eprintln!("photos: as they are stored; their EXIF orientation is ignored");
        }
        let resize = resize.with_orientation(orientation);
        let model = PetlModel::load_adapter(opened.backbone, &self.trained.file)?;
        let classes = self.classes(&model)?;
        let batch_size = args.input.batch_size();
        let images = decode_ahead(
            args.images.clone(),
            resize,
            args.threads.threads.map_or_else(std::thread::available_parallelism, Ok)?,
            BATCHES_AHEAD.saturating_mul(batch_size),
        )?;
        let mut writer =
            Writer::new(args.format.format, BufWriter::new(io::stdout().lock()), classes);
        let mut batches = ReadableImages { images, size: batch_size, all_read: true };
        let written = batches.classify(&model, image_size, normalization, args, &mut writer);
        match written.and_then(|()| Ok(writer.finish()?)) {
            Err(error) if is_broken_pipe(&error) => Ok(batches.all_read),
            Err(error) => Err(error),
            Ok(0) if batches.all_read => bail!("there is no image to classify"),
            Ok(_) => Ok(batches.all_read),
        }
    }

    /// Returns the normalization of the flag, else of the run, else of the adapter, and prints its
    /// source. It is never guessed, because a wrong one changes every probability.
    fn normalization(&self, opened: &Opened) -> Result<Normalization> {
        let trained = &self.trained;
        let recorded = trained.record.as_ref().map(|record| record.train.normalization);
        let of_adapter = trained.info.backbone.as_ref();
        let of_adapter = of_adapter.and_then(|backbone| backbone.preprocessing.as_ref());
        let (beside, adapter) = (trained.beside.display(), trained.file.display());
        match (self.args.input.images.normalization, recorded, of_adapter.map(Normalization::of)) {
            (Some(flag), Some(recorded), _) if flag != recorded => {
                eprintln!("normalization: {flag} by flag, although {beside} says {recorded}");
                Ok(flag)
            }
            (_, Some(recorded), _) => {
                eprintln!("normalization: {recorded}, from {beside}");
                Ok(recorded)
            }
            (Some(flag), None, _) => {
                eprintln!("normalization: {flag}, by flag");
                Ok(flag)
            }
            (None, None, Some(of_adapter)) => {
                eprintln!("normalization: {of_adapter}, from {adapter}");
                Ok(of_adapter)
            }
            (None, None, None) => {
                let usual = opened.normalization(None);
                bail!(
                    "--normalization is needed ({usual} is usual for this family): there is no \
                     {beside}, and {adapter} does not say"
                )
            }
        }
    }

    fn say_size(&self, (rows, columns): (i64, i64)) {
        let record = self.trained.record.as_ref();
        let origin = match (self.args.backbone.image_size, record.and_then(|r| r.image_size)) {
            (Some(_), _) => "by flag".to_owned(),
            (None, Some(size)) if size == (rows, columns) => {
                format!("from {}", self.trained.beside.display())
            }
            _ => "from the backbone".to_owned(),
        };
        let centre = record.and_then(|record| record.test_shorter_side);
        let centre =
            centre.map_or("", |_| ", the centre of the image resized with its aspect ratio");
        eprintln!("images: {rows} x {columns}, {origin}{centre}");
    }

    /// Returns what the run did with the EXIF orientation of photos. Runs of versions that had no
    /// choice ignored it.
    fn orientation(&self) -> Orientation {
        let of_adapter = self.trained.info.backbone.as_ref();
        let of_adapter = of_adapter.and_then(|backbone| backbone.preprocessing.as_ref());
        match &self.trained.record {
            Some(record) => record.images.orientation,
            None => of_adapter.map_or(Orientation::Stored, |known| known.orientation),
        }
    }

    /// Returns the resize of the adapter for images of the backbone's size. If the adapter has none,
    /// images are squashed.
    fn resize(&self, opened: &Opened) -> Result<Resize> {
        let image_size = opened.image_size();
        let of_adapter = self.trained.info.backbone.as_ref();
        match of_adapter.and_then(|backbone| backbone.preprocessing.clone()) {
            Some(known) => Ok(Resize::of(&known.for_size(image_size))?),
            None => Ok(Resize::bicubic(image_size)?),
        }
    }

    /// Returns a name for each class.
    fn classes(&self, model: &PetlModel<AnyBackbone>) -> Result<Vec<String>> {
        let count = model.config().num_classes;
        let Some(file) = &self.args.classes.classes else {
            let numbers = || (0..count).map(|label| label.to_string()).collect();
            return Ok(model.class_names().map_or_else(numbers, <[String]>::to_vec));
        };
        std::fs::metadata(file).with_context(|| file.display().to_string())?;
        let names = class_names(file)?;
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
struct ReadableImages<I> {
    images: I,
    size: usize,
    /// Whether all images so far could be read.
    all_read: bool,
}

impl<I: Iterator<Item = Decoded>> ReadableImages<I> {
    fn classify<B: Backbone>(
        &mut self,
        model: &PetlModel<B>,
        (rows, columns): (i64, i64),
        normalization: Normalization,
        args: &PredictArgs,
        writer: &mut Writer<impl io::Write>,
    ) -> Result<()> {
        let device = args.backbone.device.device()?;
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

    /// Returns the paths and the pixels of the next images that can be read. For every other image
    /// the reason is printed.
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

/// Returns the most probable classes of each row of logits `[B, K]`, the most probable first.
fn top(logits: &Tensor, count: usize) -> Result<Vec<Vec<ClassScore>>> {
    let count = logits.size()[1].min(i64::try_from(count)?);
    let probabilities = logits.f_softmax(-1, Kind::Float)?;
    let (values, labels) = probabilities.f_topk(count, -1, true, true)?;
    let values: Vec<f32> = values.f_reshape([-1])?.try_into()?;
    let labels: Vec<i64> = labels.f_reshape([-1])?.try_into()?;
    let pairs: Vec<_> = labels
        .into_iter()
        .zip(values)
        .map(|(label, probability)| ClassScore { label: label as usize, probability })
        .collect();
    Ok(pairs.chunks(count as usize).map(<[_]>::to_vec).collect())
}

/// Returns whether the reader closed the output, such as `head`. This is not a failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}
