//! `convpass export`: an adapted model as a file for other programs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use convpass::data::Normalization;
use convpass::export::{MergedWeights, OnnxModel, WeightNames};
use convpass::{AnyBackbone, PetlModel, Precision, Preprocessing};

use crate::Outcome;
use crate::failure::Usage;
use crate::flags::{
    BackboneFlags, NormalizationFlag, OF_RUN_BACKBONE, OF_RUN_SIZE, Opened, OutFlag, ThreadFlags,
};
use crate::trained::TrainedAdapter;

/// Writes a model with its adapter as one file for other programs: ONNX, or merged weights.
///
/// ONNX holds the backbone, the method and the head as a graph from images to logits, in f32 and
/// for any batch size; its metadata say how images are prepared and what the classes are called.
/// Merged weights are safetensors that a class of timm or transformers loads without this program;
/// the method must fold into the weights of the backbone (linear probe, LoRA, SSF, RepAdapter, FacT,
/// BitFit, layer norms, full). The backbone must be a ViT. Without --adapter the features of the
/// backbone are written.
#[derive(clap::Args)]
#[command(
    mut_arg("backbone", |arg| arg.help(OF_RUN_BACKBONE)),
    mut_arg("image_size", |arg| arg.help(OF_RUN_SIZE)),
    mut_arg("precision", |arg| arg.help(
        "Dtype of the frozen weights while they are opened; the file has f32 [default: that of the run]"
    )),
    mut_arg("normalization", |arg| arg.help(
        "Mean and standard deviation that the metadata say, if the adapter does not: imagenet, half, unit or clip [default: those of the run]"
    )),
    mut_arg("out", |arg| arg.required(true).value_name("FILE").help("File to write")),
    after_long_help = "Examples:\n  convpass export --adapter runs/pets --out pets.onnx\n  convpass export --adapter runs/lora --format safetensors --names timm --out merged.safetensors"
)]
pub struct ExportArgs {
    /// Adapter: its file, or the folder of its run.
    #[arg(long, value_name = "PATH")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    threads: ThreadFlags,
    #[command(flatten)]
    normalization: NormalizationFlag,
    #[command(flatten)]
    backbone: BackboneFlags,
    #[command(flatten)]
    out: OutFlag,
    /// Kind of file.
    #[arg(long, value_enum, default_value_t = Form::Onnx, help_heading = "Output")]
    format: Form,
    /// Library whose names the weights have, with --format safetensors.
    #[arg(long, value_enum, value_name = "LIBRARY", help_heading = "Output")]
    names: Option<NamesFlag>,
    /// Write the features in place of the logits, without the head.
    #[arg(long, help_heading = "Output")]
    features: bool,
    /// Write the weights of an ONNX model to FILE.data, whatever their size; weights of more than
    /// 2 GiB are always written there.
    #[arg(long, help_heading = "Output")]
    external_data: bool,
    /// Overwrite a file that exists.
    #[arg(long, help_heading = "Output")]
    force: bool,
}

/// A kind of file.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Form {
    /// An ONNX graph.
    Onnx,
    /// Merged weights.
    Safetensors,
}

/// A library by whose names weights are written.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum NamesFlag {
    /// timm.
    Timm,
    /// Hugging Face transformers.
    Huggingface,
}

impl From<NamesFlag> for WeightNames {
    fn from(names: NamesFlag) -> Self {
        match names {
            NamesFlag::Timm => WeightNames::Timm,
            NamesFlag::Huggingface => WeightNames::HuggingFace,
        }
    }
}

/// What is exported.
#[expect(clippy::large_enum_variant, reason = "there is one")]
enum Exported {
    Model(PetlModel<AnyBackbone>),
    Backbone(AnyBackbone),
}

pub fn run(args: &ExportArgs) -> Result<Outcome> {
    let names = names(args)?;
    args.threads.apply()?;
    let out = args.out.folder(PathBuf::new);
    check_free(&out, args.force)?;
    let (exported, preprocessing) = open(args, &out)?;
    match names {
        None => write_onnx(args, &exported, preprocessing.as_ref(), &out)?,
        Some(names) => {
            let merged = match &exported {
                Exported::Model(model) if args.features => MergedWeights::features(model, names),
                Exported::Model(model) => MergedWeights::new(model, names),
                Exported::Backbone(backbone) => MergedWeights::of_backbone(backbone, names),
            }?;
            merged.save(&out)?;
            println!("{}: weights of the class {}", out.display(), merged.class());
        }
    }
    Ok(Outcome::Done)
}

/// Returns the names of the weights; `None` for ONNX.
fn names(args: &ExportArgs) -> Result<Option<WeightNames>> {
    let usage = |text: &str| Err(Usage(text.to_owned()).into());
    match (args.format, args.names) {
        (Form::Onnx, Some(_)) => usage("--names needs --format safetensors"),
        (Form::Safetensors, None) => usage("--format safetensors needs --names"),
        (Form::Safetensors, _) if args.external_data => {
            usage("--external-data needs --format onnx")
        }
        _ if args.adapter.is_none() && args.backbone.backbone.is_none() => {
            usage("--adapter or --backbone is needed")
        }
        (_, names) => Ok(names.map(WeightNames::from)),
    }
}

/// Checks before anything is loaded that the file can be written.
fn check_free(out: &Path, force: bool) -> Result<()> {
    if out.is_dir() {
        bail!("{}: it is a folder; --out is the file to write", out.display());
    }
    let mut data = out.as_os_str().to_owned();
    data.push(".data");
    let files = [out, Path::new(&data)];
    if let Some(file) = files.into_iter().find(|file| !force && file.exists()) {
        bail!("{}: the file exists; --force overwrites it", file.display());
    }
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    std::fs::metadata(folder).with_context(|| folder.display().to_string())?;
    Ok(())
}

/// Checks that the file is none of those that the model is read from.
fn check_other(out: &Path, read: &[&Path]) -> Result<()> {
    let Ok(out) = out.canonicalize() else { return Ok(()) };
    match read.iter().find(|file| file.canonicalize().is_ok_and(|file| file == out)) {
        Some(file) => bail!("{}: the model is read from this file", file.display()),
        None => Ok(()),
    }
}

/// Opens the model, and returns the preprocessing of its images if it is not its own.
fn open(args: &ExportArgs, out: &Path) -> Result<(Exported, Option<Preprocessing>)> {
    let flag = args.normalization.normalization;
    let Some(adapter) = &args.adapter else {
        let file = args.backbone.checkpoint()?;
        check_other(out, &[file])?;
        let Opened { backbone } = args.backbone.open(file)?;
        let given = flag.map(|flag| backbone.preprocessing().clone().with_normalization(flag));
        return Ok((Exported::Backbone(backbone), given));
    };
    let trained = TrainedAdapter::read(adapter)?;
    let file = trained.checkpoint(&args.backbone)?;
    check_other(out, &[&trained.file, &trained.beside, &file])?;
    let flags = trained.flags(&args.backbone)?;
    if flags.precision() != Precision::F32 {
        let precision = flags.precision();
        eprintln!("the model computes in {precision}; the file computes in f32 from its weights");
    }
    let opened = flags.open(&file)?;
    let given = preprocessing(&trained, &opened, flag)?;
    let model = PetlModel::load_adapter(opened.backbone, &trained.file)?;
    Ok((Exported::Model(model), given))
}

/// Returns the preprocessing of the run or of the flag, if the adapter does not have its own. It is
/// never guessed, because a wrong one changes every probability.
fn preprocessing(
    trained: &TrainedAdapter,
    opened: &Opened,
    flag: Option<Normalization>,
) -> Result<Option<Preprocessing>> {
    let own = trained.info.backbone.as_ref().and_then(|backbone| backbone.preprocessing.clone());
    let record = trained.record.as_ref();
    let shorter_side = record.and_then(|record| record.test_shorter_side);
    match (own, flag.or(record.map(|record| record.train.normalization))) {
        (Some(own), _) => Ok(flag.map(|flag| own.with_normalization(flag))),
        (None, Some(normalization)) => Ok(Some(opened.preprocessing(normalization, shorter_side))),
        (None, None) => bail!(
            "--normalization is needed: there is no {}, and {} does not say how images are \
             prepared",
            trained.beside.display(),
            trained.file.display()
        ),
    }
}

fn write_onnx(
    args: &ExportArgs,
    exported: &Exported,
    preprocessing: Option<&Preprocessing>,
    out: &Path,
) -> Result<()> {
    let mut onnx = match exported {
        Exported::Model(model) if args.features => OnnxModel::features(model),
        Exported::Model(model) => OnnxModel::new(model),
        Exported::Backbone(backbone) => OnnxModel::of_backbone(backbone),
    }?;
    if let Some(preprocessing) = preprocessing {
        onnx.set_preprocessing(preprocessing);
    }
    let files = if args.external_data { onnx.save_with_data(out) } else { onnx.save(out) }?;
    let with_data = files
        .data
        .map_or(String::new(), |data| format!(", with its weights in {}", data.display()));
    println!("{}: ONNX, operators of version {}{with_data}", out.display(), OnnxModel::OPSET);
    Ok(())
}
