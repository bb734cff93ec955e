//! How a training step grows with batch, image size, bottleneck and placement: a table and a chart.
//!
//! ```text
//! $ cargo run --release --example scaling -- --out runs/scaling
//! runs/scaling/scaling.md, runs/scaling/scaling.svg
//! ```
//!
//! Each cell is a process of its own, so that its peak memory is its own. What was run is kept as lines of JSON in
//! `scaling.jsonl`; the same command goes on after a stop, and only draws where nothing is left to run.

mod cell;
mod work;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use plotters::prelude::*;
use serde_json::{Value, json};

/// Times training steps of growing size.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    /// Folder of scaling.jsonl, scaling.md and scaling.svg.
    #[arg(long, default_value = "runs/scaling")]
    out: PathBuf,
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// libtorch's threads [default: all cores].
    #[arg(long)]
    threads: Option<i32>,
    #[arg(long, default_value = "vit_base_patch16_224")]
    backbone_preset: String,
}

#[derive(Subcommand)]
enum Part {
    /// Time one cell and print a line of JSON.
    Cell(cell::Cell),
}

/// A row of cells in which one thing grows.
struct Series {
    title: &'static str,
    /// What grows, as the chart's horizontal axis names it.
    axis: &'static str,
    flag: &'static str,
    values: &'static [i64],
    fixed: &'static [&'static str],
}

const FLAT: &[&str] = &["--drop-path", "0"];
const SERIES: [Series; 7] = [
    Series {
        title: "batch",
        axis: "images a step",
        flag: "--batch",
        values: &[1, 2, 4, 8, 16, 32],
        fixed: &[],
    },
    Series {
        title: "batch, recomputed",
        axis: "images a step",
        flag: "--batch",
        values: &[8, 32],
        fixed: &["--recompute"],
    },
    Series {
        title: "image size",
        axis: "pixels a side, batch 4",
        flag: "--image-size",
        values: &[224, 384, 512],
        fixed: &["--batch", "4"],
    },
    Series {
        title: "image size, recomputed",
        axis: "pixels a side, batch 4",
        flag: "--image-size",
        values: &[224, 384, 512],
        fixed: &["--batch", "4", "--recompute"],
    },
    Series {
        title: "bottleneck",
        axis: "h, batch 8",
        flag: "--bottleneck-dim",
        values: &[4, 8, 16, 32, 64],
        fixed: &[],
    },
    Series {
        title: "last blocks",
        axis: "blocks with bypasses, batch 8",
        flag: "--last-blocks",
        values: &[1, 3, 6, 12],
        fixed: FLAT,
    },
    Series {
        title: "last blocks, prefix kept",
        axis: "blocks with bypasses, batch 8",
        flag: "--last-blocks",
        values: &[1, 3, 6, 12],
        fixed: &["--prefix"],
    },
];

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(Part::Cell(cell)) = &args.part {
        println!("{}", cell::measure(cell)?);
        return Ok(());
    }
    ensure!(args.rounds > 0, "--rounds must be at least 1");
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let file = args.out.join("scaling.jsonl");
    let mut cells: BTreeMap<String, Value> = BTreeMap::new();
    for line in fs::read_to_string(&file).unwrap_or_default().lines() {
        // A line that a stop cut off is a cell that is run again.
        if let Ok(cell) = serde_json::from_str::<Value>(line) {
            cells.insert(cell["cell"].to_string(), cell);
        }
    }
    let mut kept = OpenOptions::new().create(true).append(true).open(&file)?;
    for series in &SERIES {
        for &value in series.values {
            let flags = series.flags(&args, value);
            let cell = json!(flags);
            if cells.contains_key(&cell.to_string()) {
                continue;
            }
            let mut line = run(&flags)?;
            line["cell"] = cell.clone();
            writeln!(kept, "{line}")?;
            println!("{}: {value}: {:.3} s", series.title, number(&line, "median_s"));
            cells.insert(cell.to_string(), line);
        }
    }
    let cell = |series: &Series, value| &cells[&json!(series.flags(&args, value)).to_string()];
    let (table, chart) = (args.out.join("scaling.md"), args.out.join("scaling.svg"));
    fs::write(&table, markdown(&cell))?;
    draw(&cell, &chart).with_context(|| chart.display().to_string())?;
    println!("{}, {}", table.display(), chart.display());
    Ok(())
}

impl Series {
    fn flags(&self, args: &Args, value: i64) -> Vec<String> {
        let mut flags: Vec<String> =
            ["--backbone-preset", &args.backbone_preset, "--rounds"].map(str::to_owned).into();
        flags.push(args.rounds.to_string());
        flags.extend(args.threads.iter().flat_map(|n| ["--threads".to_owned(), n.to_string()]));
        flags.extend(self.fixed.iter().map(|&flag| flag.to_owned()));
        flags.extend([self.flag.to_owned(), value.to_string()]);
        flags
    }
}

/// The line that this program prints for one cell.
fn run(flags: &[String]) -> Result<Value> {
    let output = Command::new(std::env::current_exe()?).arg("cell").args(flags).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "cell {}: {said}", flags.join(" "));
    serde_json::from_str(&text).with_context(|| text.clone())
}

fn number(cell: &Value, key: &str) -> f64 {
    cell[key].as_f64().unwrap_or(f64::NAN)
}

type Cell<'a> = dyn Fn(&Series, i64) -> &'a Value + 'a;

fn markdown(cell: &Cell) -> String {
    let mut text = String::from(
        "| what grows | | s a step | ms an image | GFLOP an image | GEMM speed, GFLOP/s | share of it | peak MB |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for series in &SERIES {
        for &value in series.values {
            let cell = cell(series, value);
            let (seconds, batch) = (number(cell, "median_s"), number(cell, "batch"));
            let _ = writeln!(
                text,
                "| {} | {value} | {seconds:.3} | {:.0} | {:.1} | {:.0} | {:.0} % | {:.0} |",
                series.title,
                1e3 * seconds / batch,
                number(cell, "gflop") / batch,
                number(cell, "gemm_gflop_per_s"),
                100.0 * number(cell, "gemm_share"),
                number(cell, "peak_rss_mb"),
            );
        }
    }
    text
}

/// Series with one axis share a panel.
fn draw(cell: &Cell, file: &std::path::Path) -> Result<()> {
    let root = SVGBackend::new(file, (1000, 640)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut panels: Vec<Vec<&Series>> = Vec::new();
    for series in &SERIES {
        match panels.iter_mut().find(|panel| panel[0].axis == series.axis) {
            Some(panel) => panel.push(series),
            None => panels.push(vec![series]),
        }
    }
    for (area, panel) in root.split_evenly((2, 2)).iter().zip(&panels) {
        // What grows doubles or so from one to the next: at equal distances.
        let values = panel.iter().map(|series| series.values).max_by_key(|values| values.len());
        let values = values.unwrap_or_default();
        let points = |series: &Series| -> Vec<(f64, f64)> {
            let per_image = |cell: &Value| 1e3 * number(cell, "median_s") / number(cell, "batch");
            let place = |value| values.iter().position(|&other| other == value).unwrap_or_default();
            let point = |&value: &i64| (place(value) as f64, per_image(cell(series, value)));
            series.values.iter().map(point).collect()
        };
        let heights = panel.iter().flat_map(|series| points(series)).map(|point| point.1);
        let top = heights.fold(0.0, f64::max);
        let width = values.len() as f64 - 1.0;
        let mut chart = ChartBuilder::on(area)
            .margin(14)
            .x_label_area_size(40)
            .y_label_area_size(56)
            .build_cartesian_2d(-0.2..width + 0.2, 0.0..top * 1.4)?;
        let name = |x: &f64| {
            let value = values.get(*x as usize).filter(|_| (x.round() - x).abs() < 1e-9);
            value.map_or(String::new(), i64::to_string)
        };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .x_labels(2 * values.len())
            .x_desc(panel[0].axis)
            .y_desc("ms an image")
            .y_labels(6)
            .x_label_formatter(&name)
            .y_label_formatter(&|y| format!("{y:.0}"))
            .label_style(("sans-serif", 14))
            .draw()?;
        for (index, series) in panel.iter().enumerate() {
            let color = [RGBColor(31, 95, 153), RGBColor(200, 80, 30)][index % 2];
            chart
                .draw_series(LineSeries::new(points(series), color.stroke_width(2)).point_size(4))?
                .label(series.title)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .label_font(("sans-serif", 14))
            .draw()?;
    }
    root.present()?;
    Ok(())
}
