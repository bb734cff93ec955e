//! Per-class accuracy, confusions and the most confident mistakes of the runs.

use maud::{Markup, html};

use super::super::bar_chart::{Bar, BarChart};
use super::super::palette::short;
use super::super::picture::heat_map;
use super::super::predictions::{Prediction, Predictions};
use super::super::runs::FoundRun;
use super::{MOST_DETAILS, by_task, chart, left_out, run_name};
use crate::error::Result;

/// The largest number of classes for which every class has a bar and a label beside the matrix. With
/// more classes only the worst ones have a bar.
const MOST_LABELS: usize = 20;
/// The largest number of classes for which the matrix is drawn. With more classes a cell would be
/// smaller than a pixel.
const MOST_CELLS: i64 = 512;
const PAIRS: usize = 8;

pub(super) fn section(runs: &[FoundRun]) -> Result<Option<Markup>> {
    let known = runs.iter().filter(|run| run.predictions.is_some()).collect();
    let (tasks, more) = by_task(known, MOST_DETAILS);
    let mut parts = Vec::new();
    for (index, run) in tasks.into_iter().flat_map(|(_, runs)| runs).enumerate() {
        if let Some(predictions) = &run.predictions {
            parts.push(details(run, predictions, index == 0)?);
        }
    }
    Ok((!parts.is_empty()).then(|| html! { @for part in parts { (part) } (left_out(more)) }))
}

fn details(run: &FoundRun, predictions: &Predictions, open: bool) -> Result<Markup> {
    let classes = class_bars(predictions).svg()?;
    let title = format!("{}: {}", short(&run.record.task, 60), run_name(run));
    Ok(html! {
        details open[open] {
            summary {
                (title) ", " (format!("{:.2}", predictions.top1())) " % of " (predictions.images.len()) " images"
            }
            (disagreement(run, predictions))
            div.charts {
                figure {
                    (chart(&classes, &format!("accuracy by class of {title}")))
                    figcaption { "Accuracy by class, the worst first." }
                }
                @if predictions.num_classes <= MOST_CELLS { (confusion(predictions)?) }
            }
            (every_class(predictions))
            (pairs(predictions))
            (gallery(predictions))
        }
    })
}

/// Returns a warning if the predictions are for other images or another adapter than the record.
fn disagreement(run: &FoundRun, predictions: &Predictions) -> Markup {
    let of_one_image = 100.0 / predictions.images.len().max(1) as f64;
    let recorded = run.record.test_top1;
    html! {
        @match recorded {
            Some(top1) if (top1 - predictions.top1()).abs() > 1.5 * of_one_image => {
                p.warn { "The run's record says " (format!("{top1:.2}")) " %: these predictions are of other images or of another adapter." }
            }
            _ => {}
        }
    }
}

fn class_bars(predictions: &Predictions) -> BarChart {
    let mut classes = predictions.per_class();
    let share = |right: usize, all: usize| 100.0 * right as f64 / all as f64;
    classes.sort_by(|a, b| share(a.1, a.2).total_cmp(&share(b.1, b.2)));
    let title = if classes.len() > MOST_LABELS {
        format!("The {MOST_LABELS} worst of {} classes", classes.len())
    } else {
        format!("{} classes", classes.len())
    };
    let bar = |&(class, right, all): &(i64, usize, usize)| Bar {
        label: short(&predictions.class_name(class), 16),
        value: share(right, all),
        deviation: None,
        number: format!("{:.0} % of {all}", share(right, all)),
        filled: true,
    };
    BarChart { title, bars: classes.iter().take(MOST_LABELS).map(bar).collect() }
}

/// Returns the list of the accuracy of each class, for more classes than have a bar.
fn every_class(predictions: &Predictions) -> Markup {
    let classes = predictions.per_class();
    html! {
        @if classes.len() > MOST_LABELS {
            details {
                summary { "All " (classes.len()) " classes" }
                ul.classes {
                    @for (class, right, all) in classes {
                        li { (predictions.class_name(class)) ": " (right) " of " (all) }
                    }
                }
            }
        }
    }
}

// In the units of the matrix's view box.
const SIDE: f64 = 320.0;
const TEXT: f64 = 13.0;

/// Returns the confusion matrix as one picture, with labels if there is room for them.
fn confusion(predictions: &Predictions) -> Result<Markup> {
    let n = predictions.num_classes.max(1) as usize;
    let counts = predictions.confusion();
    let totals = predictions.per_class();
    let total = |class: i64| totals.iter().find(|(c, ..)| *c == class).map_or(1, |(.., all)| *all);
    let totals: Vec<f64> = (0..n as i64).map(|class| total(class) as f64).collect();
    let picture = heat_map((n, n), |row, col| {
        let count = counts.get(&(row as i64, col as i64)).copied().unwrap_or(0);
        ((count as f64 / totals[row]).sqrt(), row != col)
    })?;
    let step = n.div_ceil(MOST_LABELS);
    // Names where every class has one, else numbers.
    let name = |class: usize| match step {
        1 => short(&predictions.class_name(class as i64), 11),
        _ => class.to_string(),
    };
    let longest = (0..n).step_by(step).map(|class| name(class).chars().count()).max().unwrap_or(1);
    let gutter = longest as f64 * TEXT * 0.58 + 30.0;
    let size = SIDE + gutter;
    let at = |class: usize| gutter + (class as f64 + 0.5) * SIDE / n as f64;
    Ok(html! {
        figure {
            svg viewBox=(format!("0 0 {size:.0} {size:.0}")) role="img"
                aria-label={ "confusion matrix of " (n) " classes" } {
                image href=(picture) x=(gutter) y=(gutter) width=(SIDE) height=(SIDE)
                    style="image-rendering: pixelated" preserveAspectRatio="none" {}
                rect x=(gutter) y=(gutter) width=(SIDE) height=(SIDE) fill="none" stroke="#5A5A5A" {}
                g font-family="sans-serif" font-size=(TEXT) fill="#5A5A5A" text-anchor="end" {
                    @for class in (0..n).step_by(step) {
                        text x=(gutter - 5.0) y=(format!("{:.1}", at(class) + TEXT * 0.35)) { (name(class)) }
                        @let turn = format!("translate({:.1} {:.1}) rotate(90)", at(class) - TEXT * 0.35, gutter - 5.0);
                        text transform=(turn) { (name(class)) }
                    }
                }
                g font-family="sans-serif" font-size=(TEXT) fill="#222222" text-anchor="middle" {
                    text x=(format!("{:.1}", gutter + SIDE / 2.0)) y=(TEXT) { "predicted class" }
                    text transform=(format!("translate({TEXT} {:.1}) rotate(-90)", gutter + SIDE / 2.0)) { "class" }
                }
            }
            figcaption {
                "Each row is a class and sums to its images: blue is right, orange is wrong; opacity goes with the square root of the share."
            }
        }
    })
}

fn pairs(predictions: &Predictions) -> Markup {
    let mut pairs: Vec<_> =
        predictions.confusion().into_iter().filter(|((class, said), _)| class != said).collect();
    pairs.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    let totals = predictions.per_class();
    let total = |class: i64| totals.iter().find(|(c, ..)| *c == class).map_or(0, |(.., all)| *all);
    html! {
        @if !pairs.is_empty() {
            h3 { "Most often taken for another" }
            ul {
                @for ((class, said), count) in pairs.into_iter().take(PAIRS) {
                    li {
                        strong { (predictions.class_name(class)) } " for " strong { (predictions.class_name(said)) }
                        ": " (count) " of " (total(class))
                    }
                }
            }
        }
    }
}

fn gallery(predictions: &Predictions) -> Markup {
    let mistakes: Vec<&Prediction> =
        predictions.mistakes().into_iter().filter(|image| image.picture.is_some()).collect();
    html! {
        @if !mistakes.is_empty() {
            h3 { "Most confident mistakes" }
            ul.gallery {
                @for image in mistakes {
                    li {
                        @if let Some(picture) = &image.picture {
                            img src=(picture.uri()) alt=(short(&image.path, 60)) title=(short(&image.path, 200)) loading="lazy";
                        }
                        strong { (predictions.class_name(image.predicted)) }
                        " " (format!("{:.0}", 100.0 * image.confidence)) " %, is "
                        (predictions.class_name(image.label))
                    }
                }
            }
        }
    }
}
