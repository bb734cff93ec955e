//! The page: one HTML file without external resources.

mod bypass;
mod mistakes;
mod tables;
#[cfg(test)]
mod tests;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::bar_chart::BarChart;
use super::curves::{self, Quantity};
use super::folder_report::{PageContents, Report};
use super::methods;
use super::palette::short;
use super::runs::{BrokenFile, FoundRun};
use super::sheet::Origin;
use crate::error::Result;

const STYLE: &str = include_str!("style.css");

/// The largest numbers of runs whose curves, and whose mistakes and maps, are on the page. The limits
/// keep the page small enough to send.
const MOST_CURVES: usize = 120;
const MOST_DETAILS: usize = 16;

/// Returns the whole page.
///
/// # Errors
/// [`Error::Chart`](crate::error::Error::Chart) if a chart cannot be drawn.
pub(super) fn page(report: &Report) -> Result<String> {
    let contents = report.contents();
    let title = short(report.title(), 80);
    let sections = [
        ("accuracy", "Accuracy", accuracy(&contents)?),
        ("tables", "Tables", Some(tables::sheets(&contents.sheets))),
        ("curves", "Learning curves", learning_curves(report.runs())?),
        ("mistakes", "Classes and mistakes", mistakes::section(report.runs())?),
        ("bypass", "What the bypass sees", bypass::section(report.runs())?),
        ("runs", "Runs", Some(tables::runs(report.runs()))),
    ];
    let sections = sections.into_iter().filter_map(|(id, head, body)| Some((id, head, body?)));
    let sections: Vec<_> = sections.collect();
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (title) }
                p.pale { (report.runs().len()) " run(s) of convpass; top-1 accuracy on test images, in percent" }
                (broken(report.broken()))
                nav { @for (id, head, _) in &sections { a href={ "#" (id) } { (head) } } }
                @for (id, head, body) in &sections {
                    section id=(id) { h2 { (head) } (body) }
                }
            }
        }
    };
    Ok(page.into_string())
}

fn broken(broken: &[BrokenFile]) -> Markup {
    html! {
        @if !broken.is_empty() {
            div.warn {
                strong { (broken.len()) " file(s) could not be read; what they tell is missing:" }
                ul { @for file in broken { li { code { (file.file.display()) } ": " (short(&file.reason, 300)) } } }
            }
        }
    }
}

/// Embeds a chart of this crate, whose texts are escaped.
fn chart(svg: &str, label: &str) -> Markup {
    html! { div role="img" aria-label=(label) { (PreEscaped(svg)) } }
}

fn accuracy(contents: &PageContents) -> Result<Option<Markup>> {
    let mut parts = Vec::new();
    for sheet in &contents.sheets {
        let accuracy = contents.accuracy_chart(sheet).map(|chart| chart.svg()).transpose()?;
        let mut bars = Vec::new();
        for bar in BarChart::of(sheet).iter().filter(|chart| !chart.bars.is_empty()) {
            bars.push((format!("{}: top-1 in percent by method", bar.title), bar.svg()?));
        }
        parts.push(html! {
            h3 { (sheet.title) }
            @if let Some(svg) = accuracy {
                figure.wide {
                    (chart(&svg, "top-1 accuracy over trained weights, a mark for each method"))
                    figcaption { "Trained weights are those of method and head, the mean over the tasks." }
                }
            }
            div.charts {
                @for (label, svg) in bars { figure { (chart(&svg, &label)) } }
            }
            @if sheet.rows.iter().any(|row| row.source == Origin::Paper) {
                p.pale { "Filled marks and bars are these runs; outlines are the paper's." }
            }
            @if sheet.rows.iter().any(|row| row.scores.iter().flatten().any(|score| score.deviation.is_some())) {
                p.pale { "± and lines: standard deviation over seeds." }
            }
        });
    }
    Ok((!parts.is_empty()).then(|| html! { @for part in parts { (part) } }))
}

/// Returns the name of a run beside its curves and mistakes.
fn run_name(run: &FoundRun) -> String {
    let method = short(&methods::label(&run.record.model.method), 60);
    format!("{method}, seed {}", run.record.train.seed)
}

/// Returns the first `most` of the runs and the number of the others. Runs of a task are together;
/// tested runs come before trials, and the first seed before the second.
fn by_task(runs: Vec<&FoundRun>, most: usize) -> (Vec<(&str, Vec<&FoundRun>)>, usize) {
    let mut runs = runs;
    let is_trial = |run: &FoundRun| run.record.test_top1.is_none();
    runs.sort_by_key(|run| (is_trial(run), run.record.train.seed));
    let left_out = runs.len().saturating_sub(most);
    runs.truncate(most);
    let mut tasks: Vec<(&str, Vec<&FoundRun>)> = Vec::new();
    runs.sort_by(|a, b| a.name.cmp(&b.name));
    for run in runs {
        match tasks.iter_mut().find(|(task, _)| *task == run.record.task) {
            Some((_, of_task)) => of_task.push(run),
            None => tasks.push((&run.record.task, vec![run])),
        }
    }
    for (_, runs) in &mut tasks {
        runs.sort_by_key(|run| (methods::rank(&run.record.model.method), is_trial(run)));
    }
    (tasks, left_out)
}

fn left_out(count: usize) -> Markup {
    html! { @if count > 0 { p.pale { (count) " more run(s) are left out here, so that the page stays small." } } }
}

fn learning_curves(runs: &[FoundRun]) -> Result<Option<Markup>> {
    let with_epochs = runs.iter().filter(|run| !run.record.fit.epochs.is_empty()).collect();
    let (tasks, more) = by_task(with_epochs, MOST_CURVES);
    let mut parts = Vec::new();
    for (index, (task, runs)) in tasks.iter().enumerate() {
        let mut figures = Vec::new();
        for run in runs {
            figures.push(run_curves(run)?);
        }
        parts.push(html! {
            details open[index == 0] {
                summary { (short(task, 80)) ", " (runs.len()) " run(s)" }
                div.charts { @for figure in figures { (figure) } }
            }
        });
    }
    let note = "Training accuracy is on training batches, with dropout and drop path on where the run has them.";
    Ok((!parts.is_empty()).then(|| {
        html! { p.pale { (note) } @for part in parts { (part) } (left_out(more)) }
    }))
}

fn run_curves(run: &FoundRun) -> Result<Markup> {
    let epochs = &run.record.fit.epochs;
    let mut charts = Vec::new();
    for (quantity, name) in [(Quantity::Loss, "loss"), (Quantity::Accuracy, "accuracy")] {
        let svg = curves::svg(epochs, quantity)?;
        charts.push((format!("{name} by epoch of {}", run_name(run)), name, svg));
    }
    Ok(html! {
        figure {
            figcaption {
                strong { (run_name(run)) } " " (short(&run.name.display().to_string(), 80))
                @if run.record.fit.stopped { " (ended before its last epoch)" }
            }
            @for (label, name, svg) in charts {
                @match svg {
                    Some(svg) => (chart(&svg, &label)),
                    None => p { "The " (name) " is not a number in any epoch." },
                }
            }
        }
    })
}
