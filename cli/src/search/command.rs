//! `convpass search`: searches widths for each block within a parameter budget, as NOAH does.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use convpass::data::bundled::{self, BundledTask};
use convpass::data::vtab::{VtabFolder, VtabSplit};
use convpass::data::{ImageDataset, Normalization, Resize};
use convpass::eval::evaluate;
use convpass::train::{
    CosineSchedule, EpochReport, Observer, Progress, StepReport, Stepped, TrainConfig, fit,
};
use convpass::{AnyBackbone, Backbone, Method, PetlConfig, PetlModel, Preprocessing};
use serde_json::{Value, json};

use super::{Evolution, EvolutionConfig, SearchModule, SearchSpace, Supernet, Widths, evolve};
use crate::Outcome;
use crate::flags::{
    BackboneFlags, DataFlag, EpochFlags, ForceFlag, InputFlags, Opened, OrientationFlag, OutFlag,
    SeedFlag, SurveyFlags, ThreadFlags, bundled_backbone, default_warmup,
};
use crate::run_folder::FolderLock;
use crate::stop::Stop;
use crate::survey;

/// Searches widths of Adapter, LoRA and prompts for each block within a parameter budget.
///
/// A supernet whose parts share weights is trained on 800 images, an evolution over its parts
/// scores them on the 200 validation images, and the best mix is trained anew on all 1,000 and
/// tested once (NOAH, arXiv 2206.04673). Without --backbone it runs a bundled task on the bundled
/// ViT, with settings that take minutes. --out receives method.json for `finetune --method`,
/// adapter.safetensors and search.json.
#[derive(clap::Args)]
#[command(
    mut_arg("data", |arg| arg.help(
        "Folder that holds one folder for each task; a bundled task is written here [default: data]"
    )),
    mut_arg("backbone", |arg| arg.help(
        "Checkpoint of a ViT, CLIP or DINOv2: a file, or a folder that holds one [default: the bundled ViT]"
    )),
    mut_arg("batch_size", |arg| arg.help("Images in a batch [default: 64; 50 for bundled tasks]")),
    mut_arg("normalization", |arg| arg.help(
        "Mean and standard deviation that pixels are normalized with: imagenet, half, unit or clip [default: those of the backbone; half for the bundled ViT]"
    )),
    mut_arg("epochs", |arg| arg.help(
        "Epochs of the mix that was found [default: 100; 4 for bundled tasks]"
    )),
    mut_arg("lr", |arg| arg.help(
        "Peak learning rate of the mix that was found [default: 1e-3; 1e-2 for bundled tasks]"
    )),
    mut_arg("out", |arg| arg.help("Folder for the results [default: runs/TASK-search]")),
    after_long_help = "Example:\n  convpass search --data vtab-1k --task dtd --backbone vit_base_patch16_224.safetensors --budget 330000"
)]
pub struct SearchArgs {
    #[command(flatten)]
    threads: ThreadFlags,
    #[command(flatten)]
    data: DataFlag,
    /// Name of the folder of the task; without --backbone: count, location, orientation or digits.
    #[arg(long, value_name = "NAME", default_value = "count", help_heading = "Data")]
    task: String,
    #[command(flatten)]
    input: InputFlags,
    #[command(flatten)]
    orientation: OrientationFlag,
    #[command(flatten)]
    survey: SurveyFlags,
    #[command(flatten)]
    backbone: BackboneFlags,
    /// Most weights that the mix may train, without the head [default: half of the supernet's].
    #[arg(long, value_name = "N", help_heading = "Search")]
    budget: Option<i64>,
    /// Widths to choose from in each block, separated by commas; 0 leaves the module out.
    #[arg(
        long,
        value_name = "N,..",
        value_delimiter = ',',
        default_value = "0,1,5,10",
        help_heading = "Search"
    )]
    widths: Vec<i64>,
    /// Epochs of the supernet [default: 500; 12 for bundled tasks].
    #[arg(long, value_name = "N", help_heading = "Search")]
    supernet_epochs: Option<usize>,
    /// Peak learning rate of the supernet [default: 5e-4; 1e-2 for bundled tasks].
    #[arg(long, value_name = "RATE", help_heading = "Search")]
    supernet_lr: Option<f64>,
    /// Generations of the evolution, of which the first is random [default: 15; 6 for bundled
    /// tasks].
    #[arg(long, value_name = "N", help_heading = "Search")]
    generations: Option<usize>,
    /// Candidates in each generation [default: 50; 12 for bundled tasks].
    #[arg(long, value_name = "N", help_heading = "Search")]
    population: Option<usize>,
    /// Best candidates so far that become parents [default: 10; 4 for bundled tasks].
    #[arg(long, value_name = "N", help_heading = "Search")]
    parents: Option<usize>,
    /// Probability that a width of a mutant is drawn anew.
    #[arg(long, value_name = "RATE", default_value_t = 0.2, help_heading = "Search")]
    mutation_rate: f64,
    #[command(flatten)]
    found: EpochFlags,
    #[command(flatten)]
    seed: SeedFlag,
    #[command(flatten)]
    out: OutFlag,
    #[command(flatten)]
    force: ForceFlag,
}

/// The default values of flags.
struct Defaults {
    /// Epochs and learning rate of the supernet, and of the mix that was found.
    supernet: (usize, f64),
    found: (usize, f64),
    batch_size: usize,
    stepped: Stepped,
    generations: usize,
    population: usize,
    parents: usize,
}

/// The settings of NOAH for VTAB-1k, with the learning rate schedule of this crate's other runs.
const PUBLISHED: Defaults = Defaults {
    supernet: (500, 5e-4),
    found: (100, 1e-3),
    batch_size: 64,
    stepped: Stepped::AfterEpoch,
    generations: 15,
    population: 50,
    parents: 10,
};

/// The settings for bundled tasks, with which a search takes minutes.
const BUNDLED: Defaults = Defaults {
    supernet: (12, 1e-2),
    found: (4, 1e-2),
    batch_size: 50,
    stepped: Stepped::EachStep,
    generations: 6,
    population: 12,
    parents: 4,
};

pub fn run(args: &SearchArgs) -> Result<Outcome> {
    args.threads.apply()?;
    let stop = Stop::on_ctrl_c("ending after this step")?;
    let data = args.data.folder();
    let (file, bundled) = match &args.backbone.backbone {
        Some(file) => (file.clone(), false),
        None => (bundled_backbone(data)?, true),
    };
    let _guard = args.backbone.precision().guard(args.backbone.device.device()?)?;
    let opened = args.backbone.open(&file)?;
    if bundled {
        let task: BundledTask = args.task.parse()?;
        bundled::write(data, task, opened.image_size().0, 0)?;
    }
    let half = bundled.then_some(Normalization::Half);
    let normalization = opened.normalization(args.input.images.normalization.or(half));
    let defaults = if bundled { &BUNDLED } else { &PUBLISHED };
    let folder = vec![VtabFolder::open(data, &args.task)?];
    let (mut folder, skipped) = survey::readable_tasks(folder, args.survey, args.threads)?;
    let folder = folder.pop().context("there is no task")?;
    SearchJob { args, defaults, file, opened, folder, skipped, normalization, stop: &stop }
        .run()?;
    Ok(Outcome::unless_stopped(&stop))
}

/// One search.
struct SearchJob<'a> {
    args: &'a SearchArgs,
    defaults: &'static Defaults,
    file: PathBuf,
    opened: Opened,
    folder: VtabFolder,
    /// The number of images that cannot be read and are skipped.
    skipped: usize,
    normalization: Normalization,
    stop: &'a Stop,
}

impl SearchJob<'_> {
    fn run(&self) -> Result<()> {
        let (args, start) = (self.args, Instant::now());
        let modules = SearchModule::noah().into_iter();
        let modules = modules.map(|module| SearchModule { widths: args.widths.clone(), ..module });
        let space = SearchSpace::new(modules.collect(), &self.opened.backbone.shape())?;
        let widest = space.num_params(&space.widest())?;
        let budget = args.budget.unwrap_or(widest / 2);
        // An error must come before the supernet is trained, which takes longest.
        space.check_budget(budget)?;
        let evolution = self.evolution_config();
        evolution.validate()?;
        println!("{}: budget {budget} of the supernet's {widest} weights", args.task);
        let out = args.out.folder(|| PathBuf::from(format!("runs/{}-search", args.task)));
        let _lock = FolderLock::take(&out)?;
        let file = out.join("search.json");
        if file.exists() && !args.force.force {
            bail!("{}: use --force to replace it, or choose another --out", file.display());
        }

        let (backbone, classes) = (self.opened.backbone.clone(), self.folder.num_classes());
        let mut supernet = Supernet::new(backbone, space, classes, args.seed.seed)?;
        let (epochs, lr) = (args.supernet_epochs, args.supernet_lr);
        let config = self.training(epochs, lr, self.defaults.supernet);
        let train = self.load(VtabSplit::Train800)?;
        let mut watch = self.watch("supernet");
        let supernet_fit = supernet.train(&train, &config, &mut watch)?;
        let history = self.evolve(&supernet, budget, &evolution)?;
        let retrained = self.found(&supernet, &history, &out)?;
        let seconds = start.elapsed().as_secs_f64();
        let record = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "task": args.task,
            "backbone": self.file.display().to_string(),
            "backbone_digest": self.opened.backbone.digest()?,
            "modules": supernet.space().modules(),
            "budget": budget,
            "supernet": { "train": config, "fit": supernet_fit },
            "evolution": evolution,
            "history": history,
            "found": history.best(),
            "retrained": retrained,
            "orientation": self.args.orientation.orientation(),
            "skipped": self.skipped,
            "seconds": seconds,
        });
        write(&file, serde_json::to_string_pretty(&record)?)?;
        println!("{seconds:.1} s, {}", out.display());
        Ok(())
    }

    fn evolution_config(&self) -> EvolutionConfig {
        let (args, defaults) = (self.args, self.defaults);
        EvolutionConfig {
            generations: args.generations.unwrap_or(defaults.generations),
            population: args.population.unwrap_or(defaults.population),
            parents: args.parents.unwrap_or(defaults.parents),
            mutation_rate: args.mutation_rate,
            seed: args.seed.seed,
        }
    }

    /// Runs the evolution; the score of a candidate is its top-1 on the 200 validation images.
    fn evolve(
        &self,
        supernet: &Supernet<AnyBackbone>,
        budget: i64,
        config: &EvolutionConfig,
    ) -> Result<Evolution> {
        let (val, mut watch) = (self.load(VtabSplit::Val200)?, self.watch("search"));
        let (mut count, all) = (0, config.generations.saturating_mul(config.population));
        let mut score = |widths: &Widths| {
            count += 1;
            let label = format!("candidate {count} of {all}, image");
            let top1 = self.top1(&supernet.subnet(widths)?, &val, &label, &mut watch)?;
            Ok(top1.map_or(ControlFlow::Break(()), ControlFlow::Continue))
        };
        Ok(evolve(supernet.space(), budget, config, &mut score)?)
    }

    /// Prints the best mix of the search, trains it anew, and returns the result.
    fn found(
        &self,
        supernet: &Supernet<AnyBackbone>,
        history: &Evolution,
        out: &Path,
    ) -> Result<Value> {
        for (index, candidates) in history.generations.iter().enumerate() {
            let scores = candidates.iter().map(|candidate| candidate.score);
            let best = scores.clone().fold(0.0, f64::max);
            let mean = scores.sum::<f64>() / candidates.len() as f64;
            println!("generation {}: val top-1 best {best:.2} %, mean {mean:.2} %", index + 1);
        }
        let Some(best) = history.best() else { return Ok(Value::Null) };
        println!(
            "found: {} weights, val top-1 {:.2} % as a part of the supernet; widths by block:",
            best.params, best.score
        );
        for (module, blocks) in supernet.space().modules().iter().zip(&best.widths.0) {
            let blocks: String = blocks.iter().map(|width| format!("{width:>4}")).collect();
            println!("  {:<8}{blocks}", module.method.name());
        }
        let method = supernet.space().method(&best.widths)?;
        write(&out.join("method.json"), serde_json::to_string(&method)?)?;
        if self.stop.is_asked() { Ok(Value::Null) } else { self.retrain(method, out) }
    }

    /// Trains a mix from new weights on the 1,000 images, and tests it.
    fn retrain(&self, method: Method, out: &Path) -> Result<Value> {
        let args = self.args;
        let train = self.load(VtabSplit::Train800Val200)?;
        let mut watch = self.watch("found");
        let mut config = PetlConfig::new(method, self.folder.num_classes());
        config.seed = args.seed.seed;
        let mut model = PetlModel::new(self.opened.backbone.clone(), &config)?;
        let preprocessing = self.opened.preprocessing(self.normalization, None);
        let orientation = args.orientation.orientation();
        model.set_preprocessing(Preprocessing { orientation, ..preprocessing });
        let train_config = self.training(args.found.epochs, args.found.lr, self.defaults.found);
        let fit = fit(&mut model, &train, None, &train_config, &mut watch)?;
        model.save_adapter(out.join("adapter.safetensors"))?;
        let test_top1 =
            if fit.stopped { None } else { self.top1(&model, &self.test()?, "test", &mut watch)? };
        let params = model.trainable_params();
        match test_top1 {
            Some(top1) => println!("trained anew: {params}; top-1 {top1:.2} % on the test images"),
            None => println!("stopped before the test"),
        }
        Ok(json!({
            "model": config,
            "train": train_config,
            "fit": fit,
            "trainable_params": params,
            "test_top1": test_top1,
        }))
    }

    /// Returns top-1 in percent, or `None` if Ctrl-C ended the pass.
    fn top1(
        &self,
        model: &PetlModel<AnyBackbone>,
        images: &ImageDataset,
        label: &str,
        watch: &mut SearchWatch,
    ) -> crate::error::Result<Option<f64>> {
        let batch_size = self.args.input.batches.or(self.defaults.batch_size);
        let mut pass = |done, images| watch.pass(label, done, images);
        let sums = evaluate(model, images, self.normalization, batch_size, &mut pass)?;
        Ok((sums.images == images.len()).then(|| sums.top1()))
    }

    fn training(&self, epochs: Option<usize>, lr: Option<f64>, or: (usize, f64)) -> TrainConfig {
        let (epochs, lr) = (epochs.unwrap_or(or.0), lr.unwrap_or(or.1));
        let (warmup_epochs, stepped) = (default_warmup(epochs), self.defaults.stepped);
        TrainConfig {
            epochs,
            batch_size: self.args.input.batches.or(self.defaults.batch_size),
            schedule: CosineSchedule { warmup_epochs, stepped, ..CosineSchedule::with_lr(lr) },
            normalization: self.normalization,
            seed: self.args.seed.seed,
            ..TrainConfig::default()
        }
    }

    fn watch(&self, label: &str) -> SearchWatch {
        SearchWatch(Progress::new(label), self.stop.clone())
    }

    fn load(&self, split: VtabSplit) -> Result<ImageDataset> {
        Ok(ImageDataset::load_resized(self.folder.split(split), self.resize()?)?)
    }

    fn resize(&self) -> Result<Resize> {
        let resize = Resize::bicubic(self.opened.image_size())?;
        Ok(resize.with_orientation(self.args.orientation.orientation()))
    }

    /// Returns the test images. Each is decoded when it is used, because all may not fit in memory.
    fn test(&self) -> Result<ImageDataset> {
        let images = ImageDataset::stream(self.folder.split(VtabSplit::Test), self.resize()?);
        Ok(self.args.threads.decoding(images))
    }
}

fn write(path: &Path, text: String) -> Result<()> {
    std::fs::write(path, text + "\n").with_context(|| path.display().to_string())
}

/// Shows the progress bar, and ends the search on Ctrl-C.
struct SearchWatch(Progress, Stop);

impl Observer for SearchWatch {
    fn reads_step(&mut self, steps_done: usize) -> bool {
        self.0.reads_step(steps_done)
    }

    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        let _shown = self.0.step(step);
        self.1.flow()
    }

    fn pass(&mut self, label: &str, done: usize, images: usize) -> ControlFlow<()> {
        let _shown = self.0.pass(label, done, images);
        self.1.flow()
    }

    fn epoch(&mut self, epoch: &EpochReport) {
        self.0.epoch(epoch);
    }
}
