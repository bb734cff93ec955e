//! The command line of a sweep, and the plan that its flags say.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Result, bail};
use convpass::Method;
use convpass::petl::SubLayers;
use serde_json::{Value, json};

use crate::finetune::{MethodArg, parse_method};
use crate::flags::{BackboneFlags, BypassFlags, InitFlag, ThreadFlags, TrainingFlags};
use crate::plan::{PlanMethod, RunSettings, Setting, SweepPlan};

/// The flags that say what a plan says; none of them goes with `--plan`.
const SAID_BY_A_PLAN: [&str; 18] = [
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
    "weight_decay",
];

/// Runs tasks x methods x seeds, selects settings on validation images alone, and prints the table.
///
/// Without --tasks these are the 19 tasks of VTAB-1k with their published settings. Runs that are
/// done are skipped, so that the same command goes on after a stop; results.csv and results.json
/// go to --out.
#[derive(clap::Args, Clone)]
#[command(
    args_override_self = true,
    after_long_help = "Examples:\n  convpass sweep --data vtab-1k --backbone vit_base_patch16_224.safetensors --methods convpass,lora --seeds 0,1,2\n  convpass sweep --plan cli/plans/bundled.toml"
)]
pub struct Args {
    /// Folder that holds the folders of the tasks; bundled tasks are written here [default: the plan's, else data].
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Checkpoint of the backbone [default: the plan's, else the bundled ViT].
    #[arg(long)]
    pub backbone: Option<PathBuf>,
    /// Run what a TOML file says.
    #[arg(long, value_name = "FILE", conflicts_with_all = SAID_BY_A_PLAN)]
    plan: Option<PathBuf>,
    /// Names of methods; Convpass has the published s and init of each task where no flag says otherwise.
    #[arg(long, value_delimiter = ',', default_value = "convpass")]
    methods: Vec<String>,
    /// Seeds of the runs; the first is the seed of the trials too.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1, 2], allow_negative_numbers = true)]
    seeds: Vec<i64>,
    /// Names of the tasks' folders [default: the 19 of VTAB-1k].
    #[arg(long, value_delimiter = ',')]
    tasks: Option<Vec<String>>,
    /// Try each value of a field of the methods' configs, or of lr, weight_decay, drop_path and the
    /// like, on the 200 after training on the 800, and keep the best; several flags try every
    /// combination.
    #[arg(long, value_name = "FIELD=A,B,..")]
    grid: Vec<String>,
    /// Runs side by side [default: as many as cores beside a small backbone, else 1].
    #[arg(long, value_name = "N")]
    pub jobs: Option<NonZeroUsize>,
    /// Move the folder of a run of other settings aside and run anew; else such a run is refused.
    #[arg(long)]
    pub set_aside: bool,
    /// Look at the test images every N epochs, and record the best of these looks as best-on-test.
    #[arg(long, value_name = "N")]
    pub also_best_on_test: Option<NonZeroUsize>,
    /// Folder for the runs and the results [default: runs/PLAN, else runs/all].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub flags: BackboneFlags,
    #[command(flatten)]
    bypass: BypassFlags,
    #[command(flatten)]
    pub training: TrainingFlags,
    #[command(flatten)]
    pub threads: ThreadFlags,
}

impl Args {
    /// The plan of the file or of the flags.
    pub fn plan(&self) -> Result<SweepPlan> {
        let plan = match &self.plan {
            Some(file) => SweepPlan::read(file)?,
            None => self.plan_of_flags()?,
        };
        plan.validate()?;
        Ok(plan)
    }

    /// Where the results go.
    pub fn out(&self) -> PathBuf {
        let name = self.plan.as_deref().and_then(|file| file.file_stem());
        let default = || PathBuf::from("runs").join(name.unwrap_or("all".as_ref()));
        self.out.clone().unwrap_or_else(default)
    }

    fn plan_of_flags(&self) -> Result<SweepPlan> {
        let methods = self.methods.iter().map(|name| self.method(name));
        let training = &self.training;
        let mut plan = SweepPlan {
            seeds: self.seeds.clone(),
            methods: methods.collect::<Result<_>>()?,
            train: RunSettings {
                epochs: Some(training.epochs()),
                batch_size: Some(training.batch_size),
                lr: Some(training.lr.unwrap_or(TrainingFlags::LR)),
                warmup_epochs: training.warmup_epochs,
                stepped: Some(training.schedule.into()),
                weight_decay: Some(training.weight_decay.unwrap_or(TrainingFlags::WEIGHT_DECAY)),
                drop_path: training.drop_path,
                normalization: training.normalization,
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

    /// A method by name, with the flags of the bypass if it is one.
    fn method(&self, name: &str) -> Result<PlanMethod> {
        let attention = matches!(name, "convpass_attention" | "convpass-attention");
        let parsed = parse_method(if attention { "convpass" } else { name });
        let MethodArg { method, .. } =
            parsed.map_err(|reason| anyhow::anyhow!("--methods {name}: {reason}"))?;
        let mut planned = PlanMethod::new(name, method);
        if let Method::ConvBypass(config) = &mut planned.method {
            *config = self.bypass.config("");
            if attention {
                config.sub_layers = SubLayers::Attention;
            }
            planned.published = true;
            // The grid is what stands above the published choices.
            let scale = self.bypass.scale.map(|scale| ("scale", json!(scale)));
            let init = self.bypass.init.map(|init| match init {
                InitFlag::Identity => ("conv_init", json!("identity")),
                InitFlag::XavierUniform => ("conv_init", json!("xavier_uniform")),
            });
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
    // What is no JSON is a name: identity.
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
