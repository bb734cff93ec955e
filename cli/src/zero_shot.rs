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
use crate::failure::{chain_of, finite};
use crate::flags::{
    BackboneFlags, ClassFlag, InputFlags, OrientationFlag, SurveyFlags, TargetFlags, ThreadFlags,
};
use crate::survey;
use crate::targets::{self, Target, TargetSet};

/// Classifies images by class names alone with CLIP, and prints the top-1 accuracy of each set.
///
/// A set is a list with a line `path label` for each image, or a folder with one folder for each
/// class. The shorter side of an image is resized to the image size, and the centre is cut out.
/// --head-out writes the classifier as an adapter, from whose head `finetune` and `few-shot` can
/// start.
#[derive(clap::Args)]
#[command(
    mut_arg("backbone", |arg| arg.required(true).help(
        "Checkpoint of a CLIP with its text tower: a file, or a folder that holds one"
    )),
    mut_arg("classes", |arg| arg.required(true)),
    after_long_help = "Example:\n  convpass zero-shot --backbone clip/ --tokenizer clip/ --classes names.txt --data imagenet/test.txt --target sketch=sketch/test.txt"
)]
pub struct ZeroShotArgs {
    /// Vocabulary of CLIP: tokenizer.json, vocab.json or bpe_simple_vocab_16e6.txt.gz, or the
    /// folder that holds it.
    #[arg(long, value_name = "PATH")]
    tokenizer: PathBuf,
    /// Text file with one sentence on each line, in which {} stands for the name of the class
    /// [default: six sentences for photos].
    #[arg(long, value_name = "FILE")]
    templates: Option<PathBuf>,
    #[command(flatten)]
    threads: ThreadFlags,
    /// Images: a folder with one folder for each class, or a list. Add the file of the classes, by
    /// name or number, if a list has only some of them or the folders are not named after them.
    #[arg(long, value_name = "IMAGES[:CLASSES]", help_heading = "Data")]
    data: String,
    #[command(flatten)]
    targets: TargetFlags,
    #[command(flatten)]
    classes: ClassFlag,
    /// Folder that the paths in lists are relative to [default: the folder of each list].
    #[arg(long, value_name = "DIR", help_heading = "Data")]
    root: Option<PathBuf>,
    #[command(flatten)]
    input: InputFlags,
    #[command(flatten)]
    orientation: OrientationFlag,
    #[command(flatten)]
    survey: SurveyFlags,
    #[command(flatten)]
    backbone: BackboneFlags,
    /// Attention heads of the text tower, if the checkpoint does not say how many [default: one for
    /// every 64 channels].
    #[arg(long, value_name = "N", help_heading = "Backbone")]
    text_heads: Option<i64>,
    /// File to write the classifier to, as an adapter that is a head alone.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    head_out: Option<PathBuf>,
}

pub fn run(args: &ZeroShotArgs) -> Result<Outcome> {
    args.threads.apply()?;
    let device = args.backbone.device.device()?;
    let names = read_class_names(args.classes.classes.as_ref().context("--classes is needed")?)?;
    let sets = read_sets(args, &names)?;
    let _guard = args.backbone.precision().guard(device)?;
    let opened = args.backbone.open(args.backbone.checkpoint()?)?;
    let normalization = opened.normalization(args.input.images.normalization);
    let backbone = opened.backbone;
    let vit = backbone.as_vit().context("--backbone: not a CLIP tower")?.clone();
    let (rows, columns) = vit.config().image_size;
    let resize = Resize::center_crop(rows.max(columns), (rows, columns))?
        .with_orientation(args.orientation.orientation());
    let zero_shot = encode(args, &names, device)?;
    let bench = Bench { args, device, resize, normalization, backbone, vit, zero_shot };
    if let Some(out) = &args.head_out {
        bench.write_head(&sets[0], &names, out)?;
    }
    bench.measure(&sets)?;
    Ok(Outcome::Done)
}

/// Reads the sets, of which `--data` is the first, and looks at their images.
fn read_sets(args: &ZeroShotArgs, names: &[String]) -> Result<Vec<TargetSet>> {
    let data = targets::named("data", &args.data);
    let sets: Vec<Target> = [data].into_iter().chain(args.targets.targets.clone()).collect();
    let mut sets = targets::read(&sets, args.root.as_deref(), names)?;
    let lists = sets.iter().map(|set| &set.list);
    let (lists, _) = survey::readable_sets(lists, args.survey, args.threads)?;
    for (set, list) in sets.iter_mut().zip(lists) {
        set.list = list;
    }
    Ok(sets)
}

/// Returns the classifier that the text tower computes from the class names. The text tower is
/// dropped afterwards.
fn encode(args: &ZeroShotArgs, names: &[String], device: Device) -> Result<ZeroShot> {
    let tokenizer = ClipTokenizer::open(&args.tokenizer)?;
    let templates = match &args.templates {
        Some(file) => Templates::read(file)?,
        None => Templates::default(),
    };
    let file = args.backbone.checkpoint()?;
    let mut config = ClipTextConfig::infer(file)?;
    config.num_heads = args.text_heads.unwrap_or(config.num_heads);
    config.activation = args.backbone.activation.map_or(config.activation, MlpActivation::from);
    let text = ClipText::open_with(file, &config, device)?;
    Ok(tch::no_grad(|| ZeroShot::encode(&text, &tokenizer, names, &templates))?)
}

/// Everything that is needed to measure a set.
struct Bench<'a> {
    args: &'a ZeroShotArgs,
    device: Device,
    resize: Resize,
    normalization: Normalization,
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
        let images = self.stream(set);
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
        let sum = sum?;
        finite(&sum, &set.name)?;
        Ok(sum)
    }

    /// Returns the images of a set; each image is decoded when it is used.
    fn stream(&self, set: &TargetSet) -> ImageDataset {
        let images = ImageDataset::stream(&set.list, self.resize);
        self.args.threads.decoding(images)
    }

    fn batches(&self) -> BatchConfig {
        BatchConfig {
            batch_size: self.args.input.batch_size(),
            partial: PartialBatch::Keep,
            order: Order::Sequential,
            normalization: self.normalization,
            device: self.device,
        }
    }

    /// Writes the classifier as an adapter that is a head alone. The scale of the head comes from
    /// one shuffled batch of the images of `data`.
    fn write_head(&self, data: &TargetSet, names: &[String], out: &Path) -> Result<()> {
        let images = self.stream(data);
        let any = BatchConfig { order: Order::Shuffled { seed: 0, epoch: 0 }, ..self.batches() };
        let (images, _) = Batches::new(&images, any)?.next().context("--data")??;
        let config = PetlConfig::new(Method::LinearProbe, names.len() as i64);
        let mut model = PetlModel::new(self.backbone.clone(), &config)?;
        model.set_head(&self.zero_shot.head(&self.vit, &images)?, None)?;
        // Two classes may have one name, such as the two cranes of ImageNet.
        if let Err(error) = model.set_class_names(names.to_vec()) {
            eprintln!("warning: the head has no names of classes: {}", chain_of(error));
        }
        model.save_adapter(out)?;
        println!("{}", out.display());
        Ok(())
    }
}
