//! The chart of accuracies as bars from 0 to 100 %, each with its label and its number.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::palette::{ACCENT, GRID, INK, PALE, fitting, text, width};
use super::sheet::{Column, Origin, Sheet, SheetRow, percent};
use crate::error::{Error, Result};

/// The bars of one column of a table, with the best one first.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct BarChart {
    pub(super) title: String,
    pub(super) bars: Vec<Bar>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bar {
    pub(super) label: String,
    /// The accuracy in percent.
    pub(super) value: f64,
    pub(super) deviation: Option<f64>,
    /// The text behind the bar.
    pub(super) number: String,
    /// Whether the bar is filled. Own results are filled; published results are outlines.
    pub(super) filled: bool,
}

// Sizes in pixels. Text of 17 in a picture 480 wide is still 13 at a phone's 360.
const WIDTH: u32 = 480;
const TEXT: f64 = 17.0;
const ROW: i32 = 28;
const TOP: i32 = 44;
const MARGIN: i32 = 8;
/// The largest width of a label in pixels, and the largest number of bars.
const LABEL: f64 = 230.0;
const MOST: usize = 48;

impl BarChart {
    /// Returns a chart for each group and average of the table, or for each task if it has no
    /// groups.
    pub(super) fn of(sheet: &Sheet) -> Vec<BarChart> {
        let averages = sheet.columns.iter().any(|column| matches!(column, Column::Group(_)));
        let wanted = |column: &Column| !(averages && column.is_task()) && *column != Column::A;
        let columns = sheet.columns.iter().enumerate().filter(|(_, column)| wanted(column));
        columns.map(|(index, column)| BarChart::column(sheet, index, column)).collect()
    }

    fn column(sheet: &Sheet, index: usize, column: &Column) -> BarChart {
        let bar = |row: &SheetRow| {
            let score = row.scores.get(index).copied().flatten()?;
            Some(Bar {
                label: row.label.clone(),
                value: score.mean,
                deviation: score.deviation,
                number: percent(&score),
                filled: row.source == Origin::Own,
            })
        };
        // The re-tuned rows are left out, because they would be most of the bars.
        let rows = sheet.rows.iter().filter(|row| row.source != Origin::Retuned);
        let mut bars: Vec<Bar> = rows.filter_map(bar).collect();
        bars.sort_by(|a, b| b.value.total_cmp(&a.value));
        let title = match column {
            Column::G => "G, mean of the three groups".to_owned(),
            column => column.name(),
        };
        BarChart { title, bars }
    }

    /// Returns the chart as an SVG document of width 480.
    ///
    /// # Errors
    /// [`Error::Chart`] if the chart cannot be drawn.
    pub(super) fn svg(&self) -> Result<String> {
        let mut svg = String::new();
        self.draw(&mut svg).map_err(|e| Error::Chart { reason: e.to_string() })?;
        Ok(svg)
    }

    fn draw(&self, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
        let bars = &self.bars[..self.bars.len().min(MOST)];
        let height = TOP + ROW * bars.len() as i32 + 34;
        let root = SVGBackend::with_string(svg, (WIDTH, height as u32)).into_drawing_area();
        root.fill(&WHITE)?;
        let style = text(TEXT, &INK, HPos::Left, VPos::Top);
        let unit = ", top-1 in %";
        let room = f64::from(WIDTH) - 2.0 * f64::from(MARGIN) - width(unit, TEXT);
        let title = fitting(&self.title, TEXT, room) + unit;
        root.draw(&Text::new(title, (MARGIN, 10), style))?;
        let widest = |texts: &mut dyn Iterator<Item = String>| {
            texts.map(|text| width(&text, TEXT)).fold(0.0, f64::max) as i32
        };
        let left =
            MARGIN + widest(&mut bars.iter().map(|bar| fitting(&bar.label, TEXT, LABEL))) + 8;
        let right =
            WIDTH as i32 - MARGIN - widest(&mut bars.iter().map(|bar| bar.number.clone())) - 8;
        let x =
            |value: f64| left + (value.clamp(0.0, 100.0) / 100.0 * f64::from(right - left)) as i32;
        let bottom = TOP + ROW * bars.len() as i32;
        for tick in [0.0, 50.0, 100.0] {
            let line = vec![(x(tick), TOP - 2), (x(tick), bottom + 2)];
            root.draw(&PathElement::new(line, GRID))?;
            let style = text(TEXT - 3.0, &PALE, HPos::Center, VPos::Top);
            root.draw(&Text::new(format!("{tick:.0}"), (x(tick), bottom + 6), style))?;
        }
        for (bar, top) in bars.iter().zip((TOP..).step_by(ROW as usize)) {
            draw_bar(&root, bar, top, left, &x)?;
        }
        root.present()?;
        Ok(())
    }
}

fn draw_bar<DB: DrawingBackend>(
    root: &DrawingArea<DB, Shift>,
    bar: &Bar,
    top: i32,
    left: i32,
    x: &dyn Fn(f64) -> i32,
) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
    let (middle, end) = (top + ROW / 2, x(bar.value));
    let label = text(TEXT, &INK, HPos::Right, VPos::Center);
    root.draw(&Text::new(fitting(&bar.label, TEXT, LABEL), (left - 6, middle), label))?;
    let corners = [(left, top + 5), (end, top + ROW - 5)];
    if bar.filled {
        root.draw(&Rectangle::new(corners, ACCENT.filled()))?
    } else {
        root.draw(&Rectangle::new(corners, PALE.stroke_width(1)))?
    }
    let mut number = end + 6;
    if let Some(deviation) = bar.deviation {
        let (low, high) = (x(bar.value - deviation), x(bar.value + deviation));
        root.draw(&PathElement::new(vec![(low, middle), (high, middle)], INK.stroke_width(2)))?;
        number = number.max(high + 6);
    }
    let style = text(TEXT, &INK, HPos::Left, VPos::Center);
    root.draw(&Text::new(bar.number.clone(), (number, middle), style))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(label: &str, value: f64) -> Bar {
        let number = format!("{value:.2}");
        Bar { label: label.to_owned(), value, deviation: Some(3.0), number, filled: true }
    }

    #[test]
    fn every_bar_has_its_label_and_its_number() {
        let bars = vec![bar("<b>", 0.0), bar(&"long ".repeat(20), 50.0), bar("c", 100.0)];
        let svg = BarChart { title: "a & b".to_owned(), bars }.svg().unwrap();
        for text in ["&lt;b&gt;", "0.00", "50.00", "100.00", "a &amp; b", "…"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(!svg.contains("<b>"));
        assert!(BarChart { title: String::new(), bars: Vec::new() }.svg().is_ok());
    }
}
