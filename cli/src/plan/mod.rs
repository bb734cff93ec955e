//! A plan of runs: tasks x methods x seeds, and the settings of each method to try on validation
//! images first.

mod grid;
mod planned;
mod settings;

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use grid::{Setting, Trial, best_trial};
pub use planned::{PlannedRun, published_choice};
pub use settings::RunSettings;

use crate::error::{Error, Result};
use crate::failure::chain_of;
use convpass::data::vtab;
use convpass::model::PetlConfig;
use convpass::petl::Method;
use convpass::train::{Selection, TrainConfig};

/// The most combinations of a grid. A larger grid is a mistake, because its runs would never end.
const MAX_TRIALS: usize = 10_000;

/// A plan of runs: tasks x methods x seeds. [`SweepPlan::read`] reads it from TOML.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SweepPlan {
    /// The folder that holds the tasks' folders. `--data` overrides it.
    pub data: Option<PathBuf>,
    /// The file of the backbone. `--backbone` overrides it.
    pub backbone: Option<PathBuf>,
    /// Names of the tasks' folders; the 19 of VTAB-1k by default.
    pub tasks: Vec<String>,
    /// The seeds: one run on the 1,000 images for each. The trials use the first seed.
    pub seeds: Vec<i64>,
    /// If given, the number of trials that each method must have. A comparison is fair if all
    /// methods are tuned with the same budget.
    pub trials: Option<usize>,
    /// The settings that all methods share.
    pub train: RunSettings,
    /// The methods to compare.
    pub methods: Vec<PlanMethod>,
}

impl Default for SweepPlan {
    fn default() -> Self {
        SweepPlan {
            data: None,
            backbone: None,
            tasks: vtab::TASKS.iter().map(|task| task.name.to_owned()).collect(),
            seeds: vec![0, 1, 2],
            trials: None,
            train: RunSettings::default(),
            methods: Vec::new(),
        }
    }
}

/// A method of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanMethod {
    /// The name of the method in tables and folders.
    pub label: String,
    /// The config of the method. The grid changes some of its fields.
    pub method: Method,
    /// Whether Convpass uses the scale s and the init that were published for the task
    /// ([`published_choice`]). A task without them uses those of `method`. The grid overrides both.
    #[serde(default)]
    pub published: bool,
    /// The label of the method whose head this method starts from. A trial starts from the head of
    /// a trial, which was trained on the 800 images alone; a run starts from the head of the run
    /// with the same seed.
    #[serde(default)]
    pub head: Option<String>,
    /// The settings that differ from those of the plan.
    #[serde(default)]
    pub train: RunSettings,
    /// Values to try, by the name of a field of `train` or of the method's config. For each
    /// combination a trial trains on the 800 images; its result is the top-1 of the last epoch on
    /// the 200.
    #[serde(default)]
    pub grid: BTreeMap<String, Vec<Value>>,
}

impl PlanMethod {
    /// Returns a method with the settings of the plan and an empty grid.
    pub fn new(label: impl Into<String>, method: Method) -> Self {
        PlanMethod {
            label: label.into(),
            method,
            published: false,
            head: None,
            train: RunSettings::default(),
            grid: BTreeMap::new(),
        }
    }

    /// Returns the name of the method's folder: the label in lower case, with `-` in place of every
    /// character that is neither a letter nor a digit.
    pub fn folder(&self) -> String {
        let plain = |c: char| if c.is_alphanumeric() { c } else { '-' };
        self.label.to_lowercase().chars().map(plain).collect()
    }
}

/// Why a plan is not valid, and the index of the method that is wrong, if it is a method.
struct Refused {
    method: Option<usize>,
    error: Error,
}

/// The positions of the methods in the text of a plan.
#[derive(Deserialize)]
struct Places {
    methods: Vec<toml::Spanned<IgnoredAny>>,
}

impl SweepPlan {
    /// Reads a plan from TOML, where each `[[methods]]` is a [`PlanMethod`], and checks it.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::PlanLine`] with the line if the text is
    /// not valid TOML, has an unknown field, or [`SweepPlan::validate`] returns an error.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let file = path.as_ref();
        let text = std::fs::read_to_string(file).map_err(Error::io(file))?;
        let at = |offset: usize, reason: &str| {
            let before = text.as_bytes().iter().take(offset);
            let line = 1 + before.filter(|&&byte| byte == b'\n').count();
            Error::PlanLine { file: file.to_path_buf(), line, reason: reason.trim().to_owned() }
        };
        let plan: SweepPlan = toml::from_str(&text)
            .map_err(|e| at(e.span().map_or(0, |span| span.start), e.message()))?;
        plan.check().map_err(|refused| {
            let Refused { method, error } = *refused;
            let places = toml::from_str::<Places>(&text).ok();
            let spans = places.map(|places| places.methods).unwrap_or_default();
            let span = method.and_then(|index| spans.get(index)).map(toml::Spanned::span);
            at(span.map_or(0, |span| span.start), &chain_of(error))
        })?;
        Ok(plan)
    }

    /// Checks that every run of the plan is possible.
    ///
    /// # Errors
    /// [`Error::Config`] with the first thing that is wrong: a name or label that is not valid or
    /// not unique, a head from a method that does not exist or starts from a head itself, a field
    /// in a grid that neither the settings nor the method have, a value that is not valid for its
    /// field, or a number of trials other than `trials`.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|refused| refused.error)
    }

    fn check(&self) -> Result<(), Box<Refused>> {
        self.check_names().map_err(|error| Box::new(Refused { method: None, error }))?;
        for (index, method) in self.methods.iter().enumerate() {
            let check = || {
                self.check_label(index, method)?;
                self.check_head(method)?;
                self.check_grid(method)
            };
            check().map_err(|error| Box::new(Refused { method: Some(index), error }))?;
        }
        Ok(())
    }

    fn check_names(&self) -> Result<()> {
        let is_name = |name: &str| {
            let mut parts = Path::new(name).components();
            matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
        };
        if let Some(name) = self.tasks.iter().find(|name| !is_name(name)) {
            return Err(Error::config("tasks", "names of folders", format!("{name:?}")));
        }
        distinct("tasks", &self.tasks)?;
        distinct("seeds", &self.seeds)?;
        if self.methods.is_empty() {
            Err(Error::config("methods", "at least one", 0))
        } else {
            Ok(())
        }
    }

    fn check_label(&self, index: usize, method: &PlanMethod) -> Result<()> {
        let folder = method.folder();
        if !folder.contains(char::is_alphanumeric) {
            return Err(Error::config("label", "a name", format!("{:?}", method.label)));
        }
        match self.methods[..index].iter().find(|other| other.folder() == folder) {
            None => Ok(()),
            Some(other) => {
                let expected = format!("a label whose folder is not that of {:?}", other.label);
                Err(Error::config("label", expected, format!("{:?}", method.label)))
            }
        }
    }

    fn check_head(&self, method: &PlanMethod) -> Result<()> {
        let Some(label) = &method.head else { return Ok(()) };
        let is_one = |other: &PlanMethod| other.label == *label && other.head.is_none();
        if self.methods.iter().any(is_one) {
            Ok(())
        } else {
            let expected = "the label of a method of this plan that takes no head itself";
            Err(Error::config("head", expected, format!("{label:?}")))
        }
    }

    fn check_grid(&self, method: &PlanMethod) -> Result<()> {
        let is_bypass = matches!(method.method, Method::ConvBypass(_));
        if method.published && !is_bypass {
            let expected = "false for a method without published choices for each task";
            return Err(Error::config("published", expected, true));
        }
        let trials = method.grid.values().try_fold(1, |n: usize, v| n.checked_mul(v.len()));
        let expected = self.trials.unwrap_or(MAX_TRIALS).min(MAX_TRIALS);
        let found = trials.filter(|n| (1..=MAX_TRIALS).contains(n));
        let fits = |n: usize| self.trials.is_none_or(|trials| trials == n);
        let Some(found) = found.filter(|&n| fits(n)) else {
            let expected = match self.trials {
                Some(_) => format!("the plan's {expected} combinations, as for every method"),
                None => format!("1 to {expected} combinations"),
            };
            let found = trials.map_or("more".to_owned(), |n| n.to_string());
            return Err(Error::config("grid", expected, found));
        };
        let settings = method.settings();
        for setting in &settings {
            self.run(method, setting, vtab::TASKS[0].name, 2, 0)?;
        }
        let mut folders: Vec<_> = settings.iter().map(Setting::folder).collect();
        folders.sort_unstable();
        folders.dedup();
        if folders.len() == found {
            Ok(())
        } else {
            Err(Error::config("grid", "values that differ in letters or digits", found))
        }
    }

    /// Returns the configs of one run of `method` with a combination of its grid. The caller
    /// chooses the images. If the plan has no normalization, the config has that of ImageNet and
    /// the caller chooses another.
    ///
    /// # Errors
    /// [`Error::Config`] if a value is not valid for its field.
    pub fn run(
        &self,
        method: &PlanMethod,
        setting: &Setting,
        task: &str,
        num_classes: i64,
        seed: i64,
    ) -> Result<(PetlConfig, TrainConfig)> {
        let base = planned::on_task(method, task);
        let settings = method.train.over(&self.train);
        let (config, settings) = setting.apply(base, settings)?;
        let mut model = PetlConfig::new(config, num_classes);
        model.seed = seed;
        model.drop_path = settings.drop_path.unwrap_or(model.drop_path);
        model.validate()?;
        let train = settings.train_config(seed);
        train.schedule.validate()?;
        debug_assert_eq!(train.selection, Selection::LastEpoch, "no other is in the settings");
        Ok((model, train))
    }

    /// Returns whether `method` needs trials before its runs: its grid has more than one
    /// combination, or a method with such a grid starts its trials from the head of `method`.
    pub fn has_trials(&self, method: &PlanMethod) -> bool {
        let has_choice = |method: &PlanMethod| method.settings().len() > 1;
        let takes_head = |other: &PlanMethod| other.head.as_ref() == Some(&method.label);
        has_choice(method) || self.methods.iter().any(|m| takes_head(m) && has_choice(m))
    }
}

fn distinct<T: PartialEq + std::fmt::Debug>(field: &str, values: &[T]) -> Result<()> {
    if values.is_empty() {
        return Err(Error::config(field, "at least one", 0));
    }
    let twice = values.iter().enumerate().find(|(index, value)| values[..*index].contains(value));
    match twice {
        Some((_, value)) => Err(Error::config(field, "each once", format!("{value:?} twice"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
