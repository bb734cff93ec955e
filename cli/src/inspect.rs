//! `convpass inspect`: what a checkpoint holds, and where each of its settings comes from.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Result, bail};
use convpass::backbone::{Backbone, PreprocessingSource};
use convpass::checkpoint::{LoadReport, TensorFile};
use serde::Serialize;

use crate::Outcome;
use crate::flags::{BackboneFlags, FormatFlag, Opened, OutputFormat};

/// Opens a checkpoint and prints what it holds: family, shape, settings, preprocessing, tensors.
///
/// Each setting that no tensor shows is printed with its origin: a file beside the weights, the
/// known shape of a published model, the names of the tensors, a flag, or an assumption.
#[derive(clap::Args)]
#[command(
    mut_arg("backbone", |flag| flag.hide(true).conflicts_with("file")),
    after_long_help = "Example:\n  convpass inspect model.safetensors"
)]
pub struct InspectArgs {
    /// Checkpoint of a backbone: a file, or a folder that holds one.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Also list the tensors that are not used, each with the reason.
    #[arg(long)]
    skipped: bool,
    #[command(flatten)]
    backbone: BackboneFlags,
    #[command(flatten)]
    format: FormatFlag,
}

/// What is printed of a checkpoint.
#[derive(Serialize)]
struct Inspected {
    file: PathBuf,
    container: String,
    family: &'static str,
    /// Number of weights, without those that the features do not need.
    weights: i64,
    blocks: usize,
    features: i64,
    settings: Vec<Line>,
    tensors_used: usize,
    tensors_skipped: Vec<(String, String)>,
}

/// A setting and its origin.
#[derive(Serialize)]
struct Line {
    name: String,
    value: String,
    source: String,
}

pub fn run(args: &InspectArgs) -> Result<Outcome> {
    let (opened, report) = args.backbone.open_reported(&args.file)?;
    let file = TensorFile::open(&args.file)?;
    let found = inspected(&file, &opened, report);
    let mut out = io::stdout().lock();
    match args.format.format {
        OutputFormat::Text => print_text(&mut out, &found, args.skipped)?,
        OutputFormat::Json => writeln!(out, "{}", serde_json::to_string_pretty(&found)?)?,
        OutputFormat::Csv => bail!("--format csv: inspect prints text or json"),
    }
    Ok(Outcome::Done)
}

fn inspected(file: &TensorFile, opened: &Opened, report: LoadReport) -> Inspected {
    let backbone = &opened.backbone;
    let settings = report.settings.into_iter().map(|setting| Line {
        name: setting.name.to_owned(),
        value: setting.value,
        source: setting.source.to_string(),
    });
    Inspected {
        file: file.path().to_path_buf(),
        container: format!("{:?}", file.container()),
        family: backbone.family(),
        weights: backbone.shape().num_feature_params,
        blocks: backbone.num_blocks(),
        features: backbone.feature_dim(),
        settings: settings.chain(preprocessing(opened)).collect(),
        tensors_used: report.applied.len(),
        tensors_skipped: report.skipped,
    }
}

/// Returns the values of the preprocessing, which have one origin.
fn preprocessing(opened: &Opened) -> Vec<Line> {
    let found = opened.backbone.preprocessing();
    let source = match &found.source {
        PreprocessingSource::Caller => "given by the caller".to_owned(),
        source => source.to_string(),
    };
    let (height, width) = found.image_size;
    let values = [
        ("preprocessing.image_size", format!("{height}x{width}")),
        ("preprocessing.resize", format!("{:?}", found.resize)),
        ("preprocessing.interpolation", format!("{:?}", found.interpolation)),
        ("preprocessing.mean", format!("{:?}", found.mean)),
        ("preprocessing.std", format!("{:?}", found.std)),
    ];
    let line = |(name, value): (&str, String)| Line {
        name: name.to_owned(),
        value,
        source: source.clone(),
    };
    values.into_iter().map(line).collect()
}

fn print_text(out: &mut impl Write, found: &Inspected, skipped: bool) -> io::Result<()> {
    writeln!(out, "{}: {}, {}", found.file.display(), found.container, found.family)?;
    writeln!(
        out,
        "{} weights, {} blocks, features of width {}",
        found.weights, found.blocks, found.features
    )?;
    let widest = |text: fn(&Line) -> &str| {
        found.settings.iter().map(|line| text(line).len()).max().unwrap_or_default()
    };
    let (name, value) = (widest(|line| &line.name), widest(|line| &line.value));
    for line in &found.settings {
        writeln!(out, "  {:<name$}  {:<value$}  {}", line.name, line.value, line.source)?;
    }
    let count = found.tensors_skipped.len();
    writeln!(out, "{} tensors used, {count} skipped", found.tensors_used)?;
    for (tensor, reason) in found.tensors_skipped.iter().filter(|_| skipped) {
        writeln!(out, "  {tensor}: {reason}")?;
    }
    Ok(())
}
