//! Classifies images by class names alone with CLIP, or by an adapter, on a set and on others of the same classes.
//!
//! ```text
//! $ cargo run --release --example clip_zero_shot -- --backbone CLIP --tokenizer DIR --classes names.txt \
//!       --data imagenet/test.txt --target sketch=sketch/test.txt --target a=imagenet-a/test.txt:imagenet-a/names.txt
//! set            images  classes   top-1
//! data             ....     ....   ..... %  zero-shot
//! ```
//!
//! CLIP is a checkpoint of both towers under the names of Hugging Face, OpenAI or open_clip; DIR holds `tokenizer.json`,
//! or `vocab.json` and `merges.txt`, or is OpenAI's `bpe_simple_vocab_16e6.txt.gz`. `names.txt` has the name of class 0,
//! 1, 2 and so on, one a line; a set that has some of them alone names them (or their indices) in a file of its own, in
//! the order of its labels. Lists have lines `path label`, the paths relative to the list's folder or to `--root`.
//!
//! To train bypasses from the zero-shot classifier (the text tower is not needed from there on):
//!
//! ```text
//! $ cargo run --release --example clip_zero_shot -- ... --data train.txt --head-out head.safetensors
//! $ cargo run --release --example vtab_finetune -- ... --backbone CLIP --head head.safetensors
//! $ cargo run --release --example clip_zero_shot -- ... --data test.txt --adapter runs/NAME/adapter.safetensors
//! ```

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use convpass::{
    BatchConfig, Batches, ClassSubset, ClipText, ClipTextConfig, ClipTokenizer, Evaluation,
    FileList, FrozenViT, ImageDataset, Method, MlpActivation, Normalization, Order, PartialBatch,
    PetlConfig, PetlModel, Templates, ViTConfig, ZeroShot, evaluate_logits, read_class_names,
};
use tch::{Cuda, Device, Tensor};

/// Zero-shot classification with CLIP, or an adapter's, on a set and on others of the same classes.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Checkpoint of CLIP with both towers.
    #[arg(long)]
    backbone: PathBuf,
    /// CLIP's vocabulary: a file, or the folder that holds it.
    #[arg(long, required_unless_present = "adapter")]
    tokenizer: Option<PathBuf>,
    /// Names of the classes, one a line.
    #[arg(long)]
    classes: PathBuf,
    /// Sentences with {} for the name, one a line [default: six for photos of anything].
    #[arg(long)]
    templates: Option<PathBuf>,
    /// List of the images.
    #[arg(long)]
    data: PathBuf,
    /// Another list; its classes, by name or index, if they are not all of them.
    #[arg(long = "target", value_name = "NAME=LIST[:CLASSES]", value_parser = parse_target)]
    targets: Vec<Target>,
    /// Folder that the paths of the lists are relative to [default: each list's own].
    #[arg(long)]
    root: Option<PathBuf>,
    /// Classify with this adapter, and not zero-shot.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Write an adapter whose head is made of the class names and that trains nothing else.
    #[arg(long, conflicts_with = "adapter")]
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

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Activation {
    Gelu,
    QuickGelu,
}

/// A set to measure on.
#[derive(Clone)]
struct Target {
    name: String,
    list: PathBuf,
    classes: Option<PathBuf>,
}

fn parse_target(text: &str) -> Result<Target, String> {
    let (name, files) = text.split_once('=').ok_or("expected NAME=LIST[:CLASSES]")?;
    let (list, classes) = match files.rsplit_once(':') {
        Some((list, classes)) if !Path::new(files).exists() => (list, Some(PathBuf::from(classes))),
        _ => (files, None),
    };
    Ok(Target { name: name.to_owned(), list: PathBuf::from(list), classes })
}

fn main() -> ExitCode {
    convpass::keep_freed_memory();
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let device = match args.cuda {
        true if !Cuda::is_available() => {
            bail!(
                "no CUDA device: {}",
                convpass::cuda_load_error().unwrap_or("libtorch finds none")
            )
        }
        true => Device::Cuda(0),
        false => Device::Cpu,
    };
    let names = read_class_names(&args.classes)?;
    let vit = image_tower(args, device)?;
    let data = Target { name: "data".to_owned(), list: args.data.clone(), classes: None };
    let sets: Vec<Target> = [data].into_iter().chain(args.targets.iter().cloned()).collect();
    let bench = Bench { args, names: &names, device, image_size: vit.config().image_size };
    match &args.adapter {
        Some(file) => {
            let model: PetlModel = PetlModel::load_adapter(vit, file)?;
            let classes = model.config().num_classes;
            if classes != names.len() as i64 {
                bail!("{}: of {classes} classes, and {} names", file.display(), names.len());
            }
            let label = model.config().method.name();
            bench.measure(&sets, label, &mut |images| model.forward(images, false))
        }
        None => {
            let zero_shot = encode(args, &names, device)?;
            if let Some(out) = &args.head_out {
                bench.write_head(&vit, &zero_shot, out)?;
            }
            let logits =
                &mut |images: &Tensor| zero_shot.logits(&vit.project(&vit.features(images)?)?);
            bench.measure(&sets, "zero-shot", logits)
        }
    }
}

fn image_tower(args: &Args, device: Device) -> Result<FrozenViT> {
    let mut config = ViTConfig::infer(&args.backbone)?;
    config.num_heads = args.heads.unwrap_or(config.num_heads);
    config.activation = activation(args, config.activation);
    Ok(FrozenViT::open_with(&args.backbone, &config, device)?)
}

fn activation(args: &Args, inferred: MlpActivation) -> MlpActivation {
    match args.activation {
        Some(Activation::Gelu) => MlpActivation::Gelu,
        Some(Activation::QuickGelu) => MlpActivation::QuickGelu,
        None => inferred,
    }
}

/// The classes by the text tower, which is dropped after it.
fn encode(args: &Args, names: &[String], device: Device) -> Result<ZeroShot> {
    let tokenizer = ClipTokenizer::open(args.tokenizer.as_deref().context("--tokenizer")?)?;
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
    names: &'a [String],
    device: Device,
    image_size: (i64, i64),
}

impl Bench<'_> {
    fn measure(
        &self,
        sets: &[Target],
        label: &str,
        logits: &mut dyn FnMut(&Tensor) -> convpass::Result<Tensor>,
    ) -> Result<()> {
        // Every list before the first image.
        let sets = sets.iter().map(|set| self.read(set)).collect::<Result<Vec<_>>>()?;
        println!("{:<14} {:>6} {:>8} {:>7}", "set", "images", "classes", "top-1");
        let mut targets = Vec::new();
        for (at, (name, list, subset)) in sets.iter().enumerate() {
            let images = ImageDataset::load(list, self.image_size)?;
            let sum = self.evaluate(name, &images, subset.as_ref(), logits)?;
            let (classes, count, top1) = (list.num_classes(), sum.images, sum.top1());
            println!("{name:<14} {count:>6} {classes:>8} {top1:>7.2} %  {label}");
            targets.extend((at > 0).then_some(top1));
        }
        if targets.len() > 1 {
            let mean = targets.iter().sum::<f64>() / targets.len() as f64;
            println!("{:<14} {:>6} {:>8} {mean:>7.2} %  {label}", "mean of others", "", "");
        }
        Ok(())
    }

    fn read<'s>(&self, set: &'s Target) -> Result<(&'s str, FileList, Option<ClassSubset>)> {
        let subset = match &set.classes {
            Some(file) => Some(ClassSubset::read(file, self.names)?),
            None => None,
        };
        let classes = subset.as_ref().map_or(self.names.len(), |s| s.classes().len());
        Ok((&set.name, self.list(&set.list, classes)?, subset))
    }

    fn list(&self, file: &Path, classes: usize) -> Result<FileList> {
        let folder = file.parent().unwrap_or(Path::new(""));
        let root = self.args.root.as_deref().unwrap_or(folder);
        Ok(FileList::read(root, file, Some(classes as i64))?)
    }

    fn evaluate(
        &self,
        name: &str,
        images: &ImageDataset,
        subset: Option<&ClassSubset>,
        logits: &mut dyn FnMut(&Tensor) -> convpass::Result<Tensor>,
    ) -> Result<Evaluation> {
        let watch = &mut |done, count| {
            eprint!("\r{name}: {done} of {count}");
            let _shown = std::io::stderr().flush();
            ControlFlow::Continue(())
        };
        let sum = evaluate_logits(logits, images, subset, self.batches(), watch);
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

    /// An adapter that is a head alone, scaled for a batch of `--data`, of any classes.
    fn write_head(&self, vit: &FrozenViT, zero_shot: &ZeroShot, out: &Path) -> Result<()> {
        let data = self.list(&self.args.data, self.names.len())?;
        let data = ImageDataset::load(&data, self.image_size)?;
        let any = BatchConfig { order: Order::Shuffled { seed: 0, epoch: 0 }, ..self.batches() };
        let (images, _) = Batches::new(&data, any)?.next().context("--data")??;
        let config = PetlConfig::new(Method::LinearProbe, self.names.len() as i64);
        let mut model = PetlModel::new(vit.clone(), &config)?;
        model.set_head(&zero_shot.head(vit, &images)?, None)?;
        model.save_adapter(out)?;
        println!("{}", out.display());
        Ok(())
    }
}
