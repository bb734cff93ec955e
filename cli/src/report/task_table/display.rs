//! The table as text.

use super::*;

/// Width in characters of the column of task names.
const NAME: usize = 22;
/// Width in characters of the column of published figures.
const PAPER: usize = 7;

impl fmt::Display for TaskTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.block(f, "top-1 %, test", Figure::Top1)?;
        self.costs(f)?;
        if self.runs.iter().any(|run| run.best_on_test.is_some()) {
            writeln!(
                f,
                "\nThe best epoch on the test images, which is chosen on what it reports:"
            )?;
            self.block(f, "best-on-test %", Figure::BestOnTest)?;
        }
        self.notes(f)
    }
}

impl TaskTable {
    /// Returns whether any task has a published figure.
    fn has_published(&self) -> bool {
        !self.averaged(Average::A).is_empty()
    }

    fn block(&self, f: &mut fmt::Formatter<'_>, title: &str, figure: Figure) -> fmt::Result {
        write!(f, "{title:<NAME$}")?;
        for method in &self.methods {
            write!(f, " {method:>width$}", width = width(method))?;
        }
        writeln!(f, "{}", if self.has_published() { "   paper" } else { "" })?;
        for task in self.tasks_with_runs() {
            let cell = |method: &str| self.cell(task, method, figure);
            self.line(f, task, cell, vtab::task(task).map(|row| row.convpass_top1))?;
        }
        for average in Average::ALL.into_iter().filter(|&a| !self.averaged(a).is_empty()) {
            let count = self.averaged(average).len();
            let name = match average {
                Average::Group(group) => format!("{group}, mean of {count}"),
                Average::G => "G, mean of the groups".to_owned(),
                Average::A => format!("A, mean of {count}"),
                Average::Other => format!("mean of {count}"),
            };
            let cell = |method: &str| self.average(method, average, figure);
            self.line(f, &name, cell, self.published(average))?;
        }
        Ok(())
    }

    fn line(
        &self,
        f: &mut fmt::Formatter<'_>,
        name: &str,
        cell: impl Fn(&str) -> Option<Spread>,
        paper: Option<f64>,
    ) -> fmt::Result {
        write!(f, "{name:<NAME$}")?;
        for method in &self.methods {
            let text = cell(method).map_or("-".to_owned(), |spread| self.text(spread));
            write!(f, " {text:>width$}", width = width(method))?;
        }
        match paper {
            Some(paper) => writeln!(f, " {paper:>PAPER$.2}"),
            None => writeln!(f),
        }
    }

    fn text(&self, spread: Spread) -> String {
        let mark = if spread.seeds < self.seeds.len() { "*" } else { "" };
        match spread.deviation {
            Some(deviation) => format!("{:.2} ± {deviation:.2}{mark}", spread.mean),
            None => format!("{:.2}{mark}", spread.mean),
        }
    }

    /// Writes the weights and seconds of each method.
    fn costs(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        type Value = fn(&SeedRun) -> f64;
        let rows: [(&str, Value); 3] = [
            ("trained, method's", |run| run.params.method as f64),
            ("trained, head's, mean", |run| run.params.head as f64),
            ("seconds a run, mean", |run| run.seconds),
        ];
        for (name, value) in rows {
            write!(f, "{name:<NAME$}")?;
            for method in &self.methods {
                let text = self.mean_of(method, value).map_or("-".into(), |v| format!("{v:.0}"));
                write!(f, " {text:>width$}", width = width(method))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }

    /// Writes the notes that a reader needs before comparing the table with another one.
    fn notes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.seeds.len() {
            0 | 1 => writeln!(f, "one seed: no deviation")?,
            seeds => {
                writeln!(f, "mean ± deviation of the sample over {seeds} seeds; * over fewer")?;
            }
        }
        let of_vtab = self.averaged(Average::A).len();
        if of_vtab > 0 {
            writeln!(
                f,
                "paper: Convpass beside ViT-B/16, seed 42, its best epoch on the test images"
            )?;
        }
        if (1..vtab::TASKS.len()).contains(&of_vtab) {
            let share = |group| {
                let all = vtab::TASKS.iter().filter(|row| row.group == group).count();
                format!("{group} {} of {all}", self.averaged(Average::Group(group)).len())
            };
            let groups = [VtabGroup::Natural, VtabGroup::Specialized, VtabGroup::Structured];
            let shares = groups.map(share).join(", ");
            writeln!(f, "a subset of VTAB-1k, {of_vtab} of its 19 tasks ({shares}): its averages")?;
            writeln!(
                f,
                "are not those of all 19, and the paper's column averages the same subset"
            )?;
        }
        let others = self.averaged(Average::Other);
        if !others.is_empty() {
            writeln!(f, "not of VTAB-1k, so in neither G nor A: {}", others.join(", "))?;
        }
        Ok(())
    }
}

/// Returns the width of the column of a method, which holds its name and figures such as
/// `72.29 ± 0.31*`.
fn width(method: &str) -> usize {
    method.chars().count().max(13)
}
