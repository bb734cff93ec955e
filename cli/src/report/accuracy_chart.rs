//! The chart of accuracy over trainable parameters, with one mark for each method.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::labels::{Placed, Rect, place};
use super::palette::{ACCENT, EM, FAMILY, GRID, INK, PALE, short_number, text};
use crate::error::{Error, Result};

/// One method in an [`AccuracyChart`].
#[derive(Clone, Debug, PartialEq)]
pub struct AccuracyPoint {
    /// The name of the method, which is written beside its mark.
    pub label: String,
    /// Number of trained weights, at least 1, because the axis is logarithmic.
    pub params: f64,
    /// Top-1 accuracy in percent.
    pub top1: f64,
    /// Whether the mark is emphasized: filled and in colour, with a bold label.
    pub highlight: bool,
}

/// A scatter chart of top-1 accuracy over trained weights (logarithmic). Each mark has its label
/// beside it, so that the chart needs no legend and no colours.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AccuracyChart {
    /// The title.
    pub title: String,
    /// From 1 to 64 methods.
    pub points: Vec<AccuracyPoint>,
}

// Sizes in pixels. Text of 19 in a picture 640 wide is still 11 at a phone's 360.
const SIZE: (u32, u32) = (640, 480);
const TEXT: f64 = 19.0;
const TITLE: f64 = 21.0;
const RADIUS: i32 = 7;
const MARGIN: i32 = 16;

/// Column and row of a pixel.
type Pixel = (i32, i32);

impl AccuracyChart {
    /// Returns the chart as an SVG document of 640 x 480 with the sans-serif font of the reader.
    ///
    /// # Errors
    /// [`Error::Config`] with the first point that is outside the axes;
    /// [`Error::Chart`] if the chart cannot be drawn.
    pub fn svg(&self) -> Result<String> {
        self.validate()?;
        let mut svg = String::new();
        self.draw(&mut svg).map_err(|e| Error::Chart { reason: e.to_string() })?;
        Ok(svg)
    }

    fn validate(&self) -> Result<()> {
        let count = self.points.len();
        if !(1..=64).contains(&count) {
            return Err(Error::config("points", "from 1 to 64 methods", count));
        }
        check_text("title", &self.title)?;
        for (index, point) in self.points.iter().enumerate() {
            let field = |name| format!("points[{index}].{name}");
            check_text(&field("label"), &point.label)?;
            if !(1.0..=1e15).contains(&point.params) {
                return Err(Error::config(field("params"), "within 1..=1e15", point.params));
            }
            if !(0.0..=100.0).contains(&point.top1) {
                return Err(Error::config(field("top1"), "within 0..=100", point.top1));
            }
        }
        Ok(())
    }

    /// Returns the ranges of the axes, with a free margin on each side.
    fn ranges(&self) -> ([f64; 2], [f64; 2]) {
        let spread = |value: fn(&AccuracyPoint) -> f64, least: f64, share: f64| {
            let values = self.points.iter().map(value);
            let low = values.clone().fold(f64::INFINITY, f64::min);
            let high = values.fold(f64::NEG_INFINITY, f64::max);
            let free = ((high - low) * share).max(least);
            [low - free, high + free]
        };
        let x = spread(|point| point.params.log10(), 0.2, 0.12).map(|log| 10f64.powf(log));
        (x, spread(|point| point.top1, 1.0, 0.12))
    }

    fn draw(&self, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let title = (FAMILY, TITLE * EM, FontStyle::Bold).into_font().color(&INK);
        root.draw(&Text::new(self.title.clone(), (MARGIN, 12), title))?;
        let unit = text(TEXT, &PALE, HPos::Left, VPos::Top);
        root.draw(&Text::new("top-1 accuracy, %", (MARGIN, 46), unit))?;
        let (marks, frame) = self.draw_axes(&root)?;
        let labels = self.labels(&marks, &frame);
        for ((point, &mark), label) in self.points.iter().zip(&marks).zip(labels) {
            draw_point(&root, point, mark, &label)?;
        }
        root.present()?;
        Ok(())
    }

    /// Draws the axes. Returns the pixel of each point and the area for labels.
    fn draw_axes<DB: DrawingBackend>(
        &self,
        root: &DrawingArea<DB, Shift>,
    ) -> Result<(Vec<Pixel>, Rect), DrawingAreaErrorKind<DB::ErrorType>> {
        let ([left, right], [low, high]) = self.ranges();
        let weights = (left..right).log_scale().with_key_points(ticks(left, right));
        let mut axes = ChartBuilder::on(root)
            .margin(MARGIN)
            .margin_top(80)
            .margin_right(28)
            .x_label_area_size(66)
            .y_label_area_size(48)
            .build_cartesian_2d(weights, low..high)?;
        axes.configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(PALE)
            .label_style(text(TEXT, &PALE, HPos::Center, VPos::Center))
            .x_labels(6)
            .y_labels(6)
            .x_label_formatter(&|params| short_number(*params))
            .y_label_formatter(&|top1| percent(*top1, high - low))
            .x_desc("trained weights (logarithmic)")
            .axis_desc_style(text(TEXT, &PALE, HPos::Center, VPos::Center))
            .draw()?;
        let pixel = |point: &AccuracyPoint| axes.backend_coord(&(point.params, point.top1));
        let marks = self.points.iter().map(pixel).collect();
        let (x, y) = axes.plotting_area().get_pixel_range();
        let frame = Rect {
            left: f64::from(x.start) + 2.0,
            top: f64::from(y.start) - 20.0,
            right: f64::from(SIZE.0) - 4.0,
            bottom: f64::from(y.end) - 2.0,
        };
        Ok((marks, frame))
    }

    fn labels(&self, marks: &[Pixel], frame: &Rect) -> Vec<Placed> {
        let marks: Vec<_> = marks.iter().map(|&(x, y)| (f64::from(x), f64::from(y))).collect();
        let sizes: Vec<_> = self.points.iter().map(label_size).collect();
        place(&marks, &sizes, f64::from(RADIUS), frame)
    }
}

fn draw_point<DB: DrawingBackend>(
    root: &DrawingArea<DB, Shift>,
    point: &AccuracyPoint,
    mark: Pixel,
    label: &Placed,
) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
    let (color, font) = if point.highlight {
        (ACCENT, (FAMILY, TEXT * EM, FontStyle::Bold).into_font())
    } else {
        (INK, (FAMILY, TEXT * EM).into_font())
    };
    let rect = &label.rect;
    let end = rect.nearest((f64::from(mark.0), f64::from(mark.1)));
    if label.apart {
        root.draw(&PathElement::new(vec![mark, pixels(end)], PALE))?;
    }
    if point.highlight {
        root.draw(&Circle::new(mark, RADIUS, color.filled()))?;
    } else {
        root.draw(&Circle::new(mark, RADIUS - 1, WHITE.filled()))?;
        root.draw(&Circle::new(mark, RADIUS - 1, color.stroke_width(2)))?;
    }
    // The text starts, or ends, where the label is nearest to its mark, however wide the font.
    let (x, from) = if end.0 == rect.left {
        (rect.left, HPos::Left)
    } else if end.0 == rect.right {
        (rect.right, HPos::Right)
    } else {
        ((rect.left + rect.right) / 2.0, HPos::Center)
    };
    let style = font.color(&color).pos(Pos::new(from, VPos::Center));
    let at = pixels((x, (rect.top + rect.bottom) / 2.0));
    root.draw(&Text::new(point.label.clone(), at, style))
}

fn pixels((x, y): (f64, f64)) -> (i32, i32) {
    (x.round() as i32, y.round() as i32)
}

/// Returns 1, 2 and 5 times the powers of ten within the range, or only the powers if that would be
/// too many.
fn ticks(left: f64, right: f64) -> Vec<f64> {
    let powers = || (0..=16).map(|exponent| 10f64.powi(exponent));
    let inside = |tick: &f64| (left..=right).contains(tick);
    let fine = powers().flat_map(|power| [1.0, 2.0, 5.0].map(|step| step * power));
    let fine: Vec<f64> = fine.filter(inside).collect();
    if fine.len() <= 8 { fine } else { powers().filter(inside).collect() }
}

/// Returns the width and height of a label. The width is an upper estimate, because the font of the
/// reader is unknown.
fn label_size(point: &AccuracyPoint) -> (f64, f64) {
    let width = if point.highlight { 0.66 } else { 0.58 };
    (point.label.chars().count() as f64 * width * TEXT, TEXT * EM)
}

fn check_text(field: &str, text: &str) -> Result<()> {
    if text.chars().count() > 64 || text.chars().any(char::is_control) {
        Err(Error::config(field, "at most 64 printable characters", format!("{text:?}")))
    } else {
        Ok(())
    }
}

/// Formats a percentage, with one decimal if whole numbers would occur twice on the axis.
fn percent(top1: f64, spread: f64) -> String {
    if spread < 5.0 { format!("{top1:.1}") } else { format!("{top1:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart() -> AccuracyChart {
        let points = [
            ("Linear probe", 1_548.0, 50.9),
            ("VPT-deep", 4_700.0, 51.3),
            ("BitFit", 8_000.0, 53.0),
            ("Adapter & <co>", 11_900.0, 53.2),
            ("AdaptFormer", 11_900.0, 53.4),
            ("LoRA", 22_000.0, 53.3),
            ("Convpass", 29_200.0, 55.1),
        ];
        let point = |(label, params, top1): (&str, f64, f64)| AccuracyPoint {
            label: label.to_owned(),
            params,
            top1,
            highlight: label == "Convpass",
        };
        AccuracyChart { title: "Accuracy".to_owned(), points: points.map(point).to_vec() }
    }

    #[test]
    fn every_method_is_in_the_picture_and_text_is_escaped() {
        let svg = chart().svg().unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("Adapter &amp; &lt;co&gt;"), "{svg}");
        for point in chart().points.iter().filter(|point| !point.label.contains('&')) {
            assert_eq!(svg.matches(&point.label).count(), 1, "{}", point.label);
        }
    }

    #[test]
    fn extremes_are_drawn() {
        for (params, top1) in [(1.0, 0.0), (1e15, 100.0)] {
            let mut chart = chart();
            chart.points.truncate(1);
            assert!(chart.svg().is_ok());
            chart.points[0] = AccuracyPoint { params, top1, ..chart.points[0].clone() };
            assert!(chart.svg().is_ok());
        }
        let points = chart().points.into_iter().cycle().take(64).collect();
        assert!(AccuracyChart { points, ..chart() }.svg().is_ok());
    }

    #[test]
    fn points_without_a_place_are_told() {
        let refused = |change: fn(&mut AccuracyChart)| {
            let mut chart = chart();
            change(&mut chart);
            let error = chart.svg().unwrap_err();
            assert!(matches!(error, Error::Config { .. }), "{error}");
            error.to_string()
        };
        assert!(refused(|chart| chart.points.clear()).contains("points"));
        assert!(refused(|chart| chart.points[2].params = 0.0).contains("points[2].params"));
        refused(|chart| chart.points[0].params = f64::NAN);
        refused(|chart| chart.points[0].top1 = f64::INFINITY);
        refused(|chart| chart.points[0].label = "\u{0}".to_owned());
        refused(|chart| chart.title = "x".repeat(65));
    }
}
