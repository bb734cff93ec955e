//! Tasks x methods x seeds as a table, with the averages G and A kept apart.

use std::fmt;

use serde::Serialize;

use convpass::data::vtab::{self, VtabGroup, VtabTask};
use convpass::model::TrainableParams;

/// One run: a method on a task from a seed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SeedRun {
    /// The task's name.
    pub task: String,
    /// The method's name, as it is shown.
    pub method: String,
    /// The run's seed.
    pub seed: i64,
    /// Top-1 in percent on the test images. Nothing was selected by the test images.
    pub top1: f64,
    /// Top-1 accuracy in percent of the best epoch on the test images, if it was requested.
    pub best_on_test: Option<f64>,
    /// Trained weights.
    pub params: TrainableParams,
    /// Seconds of training and test.
    pub seconds: f64,
}

/// The mean and the standard deviation (n - 1) over seeds. A single seed has no deviation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// The standard deviation of the sample.
    pub deviation: Option<f64>,
    /// How many seeds.
    pub seeds: usize,
}

impl Spread {
    /// `None` for no values.
    pub fn of(values: &[f64]) -> Option<Self> {
        let seeds = values.len();
        let mean = mean(values)?;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = (seeds > 1).then(|| (squares / (seeds - 1) as f64).sqrt());
        Some(Spread { mean, deviation, seeds })
    }
}

/// What is averaged over tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Average {
    /// The tasks of one group of VTAB-1k.
    Group(VtabGroup),
    /// The mean of the three group means, which is the paper's average. There is none where a group
    /// has no task.
    G,
    /// The mean of the tasks of VTAB-1k, of which there are 19.
    A,
    /// The mean of the tasks that VTAB-1k does not have.
    Other,
}

impl Average {
    /// Every average, in the order of the table.
    pub const ALL: [Self; 6] = [
        Self::Group(VtabGroup::Natural),
        Self::Group(VtabGroup::Specialized),
        Self::Group(VtabGroup::Structured),
        Self::G,
        Self::A,
        Self::Other,
    ];

    fn takes(self, row: Option<&VtabTask>) -> bool {
        match self {
            Average::Group(group) => row.is_some_and(|row| row.group == group),
            Average::G | Average::A => row.is_some(),
            Average::Other => row.is_none(),
        }
    }

    /// Returns the average of one value for each task.
    fn of(self, values: &[(&str, f64)]) -> Option<f64> {
        let of = |average: Average| {
            let taken = values.iter().filter(|(task, _)| average.takes(vtab::task(task)));
            mean(&taken.map(|(_, value)| *value).collect::<Vec<_>>())
        };
        match self {
            Average::G => {
                let groups = [VtabGroup::Natural, VtabGroup::Specialized, VtabGroup::Structured];
                let means: Option<Vec<f64>> =
                    groups.into_iter().map(|group| of(Average::Group(group))).collect();
                mean(&means?)
            }
            average => of(average),
        }
    }
}

/// A figure of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// [`SeedRun::top1`].
    Top1,
    /// [`SeedRun::best_on_test`].
    BestOnTest,
}

impl Figure {
    fn of(self, run: &SeedRun) -> Option<f64> {
        match self {
            Figure::Top1 => Some(run.top1),
            Figure::BestOnTest => run.best_on_test,
        }
    }
}

/// Runs of several methods on the same tasks, from several seeds. `Display` gives a line for each
/// task, the averages, and what a reader has to know before comparing them with others.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TaskTable {
    /// The tasks in their order; one without a run is left out.
    pub tasks: Vec<String>,
    /// The methods in their order.
    pub methods: Vec<String>,
    /// The seeds; a mean over fewer is marked.
    pub seeds: Vec<i64>,
    /// The runs, in any order.
    pub runs: Vec<SeedRun>,
}

impl TaskTable {
    /// Returns the tasks that have a run.
    pub fn tasks_with_runs(&self) -> Vec<&str> {
        let has_run = |task: &&str| self.runs.iter().any(|run| run.task == **task);
        self.tasks.iter().map(String::as_str).filter(has_run).collect()
    }

    /// Returns the figure of a method on a task; `None` without a run.
    pub fn cell(&self, task: &str, method: &str, figure: Figure) -> Option<Spread> {
        let values = self.seeds.iter().filter_map(|&seed| self.value(task, method, seed, figure));
        Spread::of(&values.collect::<Vec<_>>())
    }

    /// Returns the average of a method over the tasks that have a run of any method. It uses the
    /// seeds that the method has on every one of these tasks. `None` if there is no such seed or
    /// average.
    pub fn average(&self, method: &str, average: Average, figure: Figure) -> Option<Spread> {
        let tasks = self.averaged(average);
        let of_seed = |&seed: &i64| {
            let values = tasks
                .iter()
                .map(|&task| Some((task, self.value(task, method, seed, figure)?)))
                .collect::<Option<Vec<_>>>();
            average.of(&values?)
        };
        Spread::of(&self.seeds.iter().filter_map(of_seed).collect::<Vec<_>>())
    }

    /// Returns the tasks with a run that an average covers.
    pub fn averaged(&self, average: Average) -> Vec<&str> {
        let mut tasks = self.tasks_with_runs();
        tasks.retain(|task| average.takes(vtab::task(task)));
        tasks
    }

    fn value(&self, task: &str, method: &str, seed: i64, figure: Figure) -> Option<f64> {
        let is_it = |run: &&SeedRun| (&*run.task, &*run.method, run.seed) == (task, method, seed);
        self.runs.iter().find(is_it).and_then(|run| figure.of(run))
    }

    /// Returns the published average over the same tasks.
    fn published(&self, average: Average) -> Option<f64> {
        let value = |task| Some((task, vtab::task(task)?.convpass_top1));
        average.of(&self.averaged(average).into_iter().filter_map(value).collect::<Vec<_>>())
    }

    /// Returns the mean of a method over its runs.
    fn mean_of(&self, method: &str, value: impl Fn(&SeedRun) -> f64) -> Option<f64> {
        let runs = self.runs.iter().filter(|run| run.method == method);
        mean(&runs.map(value).collect::<Vec<_>>())
    }
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

mod display;

#[cfg(test)]
mod tests;
