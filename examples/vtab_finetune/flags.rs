//! The flags of `--all`, and the plan that they say.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args as ClapArgs;
use convpass::{Method, Plan, PlanMethod, RunSettings, Setting, Stepped, SubLayers};
use serde_json::{Value, json};

use super::args::{Args, Init, MethodArg, Stepping, bypass_config, parse_method};

/// What a plan says, and so no flag beside it.
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
/// What is of one run alone.
const OF_ONE_RUN: [&str; 5] = ["task", "method", "select", "seed", "head"];

#[derive(ClapArgs)]
pub struct AllArgs {
    /// Run tasks x methods x seeds; flags say which, and the flags above what they share.
    #[arg(long, conflicts_with_all = OF_ONE_RUN)]
    all: bool,
    /// Run what a TOML file says.
    #[arg(long, value_name = "FILE", conflicts_with_all = OF_ONE_RUN, conflicts_with_all = SAID_BY_A_PLAN)]
    plan: Option<PathBuf>,
    /// Names of methods; Convpass has the published s and init of each task where nothing else is said.
    #[arg(long, value_delimiter = ',', default_value = "convpass", requires = "all")]
    methods: Vec<String>,
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1, 2], requires = "all", allow_negative_numbers = true)]
    seeds: Vec<i64>,
    /// Names of the tasks' folders [default: the 19 of VTAB-1k].
    #[arg(long, value_delimiter = ',', requires = "all")]
    tasks: Option<Vec<String>>,
    /// Try each value of a field of the methods' configs, or lr, weight_decay, drop_path, .., on the 200 after training
    /// on the 800, and take the best; several flags try every combination.
    #[arg(long, value_name = "FIELD=A,B,..", requires = "all")]
    grid: Vec<String>,
    /// Runs side by side, of --all and --plan [default: as many as cores beside a small backbone, else 1].
    #[arg(long)]
    pub jobs: Option<NonZeroUsize>,
    /// Move the folder of a run of other settings aside and run anew; else such a run is refused.
    #[arg(long)]
    pub set_aside: bool,
}

impl AllArgs {
    /// The plan of the file or of the flags, if one is asked for.
    pub fn plan(&self, args: &Args) -> Result<Option<Plan>> {
        let plan = match &self.plan {
            Some(file) => Plan::read(file)?,
            None if self.all => self.plan_of_flags(args)?,
            None if self.jobs.is_some() || self.set_aside => {
                bail!("--jobs and --set-aside go with --all or --plan")
            }
            None => return Ok(None),
        };
        plan.validate()?;
        Ok(Some(plan))
    }

    /// Where the plan's results go, unless a flag says.
    pub fn out(&self) -> PathBuf {
        let name = self.plan.as_deref().and_then(|file| file.file_stem());
        PathBuf::from("runs").join(name.unwrap_or("all".as_ref()))
    }

    fn plan_of_flags(&self, args: &Args) -> Result<Plan> {
        let methods = self.methods.iter().map(|name| self.method(args, name));
        let mut plan = Plan {
            seeds: self.seeds.clone(),
            methods: methods.collect::<Result<_>>()?,
            train: RunSettings {
                epochs: Some(args.epochs),
                batch_size: Some(args.batch_size),
                lr: Some(args.lr),
                warmup_epochs: args.warmup_epochs,
                stepped: Some(match args.schedule {
                    Stepping::Epoch => Stepped::AfterEpoch,
                    Stepping::Step => Stepped::EachStep,
                }),
                weight_decay: Some(args.weight_decay),
                drop_path: args.drop_path,
                normalization: args.normalization,
            },
            ..Plan::default()
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
    fn method(&self, args: &Args, name: &str) -> Result<PlanMethod> {
        let attention = matches!(name, "convpass_attention" | "convpass-attention");
        let parsed = parse_method(if attention { "convpass" } else { name });
        let MethodArg { method, .. } =
            parsed.map_err(|reason| anyhow::anyhow!("--methods {name}: {reason}"))?;
        let mut planned = PlanMethod::new(name, method);
        if let Method::ConvBypass(config) = &mut planned.method {
            *config = bypass_config(args, "");
            if attention {
                config.sub_layers = SubLayers::Attention;
            }
            planned.published = true;
            // The grid is what stands above the published choices.
            let scale = args.scale.map(|scale| ("scale", json!(scale)));
            let init = args.init.map(|init| match init {
                Init::Identity => ("conv_init", json!("identity")),
                Init::XavierUniform => ("conv_init", json!("xavier_uniform")),
            });
            for (field, value) in scale.into_iter().chain(init) {
                planned.grid.insert(field.to_owned(), vec![value]);
            }
        }
        Ok(planned)
    }
}

/// Adds `FIELD=A,B,..` to the grid of each method that has the field.
fn add_to_grids(plan: &mut Plan, grid: &str) -> Result<()> {
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
