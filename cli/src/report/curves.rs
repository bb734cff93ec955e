//! Learning curves of a run.

use plotters::coord::Shift;
use plotters::coord::types::{RangedCoordf64, RangedCoordi32};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::palette::{ACCENT, GRID, INK, PALE, SECOND, text};
use crate::error::{Error, Result};
use convpass::train::EpochReport;

// Sizes in pixels, as of the bars.
const SIZE: (u32, u32) = (480, 280);
const TEXT: f64 = 17.0;
/// Points of a curve; of more epochs each so many-th is drawn, and the last.
const POINTS: usize = 120;

/// What a curve is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quantity {
    Loss,
    Accuracy,
}

struct Curve {
    label: &'static str,
    color: RGBColor,
    /// Epoch, from 1, and value, which may be no number.
    points: Vec<(i32, f64)>,
}

impl Curve {
    fn of(
        epochs: &[EpochReport],
        label: &'static str,
        color: RGBColor,
        value: impl Fn(&EpochReport) -> Option<f64>,
    ) -> Option<Curve> {
        let step = epochs.len().div_ceil(POINTS).max(1);
        let kept = epochs
            .iter()
            .enumerate()
            .filter(|(index, _)| index % step == 0 || index + 1 == epochs.len());
        let point = |(_, epoch): (usize, &EpochReport)| {
            Some((i32::try_from(epoch.epoch).ok()?.saturating_add(1), value(epoch)?))
        };
        let points: Vec<_> = kept.filter_map(point).collect();
        (!points.is_empty()).then_some(Curve { label, color, points })
    }

    fn finite(&self) -> impl DoubleEndedIterator<Item = (i32, f64)> {
        self.points.iter().copied().filter(|(_, value)| is_drawable(*value))
    }

    /// Returns the runs of consecutive numbers, so that gaps are not drawn over.
    fn stretches(&self) -> Vec<Vec<(i32, f64)>> {
        let parts = self.points.split(|(_, value)| !is_drawable(*value));
        parts.filter(|part| !part.is_empty()).map(<[_]>::to_vec).collect()
    }
}

/// Larger ones leave an axis without room for the others.
fn is_drawable(value: f64) -> bool {
    value.abs() < 1e12
}

/// The curves of a run as an SVG document, 480 x 280; `None` if there is no number to draw.
///
/// # Errors
/// [`Error::Chart`] if it cannot be drawn.
pub(super) fn svg(epochs: &[EpochReport], quantity: Quantity) -> Result<Option<String>> {
    let curves = match quantity {
        Quantity::Loss => [Curve::of(epochs, "train", ACCENT, |epoch| Some(epoch.loss)), None],
        Quantity::Accuracy => [
            Curve::of(epochs, "train", ACCENT, |epoch| Some(epoch.accuracy)),
            Curve::of(epochs, "val", SECOND, |epoch| epoch.val_top1),
        ],
    };
    let curves: Vec<Curve> = curves.into_iter().flatten().collect();
    if curves.iter().all(|curve| curve.finite().next().is_none()) {
        return Ok(None);
    }
    let mut svg = String::new();
    draw(&curves, quantity, &mut svg).map_err(|e| Error::Chart { reason: e.to_string() })?;
    Ok(Some(svg))
}

/// Returns the range of the values, with a margin.
fn range(curves: &[Curve], quantity: Quantity) -> (f64, f64) {
    let values = || curves.iter().flat_map(Curve::finite).map(|(_, value)| value);
    let low = values().fold(f64::INFINITY, f64::min);
    let high = values().fold(f64::NEG_INFINITY, f64::max);
    let room = ((high - low) * 0.06).max(high.abs() * 0.02).max(1e-6);
    match quantity {
        Quantity::Loss => ((low - room).max(0.0).min(low), high + room),
        Quantity::Accuracy => ((low - room).max(0.0), (high + room).min(100.0 + room)),
    }
}

type DrawError = Box<dyn std::error::Error>;
type PlotArea<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Axes<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordi32, RangedCoordf64>>;

fn draw(curves: &[Curve], quantity: Quantity, svg: &mut String) -> Result<(), DrawError> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let unit = match quantity {
        Quantity::Loss => "loss (cross entropy)",
        Quantity::Accuracy => "accuracy, %",
    };
    root.draw(&Text::new(unit, (8, 8), text(TEXT, &PALE, HPos::Left, VPos::Top)))?;
    let mut axes = draw_axes(&root, curves, quantity)?;
    for curve in curves {
        draw_curve(&mut axes, curve)?;
    }
    draw_labels(&root, &axes, curves)?;
    if curves.iter().any(|curve| curve.finite().count() < curve.points.len()) {
        let style = text(TEXT - 1.0, &INK, HPos::Right, VPos::Top);
        root.draw(&Text::new("not a number in part", (SIZE.0 as i32 - 8, 8), style))?;
    }
    root.present()?;
    Ok(())
}

/// Draws the axes of epochs and values.
fn draw_axes<'a, 'b>(
    root: &'a PlotArea<'b>,
    curves: &[Curve],
    quantity: Quantity,
) -> Result<Axes<'a, 'b>, DrawError> {
    let epochs = || curves.iter().flat_map(|curve| curve.points.iter().map(|(epoch, _)| *epoch));
    let first = epochs().min().unwrap_or(1);
    let last = epochs().max().unwrap_or(1).max(first.saturating_add(1));
    let (low, high) = range(curves, quantity);
    let mut axes = ChartBuilder::on(root)
        .margin_top(36)
        .margin_right(58)
        .margin_bottom(6)
        .x_label_area_size(44)
        .y_label_area_size(58)
        .build_cartesian_2d(first..last, low..high)?;
    axes.configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(PALE)
        .label_style(text(TEXT - 2.0, &PALE, HPos::Center, VPos::Center))
        .x_labels(6)
        .y_labels(5)
        .y_label_formatter(&|value| number(*value, high - low))
        .x_desc("epoch")
        .axis_desc_style(text(TEXT - 2.0, &PALE, HPos::Center, VPos::Center))
        .draw()?;
    Ok(axes)
}

/// Draws each stretch of a curve as a line, or as a dot if it is one epoch.
fn draw_curve(axes: &mut Axes, curve: &Curve) -> Result<(), DrawError> {
    for stretch in curve.stretches() {
        match stretch[..] {
            [point] => {
                axes.draw_series([Circle::new(point, 4, curve.color.filled())])?;
            }
            _ => {
                axes.draw_series(LineSeries::new(stretch, curve.color.stroke_width(2)))?;
            }
        }
    }
    Ok(())
}

/// Names each curve at its end; labels of close ends are moved apart.
fn draw_labels(root: &PlotArea, axes: &Axes, curves: &[Curve]) -> Result<(), DrawError> {
    let end = |curve| Some((axes.backend_coord(&Curve::finite(curve).next_back()?), curve));
    let mut ends: Vec<((i32, i32), &Curve)> = curves.iter().filter_map(end).collect();
    ends.sort_by_key(|((_, y), _)| *y);
    let mut free = 0;
    for ((x, y), curve) in ends {
        let y = y.max(free);
        free = y + 20;
        let style = text(TEXT - 1.0, &curve.color, HPos::Left, VPos::Center);
        root.draw(&Text::new(curve.label, (x + 8, y), style))?;
    }
    Ok(())
}

/// With as many decimals as it takes to tell the ticks apart.
fn number(value: f64, spread: f64) -> String {
    match spread {
        s if s >= 8.0 => format!("{value:.0}"),
        s if s >= 0.8 => format!("{value:.1}"),
        s if s >= 0.08 => format!("{value:.2}"),
        s if s >= 0.008 => format!("{value:.3}"),
        _ => format!("{value:.1e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::record;
    use super::*;

    fn epochs(losses: &[f64]) -> Vec<EpochReport> {
        let first = record("a", "vpt", 0, 1.0).fit.epochs[0];
        let epoch = |(epoch, &loss)| EpochReport { epoch, loss, ..first };
        losses.iter().enumerate().map(epoch).collect()
    }

    fn points(svg: &str) -> usize {
        let lines = svg.split("<polyline").skip(1).filter(|line| line.contains("#005AA0"));
        lines
            .map(|line| line.split("points=\"").nth(1).unwrap().split('"').next().unwrap())
            .map(|points| points.split_whitespace().count())
            .sum()
    }

    #[test]
    fn a_curve_has_a_point_an_epoch_up_to_a_bound() {
        let svg_of = |losses: &[f64]| svg(&epochs(losses), Quantity::Loss).unwrap().unwrap();
        assert_eq!(points(&svg_of(&[3.0, 2.0, 1.5])), 3);
        let many: Vec<f64> = (0..5_000).map(|i| 1.0 / (1.0 + f64::from(i))).collect();
        assert!(points(&svg_of(&many)) <= POINTS + 1);
    }

    #[test]
    fn one_epoch_is_a_dot_and_what_is_no_number_a_gap() {
        let svg_of = |losses: &[f64]| svg(&epochs(losses), Quantity::Loss).unwrap();
        let one = svg_of(&[2.0]).unwrap();
        assert!(one.contains("<circle") && !one.contains("NaN"));
        let gap = svg_of(&[3.0, 2.0, f64::NAN, 1.0, 0.5, f64::INFINITY]).unwrap();
        assert!(gap.contains("not a number in part") && !gap.contains("NaN"), "{gap}");
        assert_eq!(points(&gap), 4);
        assert_eq!(svg_of(&[f64::NAN, f64::NAN]), None);
        assert_eq!(svg_of(&[]), None);
        assert!(svg_of(&[1.0, 1.0]).is_some());
        assert!(svg_of(&[1e300, -1e11, 1e11, 0.0]).is_some());
    }

    #[test]
    fn validation_is_a_second_curve() {
        let mut epochs = epochs(&[3.0, 2.0]);
        let without = svg(&epochs, Quantity::Accuracy).unwrap().unwrap();
        epochs.iter_mut().for_each(|epoch| epoch.val_top1 = Some(41.0));
        let with = svg(&epochs, Quantity::Accuracy).unwrap().unwrap();
        assert!(with.contains(">\nval\n<") && !without.contains("val"), "{with}");
    }
}
