//! Classifies images by class names alone with CLIP, on a set and on others of the same classes.
//!
//! ```text
//! $ cargo run --release --example clip_zero_shot -- --backbone CLIP --tokenizer DIR --classes names.txt \
//!       --data imagenet/test.txt --target sketch=sketch/test.txt --target a=imagenet-a/test.txt:imagenet-a/names.txt
//! set            images  classes   top-1
//! data             ....     ....   ..... %
//! ```
//!
//! CLIP is a checkpoint of both towers under the names of Hugging Face, OpenAI or open_clip; DIR holds `tokenizer.json`,
//! or `vocab.json` and `merges.txt`, or is OpenAI's `bpe_simple_vocab_16e6.txt.gz`. `names.txt` has the name of class 0,
//! 1, 2 and so on, one a line. A set is a list of lines `path label`, the paths relative to the list's folder or to
//! `--root`, or a folder with a folder for each class under its name. A list that has some of the classes alone names
//! them (or their numbers) in a file of its own, in the order of its labels; so does a folder whose folders have other
//! names, in the order of these. The shorter side of an image is resized to the model's, and the centre taken.
//!
//! To train bypasses from the zero-shot classifier (the text tower is not needed from there on):
//!
//! ```text
//! $ cargo run --release --example clip_zero_shot -- ... --data train.txt --head-out head.safetensors
//! $ cargo run --release --example few_shot -- --protocol domain_generalization ... --head head.safetensors
//! ```

#[path = "shared/backbone.rs"]
mod backbone;
#[path = "shared/failure.rs"]
mod failure;
#[path = "shared/precision.rs"]
mod precision;
#[path = "shared/targets.rs"]
mod targets;

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use convpass::{
    BatchConfig, Batches, ClipText, ClipTextConfig, ClipTokenizer, Evaluation, FrozenViT,
    ImageDataset, Method, MlpActivation, Normalization, Order, PartialBatch, PetlConfig, PetlModel,
    Resize, Templates, ViTConfig, ZeroShot, evaluate_logits, read_class_names,
};
use tch::{Device, Tensor};

use backbone::{Activation, Processor};
use targets::{Target, TargetSet, parse_target};

/// Zero-shot classification with CLIP, on a set and on others of the same classes.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Checkpoint of CLIP with both towers.
    #[arg(long)]
    backbone: PathBuf,
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
    /// Attention heads of the image tower, where its width does not tell them.
    #[arg(long)]
    heads: Option<i64>,
    /// Attention heads of the text tower.
    #[arg(long)]
    text_heads: Option<i64>,
    /// The activation of both towers [default: by the file's names; open_clip's models under Hugging Face's want gelu].
    #[arg(long, value_enum)]
    activation: Option<Activation>,
    /// imagenet, half, unit or clip.
    #[arg(long, default_value_t = Normalization::Clip)]
    normalization: Normalization,
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Run on the first GPU.
    #[arg(long)]
    cuda: bool,
}

fn main() -> ExitCode {
    convpass::keep_freed_memory();
    failure::exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let device = Processor::of(args.cuda).device()?;
    let names = read_class_names(&args.classes)?;
    let vit = image_tower(args, device)?;
    let data = targets::named("data", &args.data);
    let sets: Vec<Target> = [data].into_iter().chain(args.targets.iter().cloned()).collect();
    let sets = targets::read(&sets, args.root.as_deref(), &names)?;
    let (rows, columns) = vit.config().image_size;
    let resize = Resize::center_crop(rows.max(columns), (rows, columns))?;
    let zero_shot = encode(args, &names, device)?;
    let bench = Bench { args, device, resize, vit, zero_shot };
    if let Some(out) = &args.head_out {
        bench.write_head(&sets[0], names.len() as i64, out)?;
    }
    bench.measure(&sets)
}

fn image_tower(args: &Args, device: Device) -> Result<FrozenViT> {
    let mut config = ViTConfig::infer(&args.backbone)?;
    config.num_heads = args.heads.unwrap_or(config.num_heads);
    config.activation = activation(args, config.activation);
    Ok(FrozenViT::open_with(&args.backbone, &config, device)?)
}

fn activation(args: &Args, inferred: MlpActivation) -> MlpActivation {
    args.activation.map_or(inferred, MlpActivation::from)
}

/// The classes by the text tower, which is dropped after it.
fn encode(args: &Args, names: &[String], device: Device) -> Result<ZeroShot> {
    let tokenizer = ClipTokenizer::open(&args.tokenizer)?;
    let templates = match &args.templates {
        Some(file) => Templates::read(file)?,
        None => Templates::default(),
    };
    let mut config = ClipTextConfig::infer(&args.backbone)?;
    config.num_heads = args.text_heads.unwrap_or(config.num_heads);
    config.activation = activation(args, config.activation);
    let text = ClipText::open_with(&args.backbone, &config, device)?;
    Ok(tch::no_grad(|| ZeroShot::encode(&text, &tokenizer, names, &templates))?)
}

/// What the sets are measured with.
struct Bench<'a> {
    args: &'a Args,
    device: Device,
    resize: Resize,
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
        let mut model = PetlModel::new(self.vit.clone(), &config)?;
        model.set_head(&self.zero_shot.head(&self.vit, &images)?, None)?;
        model.save_adapter(out)?;
        println!("{}", out.display());
        Ok(())
    }
}
