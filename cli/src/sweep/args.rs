//! The command line of `convpass sweep`, and the plan that its flags describe.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use convpass::Method;
use convpass::petl::{ConvInit, SubLayers};
use serde_json::{Value, json};

use crate::flags::{
    BackboneFlags, BypassFlags, DataFlag, InputFlags, LooksFlag, MethodArg, OrientationFlag,
    OutFlag, SeedsFlag, SurveyFlags, ThreadFlags, TrainingFlags, parse_method,
};
use crate::plan::{PlanMethod, RunSettings, Setting, SweepPlan};

/// The flags for settings that a plan file sets. None of them can be used with `--plan`.
const SAID_BY_A_PLAN: [&str; 19] = [
    "methods",
    "seeds",
    "tasks",
    "grid",
    "bottleneck_dim",
    "scale",
    "init",
    "sub_layers",
    "sequential",
    "kernel_size",
    "dropout",
    "drop_path",
    "epochs",
    "warmup_epochs",
    "schedule",
    "batch_size",
    "lr",
    "head_lr",
    "weight_decay",
];

/// Runs tasks x methods x seeds, selects settings on validation images alone, and prints a table.
///
/// A plan file (--plan) or the flags define the runs. Without --tasks they are the 19 tasks of
/// VTAB-1k with their published settings. With a grid, each setting trains on 800 images, the best
/// on the 200 validation images is selected, and only the runs on all 1,000 see the test images,
/// once. The same command continues after a stop: finished runs are skipped. Started several times,
/// also on several machines that share the folders, it divides the runs among the processes. --out
/// receives a folder for each run, results.csv and results.json.
#[derive(clap::Args, Clone)]
#[command(
    args_override_self = true,
    mut_arg("data", |arg| arg.help(
        "Folder that holds one folder for each task; bundled tasks are written here [default: the plan's, else data]"
    )),
    mut_arg("backbone", |arg| arg.help(
        "Checkpoint of the frozen backbone: a file, or a folder that holds one [default: the plan's, else the bundled ViT]"
    )),
    mut_arg("seeds", |arg| arg.help(
        "Seeds, separated by commas: one run for each. Trials use the first"
    )),
    mut_arg("threads", |arg| arg.help(
        "Threads of each run, which compute and decode images [default: the cores divided by --jobs]"
    )),
    mut_arg("out", |arg| arg.help("Folder for the results [default: runs/PLAN, else runs/all]")),
    after_long_help = "Examples:\n  convpass sweep --data vtab-1k --backbone vit_base_patch16_224.safetensors --methods convpass,lora --seeds 0,1,2\n  convpass sweep --plan cli/plans/bundled.toml"
)]
pub struct SweepArgs {
    /// TOML file that defines the runs. Flags for what a plan sets, such as --methods, cannot be
    /// used with it.
    #[arg(long, value_name = "FILE", conflicts_with_all = SAID_BY_A_PLAN)]
    plan: Option<PathBuf>,
    /// Runs at the same time [default: as many as cores for a small backbone, else 1].
    #[arg(long, value_name = "N")]
    pub jobs: Option<NonZeroUsize>,
    #[command(flatten)]
    pub threads: ThreadFlags,
    #[command(flatten)]
    pub data: DataFlag,
    /// Names of the folders of the tasks, separated by commas [default: the 19 tasks of VTAB-1k].
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', help_heading = "Data")]
    tasks: Option<Vec<String>>,
    #[command(flatten)]
    pub input: InputFlags,
    #[command(flatten)]
    pub orientation: OrientationFlag,
    #[command(flatten)]
    pub survey: SurveyFlags,
    #[command(flatten)]
    pub backbone: BackboneFlags,
    /// Names of the methods, separated by commas. convpass has the published scale and init of each
    /// task unless a flag says otherwise.
    #[arg(
        long,
        value_name = "NAME,..",
        value_delimiter = ',',
        default_value = "convpass",
        help_heading = "Method"
    )]
    methods: Vec<String>,
    /// Values to try for a field of the config of a method, or for lr, head_lr, weight_decay,
    /// drop_path, epochs and the like. May be repeated: every combination is tried.
    #[arg(long, value_name = "FIELD=A,B,..", help_heading = "Method")]
    grid: Vec<String>,
    #[command(flatten)]
    bypass: BypassFlags,
    #[command(flatten)]
    pub training: TrainingFlags,
    #[command(flatten)]
    pub looks: LooksFlag,
    #[command(flatten)]
    seeds: SeedsFlag,
    #[command(flatten)]
    out: OutFlag,
    /// If a folder holds a run of other settings, move it aside and run anew; without this flag
    /// such a run is an error.
    #[arg(long, help_heading = "Output")]
    pub set_aside: bool,
    /// Print how far the plan is, and which process makes which run, and start nothing.
    #[arg(long, conflicts_with = "set_aside", help_heading = "Output")]
    pub status: bool,
}

impl SweepArgs {
    /// Returns the plan of `--plan`, or the plan that the flags describe.
    pub fn plan(&self) -> Result<SweepPlan> {
        let plan = match &self.plan {
            Some(file) => SweepPlan::read(file)?,
            None => self.plan_of_flags()?,
        };
        plan.validate()?;
        Ok(plan)
    }

    /// Returns the folder of the results.
    pub fn out(&self) -> PathBuf {
        let name = self.plan.as_deref().and_then(|file| file.file_stem());
        self.out.folder(|| PathBuf::from("runs").join(name.unwrap_or("all".as_ref())))
    }

    fn plan_of_flags(&self) -> Result<SweepPlan> {
        let methods = self.methods.iter().map(|name| self.method(name));
        let methods = methods.collect::<Result<Vec<_>>>()?;
        if !methods.iter().any(|method| matches!(method.method, Method::ConvBypass(_))) {
            self.bypass.refuse("convpass among --methods")?;
        }
        let training = &self.training;
        let mut plan = SweepPlan {
            seeds: self.seeds.seeds.clone(),
            methods,
            train: RunSettings {
                epochs: Some(training.epochs()),
                batch_size: Some(self.input.batch_size()),
                lr: Some(training.lr()),
                head_lr: training.head_lr,
                warmup_epochs: training.warmup_epochs,
                stepped: Some(training.schedule.into()),
                weight_decay: Some(training.weight_decay()),
                drop_path: training.drop_path,
                normalization: self.input.images.normalization,
            },
            ..SweepPlan::default()
        };
        if let Some(tasks) = &self.tasks {
            plan.tasks = tasks.clone();
        }
        for grid in &self.grid {
            add_to_grids(&mut plan, grid)?;
        }
        Ok(plan)
    }

    /// Returns a method by name; if it is Convpass, with the flags of the bypass.
    fn method(&self, name: &str) -> Result<PlanMethod> {
        let attention = matches!(name, "convpass_attention" | "convpass-attention");
        let parsed = parse_method(if attention { "convpass" } else { name });
        let MethodArg { method, .. } =
            parsed.map_err(|reason| anyhow!("--methods {name}: {reason}"))?;
        let mut planned = PlanMethod::new(name, method);
        if let Method::ConvBypass(config) = &mut planned.method {
            *config = self.bypass.config("");
            if attention {
                config.sub_layers = SubLayers::Attention;
            }
            planned.published = true;
            // A grid overrides the published choices, so the flags are put into the grid.
            let scale = self.bypass.scale.map(|scale| ("scale", json!(scale)));
            let init = self.bypass.init.map(|init| ("conv_init", json!(ConvInit::from(init))));
            for (field, value) in scale.into_iter().chain(init) {
                planned.grid.insert(field.to_owned(), vec![value]);
            }
        }
        Ok(planned)
    }
}

/// Adds `FIELD=A,B,..` to the grid of each method that has the field.
fn add_to_grids(plan: &mut SweepPlan, grid: &str) -> Result<()> {
    let Some((field, values)) = grid.split_once('=') else {
        bail!("--grid {grid}: expected FIELD=A,B,..");
    };
    // A value that is not JSON is a name, such as `identity`.
    let value = |text: &str| serde_json::from_str(text).unwrap_or(Value::from(text));
    let values: Vec<Value> = values.split(',').map(value).collect();
    let has_field: Vec<bool> = plan
        .methods
        .iter()
        .map(|method| {
            let setting = Setting([(field.to_owned(), values[0].clone())].into());
            plan.run(method, &setting, "", 1, 0).is_ok()
        })
        .collect();
    if !has_field.contains(&true) {
        bail!("--grid {grid}: no method has a field {field} that can be {}", values[0]);
    }
    for (method, _) in plan.methods.iter_mut().zip(has_field).filter(|(_, has)| *has) {
        method.grid.insert(field.to_owned(), values.clone());
    }
    Ok(())
}
