//! Methods on the same tasks: the table, and the points of its chart.

use std::fmt;

use super::AccuracyPoint;
use crate::model::TrainableParams;

/// One method on one task.
#[derive(Clone, Debug, PartialEq)]
pub struct ComparedRun {
    /// The task's name.
    pub task: String,
    /// The method's name, as it is shown.
    pub method: String,
    /// Top-1 in percent.
    pub top1: f64,
    /// Trained weights.
    pub params: TrainableParams,
    /// Seconds of training and test.
    pub seconds: f64,
}

/// Runs of several methods on the same tasks. `Display` gives a table with a line for each method
/// and its mean over the tasks, in the order in which tasks and methods first appear.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// The runs, in any order; of a method twice on a task the first counts.
    pub runs: Vec<ComparedRun>,
}

/// A method's line.
struct Line<'a> {
    method: &'a str,
    /// `None` on a task that it was not run on.
    runs: Vec<Option<&'a ComparedRun>>,
}

impl Line<'_> {
    /// Over all tasks; `None` if one is missing.
    fn mean(&self, value: impl Fn(&ComparedRun) -> f64) -> Option<f64> {
        let values: Option<Vec<f64>> = self.runs.iter().map(|run| run.map(&value)).collect();
        values.map(|values| values.iter().sum::<f64>() / values.len() as f64)
    }
}

impl Comparison {
    fn tasks(&self) -> Vec<&str> {
        distinct(self.runs.iter().map(|run| run.task.as_str()))
    }

    fn lines(&self) -> Vec<Line<'_>> {
        let tasks = self.tasks();
        let line = |method| {
            let on = |task: &&str| {
                self.runs.iter().find(|run| run.task == **task && run.method == method)
            };
            Line { method, runs: tasks.iter().map(on).collect() }
        };
        distinct(self.runs.iter().map(|run| run.method.as_str())).into_iter().map(line).collect()
    }

    /// Mean top-1 over mean trained weights, the head's among them, of each method that was run on
    /// every task; `highlight` names the method whose mark stands out.
    pub fn points(&self, highlight: &str) -> Vec<AccuracyPoint> {
        let point = |line: &Line| {
            Some(AccuracyPoint {
                label: line.method.to_owned(),
                params: line.mean(|run| run.params.total() as f64)?,
                top1: line.mean(|run| run.top1)?,
                highlight: line.method == highlight,
            })
        };
        self.lines().iter().filter_map(point).collect()
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<14}", "top-1 %")?;
        for task in self.tasks() {
            write!(f, " {task:>11}")?;
        }
        writeln!(f, " {:>7} {:>9} {:>7} {:>8}", "mean", "method's", "head's", "seconds")?;
        for line in self.lines() {
            write!(f, "{:<14}", line.method)?;
            for run in &line.runs {
                match run {
                    Some(run) => write!(f, " {:>11.2}", run.top1)?,
                    None => write!(f, " {:>11}", "-")?,
                }
            }
            let mean =
                line.mean(|run| run.top1).map_or("-".to_owned(), |mean| format!("{mean:.2}"));
            let (method, head) = head_and_method(&line);
            let seconds: f64 = line.runs.iter().flatten().map(|run| run.seconds).sum();
            writeln!(f, " {mean:>7} {method:>9} {head:>7} {seconds:>8.1}")?;
        }
        Ok(())
    }
}

/// Mean weights of a method and of its heads over the tasks that it was run on.
fn head_and_method(line: &Line) -> (usize, usize) {
    let runs = || line.runs.iter().flatten().map(|run| run.params);
    let mean = |sum: usize| sum / runs().count().max(1);
    (mean(runs().map(|params| params.method).sum()), mean(runs().map(|params| params.head).sum()))
}

fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    names.fold(Vec::new(), |mut seen, name| {
        if !seen.contains(&name) {
            seen.push(name);
        }
        seen
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(task: &str, method: &str, top1: f64, trained: usize) -> ComparedRun {
        let params = TrainableParams::new(trained, 100, 1_000);
        ComparedRun { task: task.into(), method: method.into(), top1, params, seconds: 1.5 }
    }

    #[test]
    fn means_are_over_all_tasks_or_none() {
        let runs = vec![
            run("a", "probe", 10.0, 0),
            run("b", "probe", 20.0, 0),
            run("a", "bypass", 30.0, 50),
        ];
        let table = Comparison { runs };
        let text = table.to_string();
        let lines: Vec<Vec<&str>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["probe", "10.00", "20.00", "15.00", "0", "100", "3.0"]);
        assert_eq!(lines[2], ["bypass", "30.00", "-", "-", "50", "100", "1.5"]);
        let points = table.points("probe");
        assert_eq!(points.len(), 1);
        assert_eq!((points[0].params, points[0].top1, points[0].highlight), (100.0, 15.0, true));
        assert!(Comparison::default().points("probe").is_empty());
    }
}
