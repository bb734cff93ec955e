//! Tables as data, which the page, the charts and the terminal show.

use super::published::{PAPER, Published, RETUNED, mean_head};
use super::results::{MethodLine, RunTable};
use super::task_table::Spread;
use convpass::data::vtab::{self, TASKS, VtabGroup};

/// The content of a column.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Column {
    /// A task.
    Task(String),
    /// The mean of a whole group of VTAB-1k.
    Group(VtabGroup),
    /// G, the mean of the three group means.
    G,
    /// A, the mean of the 19 tasks.
    A,
    /// The mean of that many tasks.
    Mean(usize),
}

impl Column {
    /// Returns the head of the column.
    pub(super) fn name(&self) -> String {
        match self {
            Column::Task(name) => name.clone(),
            Column::Group(group) => format!("{group} mean"),
            Column::G => "G".to_owned(),
            Column::A => "A".to_owned(),
            Column::Mean(count) => format!("mean of {count}"),
        }
    }

    pub(super) fn is_task(&self) -> bool {
        matches!(self, Column::Task(_))
    }
}

/// The origin of the numbers of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Origin {
    Own,
    Paper,
    Retuned,
}

impl Origin {
    pub(super) fn name(self) -> &'static str {
        match self {
            Origin::Own => "these runs",
            Origin::Paper => "paper",
            Origin::Retuned => "OSU-MLB, re-tuned",
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct SheetRow {
    pub(super) label: String,
    pub(super) source: Origin,
    /// One figure for each column.
    pub(super) scores: Vec<Option<Spread>>,
    /// Number of trained weights of the method and of its head, the mean over tasks.
    pub(super) weights: Option<(f64, f64)>,
}

/// A table of top-1 accuracies in percent.
#[derive(Clone, Debug)]
pub(super) struct Sheet {
    pub(super) title: String,
    pub(super) columns: Vec<Column>,
    pub(super) rows: Vec<SheetRow>,
    /// Notes that a reader of the numbers must know.
    pub(super) notes: Vec<String>,
}

impl Sheet {
    /// Returns the tables of the results: VTAB-1k with published rows, and other tasks.
    pub(super) fn all(vtab: &RunTable, own: &RunTable) -> Vec<Sheet> {
        let tables = [(vtab, Sheet::vtab as fn(&RunTable) -> Sheet), (own, Sheet::own)];
        let some = tables.into_iter().filter(|(results, _)| !results.lines.is_empty());
        some.map(|(results, sheet)| sheet(results)).collect()
    }

    fn own(results: &RunTable) -> Sheet {
        let mut columns: Vec<_> =
            results.tasks.iter().map(|task| Column::Task(task.to_string())).collect();
        if columns.len() > 1 {
            columns.push(Column::Mean(columns.len()));
        }
        let mut sheet = Sheet {
            title: "Other tasks".to_owned(),
            columns,
            rows: Vec::new(),
            notes: results.notes.clone(),
        };
        sheet.rows = sheet.own_rows(results);
        sheet
    }

    fn vtab(results: &RunTable) -> Sheet {
        let tasks = &results.tasks;
        let whole = |group: &VtabGroup| of_group(*group).all(|name| tasks.contains(&name));
        let mut notes = results.notes.clone();
        // Averages first: most published rows have nothing else, and a small screen shows them.
        let mut columns = Vec::new();
        if tasks.len() == TASKS.len() {
            columns.extend([Column::G, Column::A]);
            notes.push(AVERAGES.to_owned());
        } else {
            columns.push(Column::Mean(tasks.len()));
            let missing: Vec<_> =
                TASKS.iter().map(|task| task.name).filter(|name| !tasks.contains(name)).collect();
            notes.push(format!(
                "A subset: {} of the 19 tasks. No average of it compares with a published G or A. \
                 Without a run: {}.",
                tasks.len(),
                missing.join(", ")
            ));
        }
        columns.extend(GROUPS.into_iter().filter(whole).map(Column::Group));
        columns.extend(tasks.iter().map(|task| Column::Task(task.to_string())));
        notes.push(PROTOCOL.to_owned());
        let title = "VTAB-1k".to_owned();
        let mut sheet = Sheet { title, columns, rows: Vec::new(), notes };
        sheet.rows = sheet.own_rows(results);
        let published = [(PAPER, Origin::Paper), (RETUNED, Origin::Retuned)];
        for (rows, source) in published {
            let rows: Vec<SheetRow> = rows.iter().map(|row| sheet.published(row, source)).collect();
            sheet.rows.extend(rows);
        }
        sheet.rows.retain(|row| row.scores.iter().any(Option::is_some));
        sheet
    }

    fn own_rows(&self, results: &RunTable) -> Vec<SheetRow> {
        let row = |line: &MethodLine| SheetRow {
            label: line.label.clone(),
            source: Origin::Own,
            scores: self.columns.iter().map(|column| line.average(&self.groups(column))).collect(),
            weights: Some(line.weights()),
        };
        results.lines.iter().map(row).collect()
    }

    /// Returns the tasks that a column averages, in groups.
    fn groups<'a>(&'a self, column: &'a Column) -> Vec<Vec<&'a str>> {
        let tasks = self.columns.iter().filter_map(|column| match column {
            Column::Task(name) => Some(name.as_str()),
            _ => None,
        });
        match column {
            Column::Task(name) => vec![vec![name]],
            Column::Group(group) => vec![of_group(*group).collect()],
            Column::G => GROUPS.map(|group| of_group(group).collect()).to_vec(),
            Column::A | Column::Mean(_) => vec![tasks.collect()],
        }
    }

    fn published(&self, row: &Published, source: Origin) -> SheetRow {
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
        let tasks = |names: &[&str]| -> Vec<f64> {
            names
                .iter()
                .filter_map(|name| vtab::task(name))
                .map(|task| task.convpass_top1)
                .collect()
        };
        let score = |column: &Column| match column {
            Column::G => Some(row.g),
            _ if !row.has_tasks => None,
            column => {
                Some(mean(self.groups(column).iter().map(|names| mean(tasks(names))).collect()))
            }
        };
        SheetRow {
            label: row.method.to_owned(),
            source,
            scores: self
                .columns
                .iter()
                .map(|c| score(c).and_then(|top1| Spread::of(&[top1])))
                .collect(),
            weights: row.params.map(|params| (params, mean_head())),
        }
    }

    /// Returns the column that summarizes a row: G, or the mean of all tasks, or the only task.
    pub(super) fn overall(&self) -> Option<usize> {
        let mean = |column: &Column| matches!(column, Column::G | Column::Mean(_));
        self.columns.iter().position(mean).or_else(|| self.columns.len().checked_sub(1))
    }

    /// Returns the number of seeds of a row as text, such as `3` or `1–3`.
    pub(super) fn seeds(row: &SheetRow) -> String {
        let seeds = || row.scores.iter().flatten().map(|score| score.seeds);
        match (seeds().min(), seeds().max(), row.source) {
            (Some(least), Some(most), Origin::Own) if least < most => format!("{least}–{most}"),
            (Some(seeds), _, Origin::Own) => seeds.to_string(),
            _ => "–".to_owned(),
        }
    }

    /// Returns whether a row is the best in a column.
    pub(super) fn is_best(&self, row: &SheetRow, column: usize) -> bool {
        let own = self.rows.iter().filter(|row| row.source == Origin::Own);
        let scores = || own.clone().filter_map(|row| row.scores.get(column).copied().flatten());
        let Some(score) = row.scores.get(column).copied().flatten() else { return false };
        row.source == Origin::Own
            && scores().count() > 1
            && scores().all(|other| other.mean <= score.mean)
    }
}

const GROUPS: [VtabGroup; 3] = [VtabGroup::Natural, VtabGroup::Specialized, VtabGroup::Structured];

fn of_group(group: VtabGroup) -> impl Iterator<Item = &'static str> {
    TASKS.iter().filter(move |task| task.group == group).map(|task| task.name)
}

const AVERAGES: &str =
    "G is the mean of the three group means, as published; A is the mean of the 19 tasks.";

/// The protocols of the published rows.
const PROTOCOL: &str = "Paper: arXiv 2207.07039, ViT-B/16 of ImageNet-21k; its code keeps the best \
    of every tenth epoch on the test images, and its Convpass row is seed 42 task by task. \
    Re-tuned: OSU-MLB (CVPR 2025), last epoch. These runs report the epoch that the run ended with.";

/// Returns a figure as text: `53.20`, or `53.20 ± 0.41` over several seeds.
pub(super) fn percent(score: &Spread) -> String {
    match score.deviation {
        Some(deviation) => format!("{:.2} ± {deviation:.2}", score.mean),
        None => format!("{:.2}", score.mean),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::run;
    use super::*;

    fn sheets(runs: &[super::super::runs::FoundRun]) -> Vec<Sheet> {
        Sheet::all(&RunTable::new(runs, true), &RunTable::new(runs, false))
    }

    #[test]
    fn nineteen_tasks_stand_beside_the_published_rows_with_g_and_a_apart() {
        let runs: Vec<_> =
            TASKS.iter().map(|task| run(task.name, "lora", 0, task.convpass_top1)).collect();
        let sheet = &sheets(&runs)[0];
        assert_eq!(sheet.columns.len(), 19 + 3 + 2);
        let at = |row: &SheetRow, column: &Column| {
            let index = sheet.columns.iter().position(|c| c == column).unwrap();
            row.scores[index].map(|score| score.mean)
        };
        let own = &sheet.rows[0];
        assert!((at(own, &Column::G).unwrap() - 76.56).abs() < 0.005);
        assert!((at(own, &Column::A).unwrap() - 74.44).abs() < 0.005);
        let paper: Vec<_> = sheet.rows.iter().filter(|row| row.source == Origin::Paper).collect();
        let convpass = paper.iter().find(|row| row.label == "Convpass").unwrap();
        for (column, (own, theirs)) in
            sheet.columns.iter().zip(own.scores.iter().zip(&convpass.scores))
        {
            let gap = own.unwrap().mean - theirs.unwrap().mean;
            assert!(gap.abs() < 0.005, "{column:?}");
        }
        let lora = paper.iter().find(|row| row.label == "LoRA").unwrap();
        assert_eq!((at(lora, &Column::G), at(lora, &Column::A)), (Some(74.5), None));
        assert!(sheet.rows.iter().any(|row| row.source == Origin::Retuned));
    }

    #[test]
    fn a_subset_says_so_and_has_no_published_average() {
        let runs = [run("kitti", "lora", 0, 70.0), run("dtd", "lora", 0, 60.0)];
        let sheet = &sheets(&runs)[0];
        let names: Vec<_> = sheet.columns.iter().map(Column::name).collect();
        assert_eq!(names, ["mean of 2", "dtd", "kitti"]);
        assert!(sheet.notes.iter().any(|note| note.contains("2 of the 19 tasks")));
        // Of the published rows only the one with its tasks is left.
        assert_eq!(sheet.rows.len(), 2);
        let means: Vec<_> = sheet.rows.iter().map(|row| row.scores[0].unwrap().mean).collect();
        assert_eq!(means[0], 65.0);
        assert!((means[1] - (72.18 + 80.03) / 2.0).abs() < 1e-9);
    }

    #[test]
    fn own_tasks_have_a_table_of_their_own() {
        let runs = [run("kitti", "lora", 0, 70.0), run("count", "lora", 0, 60.0)];
        let sheets = sheets(&runs);
        assert_eq!(sheets.len(), 2);
        assert_eq!(sheets[1].columns, [Column::Task("count".to_owned())]);
        assert_eq!((sheets[1].rows.len(), sheets[1].overall()), (1, Some(0)));
    }
}
