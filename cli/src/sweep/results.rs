//! The results of a plan: the table, the selected settings, and what is missing or failed.

use std::path::Path;

use anyhow::{Result, bail};
use convpass::data::vtab;
use serde::Serialize;
use serde_json::json;

use crate::files::write_atomically;
use crate::plan::{Setting, Trial};
use crate::report::{Average, Figure, Spread, TaskTable};

/// The setting of a method on a task, and the trials that selected it.
#[derive(Serialize)]
pub struct Selected {
    pub task: String,
    pub method: String,
    pub setting: Setting,
    pub trials: Vec<Trial>,
}

#[derive(Default)]
pub struct SweepResults {
    pub table: TaskTable,
    pub selected: Vec<Selected>,
    /// Tasks that could not be opened, and why.
    pub missing: Vec<(String, String)>,
    /// Runs that failed or could not be started, and why.
    pub failed: Vec<(String, String)>,
}

/// A line of the CSV file.
#[derive(Serialize)]
struct ResultRow<'a> {
    task: &'a str,
    group: String,
    method: &'a str,
    seed: i64,
    setting: String,
    top1: f64,
    best_on_test: Option<f64>,
    method_params: usize,
    head_params: usize,
    seconds: f64,
    paper_convpass_top1: Option<f64>,
}

impl SweepResults {
    pub fn selected(&self, task: &str, method: &str) -> Option<&Selected> {
        self.selected.iter().find(|selected| selected.task == task && selected.method == method)
    }

    /// Prints every missing task and every failed run, and returns an error if there is one.
    pub fn check(&self, stopped: bool) -> Result<()> {
        if stopped {
            eprintln!("ended early; the same command continues");
            return Ok(());
        }
        for (what, reason) in self.missing.iter().chain(&self.failed) {
            eprintln!("{what}: {reason}");
        }
        match (self.missing.len(), self.failed.len()) {
            (0, 0) => Ok(()),
            (missing, failed) => {
                bail!("tasks missing: {missing}, runs failed: {failed}; the table is of the others")
            }
        }
    }

    /// Writes `results.csv` with one line for each run, and `results.json` with all results.
    pub fn write(&self, out: &Path) -> Result<()> {
        let mut csv = csv::Writer::from_writer(Vec::new());
        for run in &self.table.runs {
            let row = vtab::task(&run.task);
            let selected = self.selected(&run.task, &run.method);
            csv.serialize(ResultRow {
                task: &run.task,
                group: row.map_or(String::new(), |row| row.group.to_string()),
                method: &run.method,
                seed: run.seed,
                setting: selected.map_or(String::new(), |s| s.setting.to_string()),
                top1: run.top1,
                best_on_test: run.best_on_test,
                method_params: run.params.method,
                head_params: run.params.head,
                seconds: run.seconds,
                paper_convpass_top1: row.map(|row| row.convpass_top1),
            })?;
        }
        write_atomically(&out.join("results.csv"), &csv.into_inner()?)?;
        let json = serde_json::to_vec_pretty(&self.json())?;
        Ok(write_atomically(&out.join("results.json"), &json)?)
    }

    fn json(&self) -> serde_json::Value {
        let named = |pairs: &[(String, String)]| -> Vec<_> {
            pairs.iter().map(|(name, reason)| json!({ "name": name, "reason": reason })).collect()
        };
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "tasks": self.table.tasks,
            "seeds": self.table.seeds,
            "runs": self.table.runs,
            "cells": self.cells(),
            "averages": self.averages(),
            "selected": self.selected,
            "missing": named(&self.missing),
            "failed": named(&self.failed),
        })
    }

    /// Returns the mean and the standard deviation over seeds of each method on each task.
    fn cells(&self) -> Vec<serde_json::Value> {
        let mut cells = Vec::new();
        for task in self.table.tasks_with_runs() {
            for method in &self.table.methods {
                let figure = |figure| self.table.cell(task, method, figure);
                cells.push(figures(json!({ "task": task, "method": method }), figure));
            }
        }
        cells
    }

    /// Returns the averages of each method, with the tasks that they average.
    fn averages(&self) -> Vec<serde_json::Value> {
        let mut averages = Vec::new();
        for average in Average::ALL {
            let tasks = self.table.averaged(average);
            let name = match average {
                Average::Group(group) => group.to_string(),
                Average::G => "G".to_owned(),
                Average::A => "A".to_owned(),
                Average::Other => "outside VTAB-1k".to_owned(),
            };
            for method in self.table.methods.iter().filter(|_| !tasks.is_empty()) {
                let figure = |figure| self.table.average(method, average, figure);
                let what = json!({ "average": name, "method": method, "tasks": tasks });
                averages.push(figures(what, figure));
            }
        }
        averages
    }
}

/// Returns `what` with top-1 and, if there is one, best-on-test.
fn figures(
    mut what: serde_json::Value,
    figure: impl Fn(Figure) -> Option<Spread>,
) -> serde_json::Value {
    what["top1"] = json!(figure(Figure::Top1));
    if let Some(best) = figure(Figure::BestOnTest) {
        what["best_on_test"] = json!(best);
    }
    what
}
