//! Runs by method and task, over seeds.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use super::methods;
use super::runs::FoundRun;
use super::task_table::Spread;
use convpass::data::vtab;
use convpass::train::{RunRecord, Selection};

/// Runs of a method on a task that differ only in their seeds.
#[derive(Debug)]
pub(super) struct SeedRuns<'a> {
    /// The runs by the seed of the run and the seed of the initial values.
    by_seed: BTreeMap<(i64, i64), &'a RunRecord>,
}

impl SeedRuns<'_> {
    fn top1(&self) -> impl Iterator<Item = f64> {
        self.by_seed.values().filter_map(|record| record.test_top1)
    }
}

/// The results of a method on its tasks.
#[derive(Debug)]
pub(super) struct MethodLine<'a> {
    pub(super) label: String,
    pub(super) cells: BTreeMap<&'a str, SeedRuns<'a>>,
}

impl MethodLine<'_> {
    pub(super) fn score(&self, task: &str) -> Option<Spread> {
        Spread::of(&self.cells.get(task)?.top1().collect::<Vec<_>>())
    }

    /// Returns the mean of the means of groups of tasks; `None` if a task is missing. It has a deviation
    /// if each task was run with the same seeds.
    pub(super) fn average(&self, groups: &[Vec<&str>]) -> Option<Spread> {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let over = |value: &dyn Fn(&str) -> Option<f64>| -> Option<f64> {
            let group = |tasks: &Vec<&str>| -> Option<f64> {
                Some(mean(&tasks.iter().map(|task| value(task)).collect::<Option<Vec<_>>>()?))
            };
            Some(mean(&groups.iter().map(group).collect::<Option<Vec<_>>>()?))
        };
        let mean = over(&|task| self.score(task).map(|score| score.mean))?;
        let cells = || groups.iter().flatten().filter_map(|task| self.cells.get(task));
        let seeds: BTreeSet<_> = cells().next()?.by_seed.keys().copied().collect();
        if !cells().all(|cell| cell.by_seed.keys().eq(seeds.iter())) {
            let seeds = cells().map(|cell| cell.by_seed.len()).min()?;
            return Some(Spread { mean, deviation: None, seeds });
        }
        let of_seed = |seed| over(&|task| self.cells.get(task)?.by_seed.get(seed)?.test_top1);
        let each: Vec<f64> = seeds.iter().filter_map(of_seed).collect();
        Some(Spread { mean, ..Spread::of(&each)? })
    }

    /// Returns the number of trained weights of the method and of the head, the mean over tasks.
    pub(super) fn weights(&self) -> (f64, f64) {
        let params: Vec<_> = self
            .cells
            .values()
            .flat_map(|cell| cell.by_seed.values())
            .map(|record| record.trainable_params)
            .collect();
        let mean = |sum: usize| sum as f64 / params.len().max(1) as f64;
        (mean(params.iter().map(|p| p.method).sum()), mean(params.iter().map(|p| p.head).sum()))
    }
}

/// The rows of the results on some tasks.
#[derive(Debug, Default)]
pub(super) struct RunTable<'a> {
    /// The tasks: those of VTAB-1k in the order of its table, then others in the order of the runs.
    pub(super) tasks: Vec<&'a str>,
    pub(super) lines: Vec<MethodLine<'a>>,
    /// Notes that a reader of the numbers must know.
    pub(super) notes: Vec<String>,
}

/// The key of a row: runs with the same key are in the same row.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    rank: usize,
    label: String,
    backbone: String,
    normalization: String,
    selection: &'static str,
}

impl Key {
    fn new(record: &RunRecord) -> Self {
        let file = Path::new(&record.backbone).file_stem().unwrap_or_default().to_string_lossy();
        let digest: String = record.backbone_digest.chars().take(8).collect();
        let precision = record.precision.as_ref().map(|name| format!(" in {name}"));
        Key {
            rank: methods::rank(&record.model.method),
            label: methods::label(&record.model.method),
            backbone: format!("{file} {digest}{}", precision.unwrap_or_default()),
            normalization: record.train.normalization.to_string(),
            selection: selection(record.train.selection),
        }
    }
}

pub(super) fn selection(selection: Selection) -> &'static str {
    match selection {
        Selection::LastEpoch => "last epoch",
        Selection::BestOnValidation => "best epoch on validation",
    }
}

/// Returns everything that the result of a run depends on, except its seeds.
fn settings(record: &RunRecord) -> String {
    let without = |value: serde_json::Result<Value>, names: &[&str]| {
        let mut value = value.unwrap_or_default();
        if let Some(fields) = value.as_object_mut() {
            fields.retain(|name, _| !names.contains(&name.as_str()));
        }
        value
    };
    let model = without(serde_json::to_value(&record.model), &["seed"]);
    let of_no_weight = ["seed", "recompute", "cuda_graph", "prefix"];
    let train = without(serde_json::to_value(&record.train), &of_no_weight);
    // A draw differs by its seed, and so may the heads that runs start from.
    let images = match record.shots {
        Some(shots) => format!("{shots} a class"),
        None => record.train_split.clone(),
    };
    let test = (&record.test_split, record.test_shorter_side);
    format!("{model} {train} {images} {test:?} {}", record.head_digest.is_some())
}

impl<'a> RunTable<'a> {
    /// Returns the results of the tested runs on tasks of VTAB-1k, or on other tasks.
    pub(super) fn new(runs: &'a [FoundRun], of_vtab: bool) -> Self {
        let records: Vec<&RunRecord> = runs
            .iter()
            .map(|run| &run.record)
            .filter(|record| record.test_top1.is_some())
            .filter(|record| vtab::task(&record.task).is_some() == of_vtab)
            .collect();
        let mut results = RunTable { tasks: tasks(&records, of_vtab), ..RunTable::default() };
        let mut by_line: BTreeMap<Key, BTreeMap<&str, Vec<&RunRecord>>> = BTreeMap::new();
        for record in &records {
            by_line
                .entry(Key::new(record))
                .or_default()
                .entry(&record.task)
                .or_default()
                .push(record);
        }
        let keys: Vec<Key> = by_line.keys().cloned().collect();
        for (key, tasks) in by_line {
            let label = full_label(&key, &keys);
            let cells = tasks.into_iter().map(|(task, records)| {
                let (cell, others) = cell(&records);
                if others > 0 {
                    results.notes.push(other_settings(task, &label, others, &cell));
                }
                (task, cell)
            });
            let cells = cells.collect();
            results.lines.push(MethodLine { label, cells });
        }
        results.notes.extend(test_lists(&records, &results.tasks));
        results
    }
}

fn tasks<'a>(records: &[&'a RunRecord], of_vtab: bool) -> Vec<&'a str> {
    let mut tasks = Vec::new();
    for record in records {
        if !tasks.contains(&record.task.as_str()) {
            tasks.push(record.task.as_str());
        }
    }
    if of_vtab {
        tasks.sort_by_key(|task| vtab::TASKS.iter().position(|row| row.name == *task));
    }
    tasks
}

/// Returns the label with the settings that distinguish the row from the others.
fn full_label(key: &Key, keys: &[Key]) -> String {
    let mut label = key.label.clone();
    let mut add = |of: &dyn Fn(&Key) -> String| {
        if keys.iter().any(|other| of(other) != of(key)) {
            label += &format!(" · {}", of(key));
        }
    };
    add(&|key| key.backbone.clone());
    add(&|key| key.normalization.clone());
    add(&|key| key.selection.to_owned());
    label
}

/// Of runs of one method on one task those of the settings with the most seeds, of such the ones
/// that kept nothing back for validation, of such the first: no result decides. And how many are
/// of other settings.
fn cell<'a>(records: &[&'a RunRecord]) -> (SeedRuns<'a>, usize) {
    let mut groups: Vec<(String, Vec<&RunRecord>)> = Vec::new();
    for record in records {
        let settings = settings(record);
        match groups.iter_mut().find(|(known, _)| *known == settings) {
            Some((_, group)) => group.push(record),
            None => groups.push((settings, vec![record])),
        }
    }
    let cells = groups.into_iter().map(|(_, group)| {
        let seeds =
            group.iter().rev().map(|record| ((record.train.seed, record.model.seed), *record));
        (group.len(), group[0].val_split.is_none(), SeedRuns { by_seed: seeds.collect() })
    });
    // `max_by_key` takes the last of equals.
    let best = cells.rev().max_by_key(|(_, whole, cell)| (cell.by_seed.len(), *whole));
    let (shown, _, cell) = best.unwrap_or((0, true, SeedRuns { by_seed: BTreeMap::new() }));
    (cell, records.len() - shown)
}

fn other_settings(task: &str, label: &str, others: usize, cell: &SeedRuns) -> String {
    let shown = cell.by_seed.values().next();
    let shown = shown.map_or(String::new(), |record| {
        format!(
            " Shown is learning rate {:e}, {} epochs, {} seed(s).",
            record.train.schedule.lr,
            record.train.epochs,
            cell.by_seed.len()
        )
    });
    format!(
        "{task}, {label}: {others} more run(s) with other settings are not in the table, \
         whatever their result.{shown}"
    )
}

/// Tasks whose runs were tested on different images.
fn test_lists(records: &[&RunRecord], tasks: &[&str]) -> Vec<String> {
    let lists = |task: &str| -> BTreeSet<&str> {
        let of_task = records.iter().filter(|record| record.task == task);
        of_task.filter_map(|record| record.test_split.as_deref()).collect()
    };
    let differ = tasks.iter().filter(|task| lists(task).len() > 1);
    differ
        .map(|task| format!("{task}: its runs were tested on different lists and do not compare."))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{record, run};
    use super::*;

    #[test]
    fn seeds_are_averaged_and_other_settings_are_not() {
        let mut runs: Vec<FoundRun> = [60.0, 62.0, 64.0]
            .iter()
            .enumerate()
            .map(|(i, &t)| run("own", "lora", i as i64, t))
            .collect();
        let mut better = record("own", "lora", 9, 99.0);
        better.train.schedule.lr = 0.5;
        runs.push(FoundRun { record: better, ..run("own", "lora", 9, 0.0) });
        // The same run copied counts once.
        runs.push(run("own", "lora", 2, 64.0));
        let results = RunTable::new(&runs, false);
        assert_eq!(results.lines.len(), 1);
        let score = results.lines[0].score("own").unwrap();
        assert_eq!((score.mean, score.deviation, score.seeds), (62.0, Some(2.0), 3));
        assert!(results.notes[0].contains("1 more run(s)"), "{:?}", results.notes);
        assert!(RunTable::new(&runs, true).lines.is_empty());
    }

    #[test]
    fn draws_by_seed_are_averaged_and_runs_from_a_head_stand_apart() {
        let draw = |seed: i64, top1, head: Option<&str>, shorter_side| {
            let mut found = run("own, 2 a class", "lora", seed, top1);
            found.record.train_split = format!("draw {seed}");
            found.record.shots = Some(2);
            found.record.head_digest = head.map(str::to_owned);
            found.record.test_shorter_side = Some(shorter_side);
            found
        };
        // Each seed has a probe, and so a head, of its own.
        let mut runs = vec![
            draw(0, 40.0, Some("a"), 256),
            draw(1, 50.0, Some("b"), 256),
            draw(2, 90.0, None, 256),
        ];
        runs.push(draw(3, 90.0, Some("c"), 224));
        let results = RunTable::new(&runs, false);
        let score = results.lines[0].score("own, 2 a class").unwrap();
        assert_eq!((score.mean, score.seeds), (45.0, 2));
        assert!(results.notes[0].contains("2 more run(s)"), "{:?}", results.notes);
    }

    #[test]
    fn averages_need_every_task_and_have_a_deviation_over_the_same_seeds() {
        let top1 = [("a", [10.0, 20.0]), ("b", [30.0, 50.0]), ("c", [80.0, 80.0])];
        let runs: Vec<FoundRun> = top1
            .iter()
            .flat_map(|(task, each)| {
                each.iter().enumerate().map(|(seed, &t)| run(task, "vpt", seed as i64, t))
            })
            .collect();
        let results = RunTable::new(&runs, false);
        let line = &results.lines[0];
        // Seed 0: ((10 + 30) / 2 + 80) / 2 = 50; seed 1: (35 + 80) / 2 = 57.5.
        let score = line.average(&[vec!["a", "b"], vec!["c"]]).unwrap();
        assert_eq!((score.mean, score.seeds), (53.75, 2));
        assert!((score.deviation.unwrap() - 7.5 / 2f64.sqrt()).abs() < 1e-12);
        assert_eq!(line.average(&[vec!["a", "d"]]), None);
        let unequal = RunTable::new(&runs[..5], false).lines.remove(0).average(&[vec!["a", "c"]]);
        assert_eq!(unequal, Some(Spread { mean: 47.5, deviation: None, seeds: 1 }));
    }

    #[test]
    fn backbones_and_normalizations_are_lines_of_their_own() {
        let mut other = run("a", "vpt", 0, 10.0);
        other.record.backbone_digest = "ffff".to_owned();
        let mut autocast = run("a", "vpt", 0, 30.0);
        autocast.record.precision = Some("autocast-bf16".to_owned());
        let runs = [run("a", "vpt", 0, 20.0), other, autocast];
        let results = RunTable::new(&runs, false);
        let labels: Vec<_> = results.lines.iter().map(|line| line.label.as_str()).collect();
        let expected = ["vit 00ff", "vit 00ff in autocast-bf16", "vit ffff"];
        assert_eq!(labels, expected.map(|backbone| format!("VPT-deep · {backbone}")));
    }
}
