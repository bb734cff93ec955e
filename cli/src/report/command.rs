//! `convpass report`: shows a folder of runs.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use convpass::data::vtab::{VtabFolder, VtabSplit};
use convpass::data::{FileList, ImageDataset};
use convpass::{Backbone, Method, PetlModel};
use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg;

use super::{BypassView, FoundRun, Predictions, Report};
use crate::flags::{BackboneFlags, BatchFlag, DataFlag, Opened, OutFlag, ThreadFlags};
use crate::run_folder::{class_names, precision_of};
use crate::{Outcome, failure};

/// Shows a folder of runs: one HTML page, charts as SVG and PNG, and tables on the terminal.
///
/// A run is a folder with run.json, at any depth. With --data and --backbone, the adapter of each
/// tested run classifies its test images once, which gives the accuracy by class, the confusions and
/// the mistakes. The result is saved beside run.json. DATA/TASK/classes.txt may hold the names of the
/// classes, one on each line.
#[derive(clap::Args)]
#[command(
    mut_arg("data", |arg| arg.requires("backbone").help(
        "Folder that holds one folder for each task, or the folder of --images for runs on own images, to look at test images; needs --backbone"
    )),
    mut_arg("backbone", |arg| arg.requires("data").help(
        "Checkpoint that the adapters were trained beside: a file, or a folder that holds one; needs --data"
    )),
    mut_arg("precision", |arg| arg.help(
        "Dtype of the frozen weights: f32, bf16, f16, int8, autocast-bf16 or int8-dynamic [default: that of each run]"
    )),
    mut_arg("heads", |arg| arg.requires("backbone")),
    mut_arg("activation", |arg| arg.requires("backbone")),
    mut_arg("norm_placement", |arg| arg.requires("backbone")),
    mut_arg("norm", |arg| arg.requires("backbone")),
    mut_arg("image_size", |arg| arg.requires("backbone")),
    mut_arg("window_size", |arg| arg.requires("backbone")),
    mut_arg("pretrained_windows", |arg| arg.requires("backbone")),
    mut_arg("precision", |arg| arg.requires("backbone")),
    mut_arg("out", |arg| arg.help("Folder for index.html and charts/ [default: RUNS/report]")),
    after_long_help = "Examples:\n  convpass report runs/pets\n  convpass report runs/pets --data data --backbone vit_base_patch16_224.safetensors"
)]
pub struct ReportArgs {
    /// Folder of runs.
    #[arg(default_value = "runs")]
    runs: PathBuf,
    #[command(flatten)]
    threads: ThreadFlags,
    #[command(flatten)]
    data: DataFlag,
    /// Images that the receptive fields of bypasses are averaged over [default: 16].
    #[arg(long, value_name = "N", requires = "backbone", help_heading = "Data")]
    images: Option<usize>,
    /// Compute again what is kept beside run.json.
    #[arg(long, requires = "backbone", help_heading = "Data")]
    fresh: bool,
    #[command(flatten)]
    batches: BatchFlag,
    #[command(flatten)]
    backbone: BackboneFlags,
    #[command(flatten)]
    out: OutFlag,
    /// Leave out the charts as PNG, which need a font on this machine.
    #[arg(long, help_heading = "Output")]
    no_png: bool,
}

pub fn run(args: &ReportArgs) -> Result<Outcome> {
    args.threads.apply()?;
    let mut report = Report::read(&args.runs)?;
    if let (Some(data), Some(file)) = (&args.data.data, &args.backbone.backbone) {
        // Each run has a precision of its own, to which its backbone is converted.
        let flags = BackboneFlags { precision: None, ..args.backbone.clone() };
        Analysis { args, data }.run(&flags.open(file)?, report.runs());
        report = Report::read(&args.runs)?;
    }
    let out = args.out.folder(|| args.runs.join("report"));
    let charts = out.join("charts");
    std::fs::create_dir_all(&charts).with_context(|| charts.display().to_string())?;
    report.save(out.join("index.html"))?;
    let fonts = if args.no_png { None } else { Some(fonts()) };
    for chart in report.charts()? {
        let file = charts.join(&chart.name);
        std::fs::write(file.with_extension("svg"), &chart.svg)
            .with_context(|| file.display().to_string())?;
        if let Some(Ok(fonts)) = &fonts {
            save_png(&chart.svg, fonts, &file.with_extension("png"))?;
        }
    }
    let terminal = console::Term::stdout();
    let width = terminal.size_checked().map_or(100, |(_, columns)| usize::from(columns));
    print!("{}", report.summary(width, console::colors_enabled()));
    if let Some(Err(error)) = fonts {
        eprintln!("warning: no charts as PNG: {}", failure::chain(&error));
    }
    println!("{}", out.join("index.html").display());
    Ok(Outcome::Done)
}

/// Computes the missing predictions and bypass views of each run.
struct Analysis<'a> {
    args: &'a ReportArgs,
    data: &'a Path,
}

impl Analysis<'_> {
    /// Returns the number of images that receptive fields are averaged over.
    fn images(&self) -> usize {
        self.args.images.unwrap_or(16)
    }

    /// Computes what is missing. If that fails for a run, the error is printed and the others
    /// continue.
    fn run(&self, opened: &Opened, runs: &[FoundRun]) {
        for run in runs {
            if let Err(error) = self.compute(opened, run) {
                eprintln!("warning: {}: {}", run.folder.display(), failure::chain(&error));
            }
        }
    }

    fn compute(&self, opened: &Opened, run: &FoundRun) -> Result<()> {
        // A trial, or a run that was ended: its test images are not to be looked at.
        if run.record.test_top1.is_none() {
            return Ok(());
        }
        let method = &run.record.model.method;
        let is_bypass = matches!(method, Method::ConvBypass(_) | Method::ConvBypassVariant(_));
        let predict = self.args.fresh || run.predictions.is_none();
        let look = is_bypass && (self.args.fresh || run.bypass_view.is_none());
        if !predict && !look {
            return Ok(());
        }
        let (test, class_names) = self.test_images(run)?;
        let resize = run.record.test_resize(opened.image_size())?;
        let precision =
            self.args.backbone.precision.map_or_else(|| precision_of(&run.record), Ok)?;
        let _guard = precision.guard(opened.backbone.device())?;
        let backbone = precision.convert(opened.backbone.clone())?;
        let model = PetlModel::load_adapter(backbone, run.folder.join("adapter.safetensors"))?;
        let normalization = run.record.train.normalization;
        if predict {
            let mut watch = |done: usize, all: usize| {
                if done == all {
                    eprintln!("{}: {all} images", run.folder.display());
                }
                ControlFlow::Continue(())
            };
            let batch_size = self.args.batches.batch_size();
            let mut found =
                Predictions::compute(&model, &test, resize, normalization, batch_size, &mut watch)?;
            found.class_names = class_names;
            found.save(run.folder.join(Predictions::FILE))?;
        }
        if look {
            // The same few images in every run.
            let images = ImageDataset::stream(&test, resize);
            BypassView::compute(&model, &images, normalization, self.images())?
                .save(run.folder.join(BypassView::FILE))?;
        }
        Ok(())
    }

    /// Returns the test images of a run and the names of its classes. Those of a run on own images
    /// are in a list in its folder.
    fn test_images(&self, run: &FoundRun) -> Result<(FileList, Vec<String>)> {
        let (record, own) = (&run.record, run.folder.join("test.csv"));
        let names = record.images.class_names.clone();
        if own.is_file() {
            let list = if names.is_empty() {
                FileList::read(self.data, own, Some(record.model.num_classes))?
            } else {
                FileList::read_of(self.data, own, &names)?
            };
            return Ok((list, names));
        }
        let folder = VtabFolder::open(self.data, &record.task)?;
        let of_task = class_names(&folder.path().join("classes.txt"))?;
        let names = if names.is_empty() { of_task } else { names };
        Ok((folder.split(VtabSplit::Test).clone(), names))
    }
}

/// Returns the fonts of the machine, if one of them is sans-serif.
fn fonts() -> Result<Arc<usvg::fontdb::Database>> {
    use usvg::fontdb::{Database, Family, Query};
    let mut fonts = Database::new();
    fonts.load_system_fonts();
    let known = ["DejaVu Sans", "Liberation Sans", "Noto Sans", "Arial", "Helvetica"];
    let has = |fonts: &Database, family: Family| {
        fonts.query(&Query { families: &[family], ..Query::default() }).is_some()
    };
    if let Some(name) = known.into_iter().find(|name| has(&fonts, Family::Name(name))) {
        fonts.set_sans_serif_family(name);
    }
    if has(&fonts, Family::SansSerif) {
        Ok(Arc::new(fonts))
    } else {
        Err(anyhow!("no sans-serif font on this machine (install DejaVu Sans, for one)"))
    }
}

/// Draws the chart at twice its size, for slides.
fn save_png(svg: &str, fonts: &Arc<usvg::fontdb::Database>, file: &Path) -> Result<()> {
    const SCALE: f32 = 2.0;
    let options = usvg::Options { fontdb: fonts.clone(), ..usvg::Options::default() };
    let tree = usvg::Tree::from_str(svg, &options)?;
    let (width, height) = (tree.size().width() * SCALE, tree.size().height() * SCALE);
    let mut pixels = Pixmap::new(width as u32, height as u32).context("a chart without a size")?;
    resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    std::fs::write(file, pixels.encode_png()?).with_context(|| file.display().to_string())
}
