//! Tables of the page.

use maud::{Markup, html};

use super::super::methods;
use super::super::palette::{short, short_number};
use super::super::results::selection;
use super::super::runs::FoundRun;
use super::super::sheet::{Column, Origin, Sheet, SheetRow};
use super::super::task_table::Spread;

/// Returns every table with its notes.
pub(super) fn sheets(sheets: &[Sheet]) -> Markup {
    html! {
        @if sheets.is_empty() { p { "No run has a result on test images." } }
        @for sheet in sheets { (table(sheet)) }
    }
}

fn table(sheet: &Sheet) -> Markup {
    let tall = sheet.columns.len() > 8;
    html! {
        h3 { (sheet.title) }
        div {
            div.scroll tabindex="0" role="region" aria-label={ (sheet.title) ", top-1 in percent" } {
                table {
                    thead { tr {
                        th.row { "top-1, %" }
                        @for (index, column) in sheet.columns.iter().enumerate() {
                            th.tall[tall].edge[is_edge(sheet, index)] scope="col" { span { (short(&column.name(), 40)) } }
                        }
                        th.edge.tall[tall] scope="col" { span { "seeds" } }
                        th.tall[tall] scope="col" { span { "weights, method" } }
                        th.tall[tall] scope="col" { span { "weights, head" } }
                    } }
                    @for source in [Origin::Own, Origin::Paper, Origin::Retuned] {
                        (rows(sheet, source))
                    }
                }
            }
            @for note in &sheet.notes { p.pale { (note) } }
        }
    }
}

/// Returns whether the column is the first average after the tasks.
fn is_edge(sheet: &Sheet, index: usize) -> bool {
    let is_task = |index: usize| sheet.columns.get(index).map(Column::is_task);
    index > 0 && is_task(index) != is_task(index - 1)
}

fn rows(sheet: &Sheet, source: Origin) -> Markup {
    let rows: Vec<&SheetRow> = sheet.rows.iter().filter(|row| row.source == source).collect();
    let others = sheet.rows.iter().any(|row| row.source != Origin::Own);
    html! {
        @if !rows.is_empty() {
            tbody {
                @if others {
                    tr { th.source colspan=(sheet.columns.len() + 4) scope="rowgroup" { (source.name()) } }
                }
                @for row in rows {
                    tr {
                        th.row scope="row" { (short(&row.label, 80)) }
                        @for (index, score) in row.scores.iter().enumerate() {
                            td.edge[is_edge(sheet, index)] {
                                (cell(score.as_ref(), sheet.is_best(row, index)))
                            }
                        }
                        td.edge { (Sheet::seeds(row)) }
                        @match row.weights {
                            Some((method, head)) => {
                                td { (short_number(method)) }
                                td { (short_number(head)) }
                            }
                            None => { td { "–" } td { "–" } }
                        }
                    }
                }
            }
        }
    }
}

fn cell(score: Option<&Spread>, best: bool) -> Markup {
    html! {
        @match score {
            None => "–",
            Some(score) => {
                @let mean = format!("{:.2}", score.mean);
                @if best { strong { (mean) } } @else { (mean) }
                @if let Some(deviation) = score.deviation {
                    small { "±" (format!("{deviation:.2}")) }
                }
            }
        }
    }
}

/// Returns the table of all runs with their settings and results.
pub(super) fn runs(runs: &[FoundRun]) -> Markup {
    const HEADS: [&str; 13] = [
        "run",
        "task",
        "method",
        "seed",
        "learning rate",
        "epochs",
        "weights of",
        "normalization",
        "test top-1, %",
        "weights, method",
        "weights, head",
        "seconds",
        "backbone",
    ];
    // Columns of words, which start at the left.
    const TEXT: [usize; 6] = [0, 1, 2, 6, 7, 12];
    html! {
        div.scroll tabindex="0" role="region" aria-label="runs" {
            table {
                thead { tr {
                    @for (index, head) in HEADS.iter().enumerate() {
                        th.text[TEXT.contains(&index)] scope="col" { (head) }
                    }
                } }
                tbody { @for run in runs { (run_row(run)) } }
            }
        }
    }
}

fn run_row(run: &FoundRun) -> Markup {
    let record = &run.record;
    let ended = match record.fit.selected_epoch {
        Some(epoch) if !record.fit.stopped => {
            format!("{} ({})", selection(record.train.selection), epoch.saturating_add(1))
        }
        _ => "ended before".to_owned(),
    };
    let digest: String = record.backbone_digest.chars().take(8).collect();
    let params = record.trainable_params;
    html! {
        tr {
            th.row scope="row" { (short(&run.name.display().to_string(), 80)) }
            td.text { (short(&record.task, 60)) }
            td.text { (short(&methods::label(&record.model.method), 80)) }
            td { (record.train.seed) }
            td { (format!("{:e}", record.train.schedule.lr)) }
            td { (record.fit.epochs.len()) " of " (record.train.epochs) }
            td.text { (ended) }
            td.text { (record.train.normalization) }
            td { @match record.test_top1 { Some(top1) => (format!("{top1:.2}")), None => "–" } }
            td { (params.method) }
            td { (params.head) }
            td { (format!("{:.1}", record.fit.seconds)) }
            td.text { (short(&digest, 8)) }
        }
    }
}
