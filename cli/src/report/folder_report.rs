//! The report of a folder of runs.

use std::path::Path;

use super::bar_chart::BarChart;
use super::page;
use super::palette::short;
use super::results::RunTable;
use super::runs::{self, BrokenFile, FoundRun};
use super::sheet::{Column, Origin, Sheet, SheetRow};
use super::summary;
use super::{AccuracyChart, AccuracyPoint};
use crate::error::Result;
use crate::files::write_atomically;

/// The report of the runs in a folder: as one HTML page without external resources, as charts and
/// as text.
///
/// A run is a folder with a `run.json` ([`RunRecord`](convpass::train::RunRecord)). Runs that
/// differ in their seeds alone are averaged. Tasks of VTAB-1k stand beside the published rows,
/// others in a table of their own.
///
/// ```no_run
/// # fn main() -> convpass::Result<()> {
/// let report = convpass::Report::read("runs")?;
/// report.save("runs/report.html")?;
/// print!("{}", report.summary(80, false));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Report {
    title: String,
    runs: Vec<FoundRun>,
    broken: Vec<BrokenFile>,
}

/// A chart of a report.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedChart {
    /// A name for its file, without an ending.
    pub name: String,
    /// An SVG document.
    pub svg: String,
}

impl Report {
    /// Reads every run below `folder`; links are not followed.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io) if the folder cannot be read or holds no run; if none
    /// of its records can be read, the error of the first. A file that cannot be read beside others
    /// that can is no error: [`Report::broken`] names it.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let (runs, broken) = runs::read(folder)?;
        let title = folder.file_name().map(|name| name.to_string_lossy().into_owned());
        Ok(Report { title: title.unwrap_or_else(|| "runs".to_owned()), runs, broken })
    }

    /// Returns the name of the folder.
    pub fn title(&self) -> &str {
        &self.title
    }

    /// Returns the runs in the order of their paths.
    pub fn runs(&self) -> &[FoundRun] {
        &self.runs
    }

    /// Files that cannot be read.
    pub fn broken(&self) -> &[BrokenFile] {
        &self.broken
    }

    /// Returns the page.
    ///
    /// # Errors
    /// [`Error::Chart`](crate::error::Error::Chart) if a chart cannot be drawn.
    pub fn html(&self) -> Result<String> {
        page::page(self)
    }

    /// Writes [`Report::html`]; the file appears whole or not at all.
    ///
    /// # Errors
    /// The errors of [`Report::html`]; [`Error::Io`](crate::error::Error::Io) if the file cannot be
    /// written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        write_atomically(path.as_ref(), self.html()?.as_bytes())
    }

    /// Accuracy over trained weights, and the bars of each group, task and average.
    ///
    /// # Errors
    /// [`Error::Chart`](crate::error::Error::Chart) if one cannot be drawn.
    pub fn charts(&self) -> Result<Vec<NamedChart>> {
        let contents = self.contents();
        let mut charts = Vec::new();
        for sheet in &contents.sheets {
            let mut add = |name: &str, svg| {
                charts
                    .push(NamedChart { name: file_name(&format!("{name}-{}", sheet.title)), svg });
            };
            if let Some(chart) = contents.accuracy_chart(sheet) {
                add("accuracy", chart.svg()?);
            }
            for bars in BarChart::of(sheet).iter().filter(|chart| !chart.bars.is_empty()) {
                add(&format!("bars-{}", bars.title), bars.svg()?);
            }
        }
        Ok(charts)
    }

    /// Returns the tables as text with lines of at most `width` columns (40 or more). With `color`
    /// the best value of a column is bold.
    pub fn summary(&self, width: usize, color: bool) -> String {
        summary::summary(self, width.max(40), color)
    }

    /// Returns the tables that the page, the charts and the text show.
    pub(super) fn contents(&self) -> PageContents {
        let (vtab, own) = (RunTable::new(&self.runs, true), RunTable::new(&self.runs, false));
        PageContents { sheets: Sheet::all(&vtab, &own) }
    }

    #[cfg(test)]
    pub(super) fn of(runs: Vec<FoundRun>) -> Self {
        Report { title: "synthetic".to_owned(), runs, broken: Vec::new() }
    }
}

/// A report's tables.
pub(super) struct PageContents {
    pub(super) sheets: Vec<Sheet>,
}

impl PageContents {
    /// Returns the chart of the rows that have an average and a number of weights; `None` if no row
    /// has.
    pub(super) fn accuracy_chart(&self, sheet: &Sheet) -> Option<AccuracyChart> {
        let overall = sheet.overall()?;
        let published = sheet.rows.iter().any(|row| row.source == Origin::Paper);
        let point = |row: &SheetRow| {
            let (method, head) = row.weights?;
            let own = row.source == Origin::Own;
            Some(AccuracyPoint {
                label: short(&row.label, 28),
                params: (method + head).max(1.0),
                top1: row.scores.get(overall).copied().flatten()?.mean.clamp(0.0, 100.0),
                highlight: own && (published || row.label.starts_with("Convpass")),
            })
        };
        let mut points: Vec<_> = sheet.rows.iter().filter_map(point).collect();
        points.truncate(64);
        let title = match sheet.columns.get(overall)? {
            Column::G => "VTAB-1k, mean of the three groups (G)".to_owned(),
            Column::Mean(count) => format!("{}, mean of {count}", sheet.title),
            column => short(&column.name(), 40),
        };
        (!points.is_empty()).then_some(AccuracyChart { title, points })
    }
}

/// Returns `text` as the name of a file: other characters than letters and digits become dashes.
fn file_name(text: &str) -> String {
    let clean = text.chars().map(|c| if c.is_alphanumeric() { c } else { '-' });
    clean.flat_map(char::to_lowercase).take(80).collect()
}
