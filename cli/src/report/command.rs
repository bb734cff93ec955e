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
use crate::flags::{BackboneFlags, Opened};
use crate::run_folder::precision_of;
use crate::{Outcome, failure};

/// Shows a folder of runs: one HTML page, charts as SVG and PNG, and tables on the terminal.
///
/// A run is a folder with run.json, at any depth. With --data and --backbone, the adapter of each run
/// that was tested classifies its test images once, for the accuracy by class, the confusions and
/// the mistakes; what is found is kept beside run.json. DATA/TASK/classes.txt may hold the names of
/// the classes, one a line.
#[derive(clap::Args)]
#[command(
    after_long_help = "Example:\n  convpass report runs/pets --data data --backbone vit_base_patch16_224.safetensors"
)]
pub struct Args {
    /// The folder of runs.
    #[arg(default_value = "runs")]
    runs: PathBuf,
    /// Folder for index.html and charts/ [default: RUNS/report].
    #[arg(long)]
    out: Option<PathBuf>,
    /// Folder that holds the folders of the tasks.
    #[arg(long, requires = "backbone")]
    data: Option<PathBuf>,
    /// The checkpoint that the adapters were trained beside.
    #[arg(long, requires = "data")]
    backbone: Option<PathBuf>,
    /// Images that receptive fields are averaged over.
    #[arg(long, value_name = "N", default_value_t = 16)]
    images: usize,
    /// Images at a time.
    #[arg(long, value_name = "N", default_value_t = 64)]
    batch_size: usize,
    #[command(flatten)]
    flags: BackboneFlags,
    /// Compute again what is there already.
    #[arg(long)]
    fresh: bool,
    /// Leave out the charts as PNG, which need a font on this machine.
    #[arg(long)]
    no_png: bool,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let mut report = Report::read(&args.runs)?;
    if let (Some(data), Some(file)) = (&args.data, &args.backbone) {
        // Each run's own precision is brought about below.
        let flags = BackboneFlags { precision: None, ..args.flags.clone() };
        Job { args, data }.run(&flags.open(file)?, report.runs());
        report = Report::read(&args.runs)?;
    }
    let out = args.out.clone().unwrap_or_else(|| args.runs.join("report"));
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
        eprintln!("warning: no charts as PNG: {error}");
    }
    println!("{}", out.join("index.html").display());
    Ok(Outcome::Done)
}

/// Computes what is missing of each run.
struct Job<'a> {
    args: &'a Args,
    data: &'a Path,
}

impl Job<'_> {
    /// Names a run of which something cannot be computed, and goes on with the others.
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
        let folder = VtabFolder::open(self.data, &run.record.task)?;
        let (precision, size) = (
            self.args.flags.precision.map_or_else(|| precision_of(&run.record), Ok)?,
            opened.image_size(),
        );
        let _guard = precision.guard(opened.backbone.device())?;
        let backbone = precision.convert(opened.backbone.clone())?;
        let model = PetlModel::load_adapter(backbone, run.folder.join("adapter.safetensors"))?;
        let (test, normalization) = (folder.split(VtabSplit::Test), run.record.train.normalization);
        if predict {
            let mut watch = |done: usize, all: usize| {
                if done == all {
                    eprintln!("{}: {all} images", run.folder.display());
                }
                ControlFlow::Continue(())
            };
            let batch_size = self.args.batch_size;
            let mut found =
                Predictions::compute(&model, test, size, normalization, batch_size, &mut watch)?;
            found.class_names = class_names(&folder.path().join("classes.txt"))?;
            found.save(run.folder.join(Predictions::FILE))?;
        }
        if look {
            // The same few images in every run.
            let images = first_images(&folder, self.args.images, size)?;
            BypassView::compute(&model, &images, normalization, self.args.images)?
                .save(run.folder.join(BypassView::FILE))?;
        }
        Ok(())
    }
}

fn class_names(file: &Path) -> Result<Vec<String>> {
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(text.lines().map(|line| line.trim().to_owned()).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| file.display().to_string()),
    }
}

/// The first images of a task's test list.
fn first_images(folder: &VtabFolder, count: usize, size: (i64, i64)) -> Result<ImageDataset> {
    let list = folder.split(VtabSplit::Test);
    let lines: Vec<String> = list
        .entries()
        .iter()
        .take(count.max(1))
        .map(|entry| format!("{} {}\n", entry.path, entry.label))
        .collect();
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), lines.concat())?;
    let list = FileList::read(list.root(), file.path(), Some(folder.num_classes()))?;
    Ok(ImageDataset::load(&list, size)?)
}

/// The machine's fonts, if it has one without serifs.
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

/// At twice its size, for slides.
fn save_png(svg: &str, fonts: &Arc<usvg::fontdb::Database>, file: &Path) -> Result<()> {
    const SCALE: f32 = 2.0;
    let options = usvg::Options { fontdb: fonts.clone(), ..usvg::Options::default() };
    let tree = usvg::Tree::from_str(svg, &options)?;
    let (width, height) = (tree.size().width() * SCALE, tree.size().height() * SCALE);
    let mut pixels = Pixmap::new(width as u32, height as u32).context("a chart without a size")?;
    resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    std::fs::write(file, pixels.encode_png()?).with_context(|| file.display().to_string())
}
