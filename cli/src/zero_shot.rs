//! `convpass zero-shot`: classifies images by class names alone with CLIP.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use convpass::backbone::{ClipText, ClipTextConfig, MlpActivation};
use convpass::clip::{ClipTokenizer, Templates, ZeroShot, read_class_names};
use convpass::data::{
    BatchConfig, Batches, ImageDataset, Normalization, Order, PartialBatch, Resize,
};
use convpass::eval::{Evaluation, evaluate_logits};
use convpass::{AnyBackbone, FrozenViT, Method, PetlConfig, PetlModel};
use tch::{Device, Tensor};

use crate::Outcome;
use crate::flags::{BackboneFile, BackboneFlags};
use crate::targets::{self, Target, TargetSet, parse_target};

/// Classifies images by class names alone with CLIP, on a set and on others of the same classes.
///
/// A set is a list with a line `path label` for each image, or a folder with a folder for each class.
/// The shorter side of an image is resized to the model's side, and the centre is taken. --head-out
/// writes the classifier as an adapter, from which `finetune` and `few-shot` can start.
#[derive(clap::Args)]
#[command(
    after_long_help = "Example:\n  convpass zero-shot --backbone clip/ --tokenizer clip/ --classes names.txt --data imagenet/test.txt --target sketch=sketch/test.txt"
)]
pub struct Args {
    #[command(flatten)]
    file: BackboneFile,
    #[command(flatten)]
    flags: BackboneFlags,
    /// CLIP's vocabulary: a file, or the folder that holds it.
    #[arg(long)]
    tokenizer: PathBuf,
    /// Names of the classes, one a line.
    #[arg(long)]
    classes: PathBuf,
    /// Sentences with {} for the name, one a line [default: six for photos of anything].
    #[arg(long)]
    templates: Option<PathBuf>,
    /// The images: a list, or a folder with a folder for each class; the file of its classes, by name or number, if a
    /// list has not all of them or the folders have other names.
    #[arg(long, value_name = "IMAGES[:CLASSES]")]
    data: String,
    /// Another set, likewise.
    #[arg(long = "target", value_name = "NAME=IMAGES[:CLASSES]", value_parser = parse_target)]
    targets: Vec<Target>,
    /// Folder that the paths of the lists are relative to [default: each list's own].
    #[arg(long)]
    root: Option<PathBuf>,
    /// Write an adapter whose head is made of the class names and that trains nothing else.
    #[arg(long)]
    head_out: Option<PathBuf>,
    /// Attention heads of the text tower.
    #[arg(long)]
    text_heads: Option<i64>,
    /// Mean and deviation of the pixels: imagenet, half, unit or clip.
    #[arg(long, default_value_t = Normalization::Clip)]
    normalization: Normalization,
    /// Images at a time.
    #[arg(long, value_name = "N", default_value_t = 64)]
    batch_size: usize,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let device = args.flags.device.device()?;
    let names = read_class_names(&args.classes)?;
    let _guard = args.flags.precision().guard(device)?;
    let backbone = args.flags.open(&args.file.backbone)?.backbone;
    let vit = backbone.as_vit().context("--backbone: not a CLIP tower")?.clone();
    let data = targets::named("data", &args.data);
    let sets: Vec<Target> = [data].into_iter().chain(args.targets.iter().cloned()).collect();
    let sets = targets::read(&sets, args.root.as_deref(), &names)?;
    let (rows, columns) = vit.config().image_size;
    let resize = Resize::center_crop(rows.max(columns), (rows, columns))?;
    let zero_shot = encode(args, &names, device)?;
    let bench = Bench { args, device, resize, backbone, vit, zero_shot };
    if let Some(out) = &args.head_out {
        bench.write_head(&sets[0], names.len() as i64, out)?;
    }
    bench.measure(&sets)?;
    Ok(Outcome::Done)
}

/// The classes by the text tower, which is dropped after it.
fn encode(args: &Args, names: &[String], device: Device) -> Result<ZeroShot> {
    let tokenizer = ClipTokenizer::open(&args.tokenizer)?;
    let templates = match &args.templates {
        Some(file) => Templates::read(file)?,
        None => Templates::default(),
    };
    let mut config = ClipTextConfig::infer(&args.file.backbone)?;
    config.num_heads = args.text_heads.unwrap_or(config.num_heads);
    config.activation = args.flags.activation.map_or(config.activation, MlpActivation::from);
    let text = ClipText::open_with(&args.file.backbone, &config, device)?;
    Ok(tch::no_grad(|| ZeroShot::encode(&text, &tokenizer, names, &templates))?)
}

/// What the sets are measured with.
struct Bench<'a> {
    args: &'a Args,
    device: Device,
    resize: Resize,
    backbone: AnyBackbone,
    vit: FrozenViT,
    zero_shot: ZeroShot,
}

impl Bench<'_> {
    fn measure(&self, sets: &[TargetSet]) -> Result<()> {
        println!("{:<14} {:>6} {:>8} {:>7}", "set", "images", "classes", "top-1");
        let mut targets = Vec::new();
        for (at, set) in sets.iter().enumerate() {
            let sum = self.evaluate(set)?;
            let (classes, count, top1) = (set.list.num_classes(), sum.images, sum.top1());
            println!("{:<14} {count:>6} {classes:>8} {top1:>7.2} %", set.name);
            targets.extend((at > 0).then_some(top1));
        }
        if targets.len() > 1 {
            let mean = targets.iter().sum::<f64>() / targets.len() as f64;
            println!("{:<14} {:>6} {:>8} {mean:>7.2} %", "mean of others", "", "");
        }
        Ok(())
    }

    fn evaluate(&self, set: &TargetSet) -> Result<Evaluation> {
        let images = ImageDataset::stream(&set.list, self.resize);
        let logits = &mut |images: &Tensor| {
            let features = self.vit.features(images)?;
            self.zero_shot.logits(&self.vit.project(&features)?)
        };
        let watch = &mut |done, count| {
            eprint!("\r{}: {done} of {count}", set.name);
            let _shown = std::io::stderr().flush();
            ControlFlow::Continue(())
        };
        let sum = evaluate_logits(logits, &images, set.subset.as_ref(), self.batches(), watch);
        eprint!("\r\x1b[K");
        Ok(sum?)
    }

    fn batches(&self) -> BatchConfig {
        BatchConfig {
            batch_size: self.args.batch_size,
            partial: PartialBatch::Keep,
            order: Order::Sequential,
            normalization: self.args.normalization,
            device: self.device,
        }
    }

    /// An adapter that is a head alone, scaled for a batch of images of any classes.
    fn write_head(&self, data: &TargetSet, classes: i64, out: &Path) -> Result<()> {
        let images = ImageDataset::stream(&data.list, self.resize);
        let any = BatchConfig { order: Order::Shuffled { seed: 0, epoch: 0 }, ..self.batches() };
        let (images, _) = Batches::new(&images, any)?.next().context("--data")??;
        let config = PetlConfig::new(Method::LinearProbe, classes);
        let mut model = PetlModel::new(self.backbone.clone(), &config)?;
        model.set_head(&self.zero_shot.head(&self.vit, &images)?, None)?;
        model.save_adapter(out)?;
        println!("{}", out.display());
        Ok(())
    }
}
