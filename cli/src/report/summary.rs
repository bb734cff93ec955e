//! A report as text for a terminal.

use std::fmt::Write;

use super::folder_report::Report;
use super::palette::{short, short_number};
use super::sheet::{Origin, Sheet, SheetRow, percent};

/// Width in characters of the label of a row if the terminal is wide enough, and of the head of a
/// column.
const LABEL: usize = 26;
const HEAD: usize = 20;
const BOLD: (&str, &str) = ("\u{1b}[1m", "\u{1b}[0m");

pub(super) fn summary(report: &Report, width: usize, color: bool) -> String {
    let mut text = String::new();
    for sheet in report.contents().sheets {
        let label = LABEL.min(width - HEAD - 1);
        for part in parts(&sheet, width, label) {
            table(&mut text, &sheet, &part, label, color);
        }
        for note in &sheet.notes {
            text += &wrapped(note, width);
        }
        text.push('\n');
    }
    let untested = report.runs().iter().filter(|run| run.record.test_top1.is_none()).count();
    if untested > 0 {
        text += &wrapped(&format!("{untested} run(s) have no result on test images."), width);
    }
    for broken in report.broken() {
        text += &wrapped(&format!("not read: {}: {}", broken.file.display(), broken.reason), width);
    }
    text
}

/// A column of the text: its head and, for each row, the text and whether it is the best.
struct Printed {
    head: String,
    cells: Vec<(String, bool)>,
}

impl Printed {
    fn width(&self) -> usize {
        let cells = self.cells.iter().map(|(cell, _)| cell.chars().count());
        cells.fold(self.head.chars().count(), usize::max)
    }
}

/// Splits the columns into parts that each fit the terminal.
fn parts(sheet: &Sheet, width: usize, label: usize) -> Vec<Vec<Printed>> {
    let cell = |row: &SheetRow, index: usize| {
        let score = row.scores.get(index).copied().flatten();
        (score.map_or("-".to_owned(), |score| percent(&score)), sheet.is_best(row, index))
    };
    let scores = sheet.columns.iter().enumerate().map(|(index, column)| Printed {
        head: short(&column.name(), HEAD),
        cells: sheet.rows.iter().map(|row| cell(row, index)).collect(),
    });
    let weights =
        |row: &SheetRow| row.weights.map_or("-".to_owned(), |(method, _)| short_number(method));
    let weights = Printed {
        head: "weights".to_owned(),
        cells: sheet.rows.iter().map(|row| (weights(row), false)).collect(),
    };
    let mut parts: Vec<Vec<Printed>> = vec![Vec::new()];
    let mut used = label;
    for column in scores.chain([weights]) {
        let needed = 1 + column.width();
        if used + needed > width && !parts.last().is_none_or(Vec::is_empty) {
            parts.push(Vec::new());
            used = label;
        }
        used += needed;
        if let Some(part) = parts.last_mut() {
            part.push(column);
        }
    }
    parts
}

fn table(text: &mut String, sheet: &Sheet, part: &[Printed], width: usize, color: bool) {
    let mut line = pad(&format!("{}, top-1 %", sheet.title), "", width);
    for column in part {
        let _ = write!(line, " {:>1$}", column.head, column.width());
    }
    *text += line.trim_end();
    text.push('\n');
    for (index, row) in sheet.rows.iter().enumerate() {
        let source = match row.source {
            Origin::Own => "",
            Origin::Paper => " (paper)",
            Origin::Retuned => " (OSU-MLB)",
        };
        let mut line = pad(&row.label, source, width);
        for column in part {
            let (cell, best) = &column.cells[index];
            let cell = format!("{cell:>0$}", column.width());
            let _ = if *best && color {
                write!(line, " {}{cell}{}", BOLD.0, BOLD.1)
            } else {
                write!(line, " {cell}")
            };
        }
        *text += line.trim_end();
        text.push('\n');
    }
    text.push('\n');
}

/// Returns a label and the text behind it in `width` characters. The label is cut if it does not fit.
fn pad(label: &str, end: &str, width: usize) -> String {
    let label = short(label, width.saturating_sub(end.chars().count()));
    format!("{:<width$}", label + end)
}

/// Breaks text into lines of at most `width` characters. A longer word is split.
fn wrapped(text: &str, width: usize) -> String {
    let (mut all, mut used) = (String::new(), 0);
    for word in short(text, 2_000).split_whitespace() {
        let letters: Vec<char> = word.chars().collect();
        for part in letters.chunks(width) {
            if used > 0 {
                let fits = used + 1 + part.len() <= width;
                all.push(if fits { ' ' } else { '\n' });
                used = if fits { used + 1 } else { 0 };
            }
            all.extend(part);
            used += part.len();
        }
    }
    all.push('\n');
    all
}

#[cfg(test)]
mod tests {
    use super::super::testing::run;
    use super::*;
    use convpass::data::vtab::TASKS;

    #[test]
    fn lines_fit_and_show_the_records_numbers() {
        let seeds = || TASKS.iter().flat_map(|task| (0..2).map(move |seed| (task, seed)));
        let runs: Vec<_> =
            seeds().map(|(task, seed)| run(task.name, "lora", seed, 50.0 + seed as f64)).collect();
        for width in [40, 80, 200] {
            let text = Report::of(runs.clone()).summary(width, false);
            let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(widest <= width, "{widest} > {width}\n{text}");
            assert!(text.contains("50.50 ± 0.71"), "{text}");
            assert!(text.contains("76.56") && text.contains("72.29"), "{text}");
            assert!(!text.contains('\u{1b}'));
        }
    }

    #[test]
    fn a_terminal_gets_no_escapes_of_a_users_and_bold_only_if_asked() {
        let runs = vec![run("a\u{1b}[31m", "lora", 0, 50.0), run("a\u{1b}[31m", "vpt", 0, 60.0)];
        let plain = Report::of(runs.clone()).summary(80, false);
        assert!(!plain.contains('\u{1b}') && plain.contains("60.00"), "{plain}");
        let bold = Report::of(runs).summary(80, true);
        assert!(bold.contains("\u{1b}[1m") && bold.matches('\u{1b}').count() == 2, "{bold:?}");
    }
}
