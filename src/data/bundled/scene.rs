//! Renders the images of the synthetic tasks. Task, label, index and seed determine an image.

use std::f32::consts::{PI, TAU};

use ndarray::Array3;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tiny_skia::{Color, FillRule, Paint, Path, PathBuilder, Pixmap, Transform};

use super::BundledTask;
use crate::error::{Error, Result};

/// The number of rows and of columns of the grid in the location task.
const GRID: i64 = 4;
/// The number of directions in the orientation task.
const DIRECTIONS: i64 = 16;

/// Returns `count` labels in random order. The numbers of labels of two classes differ by at most
/// 1.
pub(super) fn labels(task: BundledTask, count: usize, seed: i64) -> Vec<i64> {
    let mut labels: Vec<i64> = (0..count as i64).map(|i| i % task.num_classes()).collect();
    labels.shuffle(&mut stream(task, seed, 0));
    labels
}

/// Renders image `index` of a task, `[side, side, 3]` RGB u8.
///
/// Everything that the label does not determine (form, colour, size, position, background) is
/// random. It depends on the seed and the index, not on the images rendered before.
pub(super) fn draw(
    task: BundledTask,
    label: i64,
    index: usize,
    side: u32,
    seed: i64,
) -> Result<Array3<u8>> {
    let rng = &mut stream(task, seed, index as u64 + 1);
    let background = random_shade(rng);
    let shapes = match task {
        BundledTask::Count => count_scene(label + 1, rng),
        BundledTask::Location => location_scene(label, rng),
        BundledTask::Orientation => orientation_scene(label, rng),
        BundledTask::Digits => Vec::new(),
    };
    let no_room = || Error::config("side", "that of an image that fits in memory", side);
    let mut canvas = Pixmap::new(side, side).ok_or_else(no_room)?;
    canvas.fill(rgb(background));
    for shape in shapes {
        let mut paint = Paint::default();
        paint.set_color(rgb(contrasting_color(background, rng)));
        // Shapes have coordinates in the unit square.
        let scale = side as f32;
        let place = Transform::from_scale(shape.radius * scale, shape.radius * scale)
            .post_rotate(shape.angle.to_degrees())
            .post_translate(shape.x * scale, shape.y * scale);
        if let Some(path) = shape.kind.path() {
            canvas.fill_path(&path, &paint, FillRule::Winding, place, None);
        }
    }
    let pixels: Vec<u8> = canvas.data().chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect();
    Array3::from_shape_vec((side as usize, side as usize, 3), pixels).map_err(|_| no_room())
}

/// Creates the random generator of one image. Stream 0 is used for the labels.
fn stream(task: BundledTask, seed: i64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed as u64);
    rng.set_stream(((task as u64) << 48) | stream);
    rng
}

/// A shape inside a circle. Lengths are in units of the side of the image.
struct Shape {
    kind: Kind,
    x: f32,
    y: f32,
    radius: f32,
    angle: f32,
}

#[derive(Clone, Copy)]
enum Kind {
    Disc,
    Square,
    Triangle,
    /// An arrow with a head and a shaft.
    Arrow,
    /// A kite with one long end.
    Kite,
    /// A ball with a tail that ends in a point.
    Drop,
}

const PLAIN: [Kind; 3] = [Kind::Disc, Kind::Square, Kind::Triangle];
const POINTING: [Kind; 3] = [Kind::Arrow, Kind::Kite, Kind::Drop];

impl Kind {
    /// Returns the outline within the unit circle. A pointing shape points to the right.
    fn path(self) -> Option<Path> {
        let polygon = |points: &[(f32, f32)]| {
            let mut path = PathBuilder::new();
            let (x, y) = points[0];
            path.move_to(x, y);
            points[1..].iter().for_each(|&(x, y)| path.line_to(x, y));
            path.close();
            path.finish()
        };
        match self {
            // The disc is smaller than the unit circle, so that the three plain shapes have similar
            // areas.
            Self::Disc => PathBuilder::from_circle(0.0, 0.0, 0.8),
            Self::Square => polygon(&[(0.7, 0.7), (-0.7, 0.7), (-0.7, -0.7), (0.7, -0.7)]),
            Self::Triangle => polygon(&[(1.0, 0.0), (-0.5, 0.866), (-0.5, -0.866)]),
            Self::Arrow => polygon(&[
                (1.0, 0.0),
                (0.1, 0.65),
                (0.1, 0.22),
                (-0.97, 0.22),
                (-0.97, -0.22),
                (0.1, -0.22),
                (0.1, -0.65),
            ]),
            Self::Kite => polygon(&[(1.0, 0.0), (-0.65, 0.55), (-0.3, 0.0), (-0.65, -0.55)]),
            Self::Drop => drop_path(),
        }
    }
}

/// Returns the outline of a circle of radius 0.45 around (-0.5, 0) and its two tangents through (1,
/// 0).
fn drop_path() -> Option<Path> {
    let (center, radius): (f32, f32) = (-0.5, 0.45);
    let touch = f32::acos(radius / (1.0 - center));
    let mut path = PathBuilder::new();
    path.move_to(1.0, 0.0);
    const STEPS: usize = 32;
    for step in 0..=STEPS {
        let angle = touch + (TAU - 2.0 * touch) * step as f32 / STEPS as f32;
        path.line_to(center + radius * angle.cos(), radius * angle.sin());
    }
    path.close();
    path.finish()
}

/// Returns `count` shapes that do not touch, each within the image. If there is no room for a
/// shape, all shapes are made smaller and placed again, so that the loop ends.
fn count_scene(count: i64, rng: &mut ChaCha8Rng) -> Vec<Shape> {
    const GAP: f32 = 0.035;
    const TRIES: usize = 100;
    let mut largest = rng.random_range(0.095..0.14);
    'layout: loop {
        let mut shapes: Vec<Shape> = Vec::new();
        for _ in 0..count {
            let radius = largest * rng.random_range(0.75..1.0);
            let place = (0..TRIES).find_map(|_| {
                let (x, y) = (within(radius, rng), within(radius, rng));
                let free = |s: &Shape| (s.x - x).hypot(s.y - y) > s.radius + radius + GAP;
                shapes.iter().all(free).then_some((x, y))
            });
            let Some((x, y)) = place else {
                largest *= 0.9;
                continue 'layout;
            };
            shapes.push(Shape {
                kind: one_of(PLAIN, rng),
                x,
                y,
                radius,
                angle: rng.random_range(0.0..TAU),
            });
        }
        return shapes;
    }
}

/// Returns one shape within the image. Its centre is in the cell of the label, at a distance from
/// the borders of the cell.
fn location_scene(label: i64, rng: &mut ChaCha8Rng) -> Vec<Shape> {
    const CLEAR: f32 = 0.02;
    let radius = rng.random_range(0.07..0.12);
    let cell = 1.0 / GRID as f32;
    let mut place = |index: i64| {
        let (low, high) = (index as f32 * cell + CLEAR, (index + 1) as f32 * cell - CLEAR);
        rng.random_range(low.max(radius)..high.min(1.0 - radius))
    };
    let (y, x) = (place(label / GRID), place(label % GRID));
    let angle = rng.random_range(0.0..TAU);
    vec![Shape { kind: one_of(PLAIN, rng), x, y, radius, angle }]
}

/// Returns one pointing shape. Its angle differs by up to 4 degrees from the direction of the
/// label.
fn orientation_scene(label: i64, rng: &mut ChaCha8Rng) -> Vec<Shape> {
    const OFF: f32 = 4.0 / 180.0 * PI;
    let radius = rng.random_range(0.27..0.42);
    let angle = TAU * label as f32 / DIRECTIONS as f32 + rng.random_range(-OFF..OFF);
    let (x, y) = (within(radius, rng), within(radius, rng));
    vec![Shape { kind: one_of(POINTING, rng), x, y, radius, angle }]
}

/// Draws one coordinate of a centre, such that a circle of `radius` around it is within the image.
fn within(radius: f32, rng: &mut ChaCha8Rng) -> f32 {
    rng.random_range(radius..1.0 - radius)
}

fn one_of(kinds: [Kind; 3], rng: &mut ChaCha8Rng) -> Kind {
    kinds.choose(rng).copied().unwrap_or(Kind::Disc)
}

type Rgb = [f32; 3];

fn rgb([r, g, b]: Rgb) -> Color {
    Color::from_rgba(r, g, b, 1.0).unwrap_or(Color::BLACK)
}

fn luma([r, g, b]: Rgb) -> f32 {
    0.299 * r + 0.587 * g + 0.114 * b
}

/// Draws a grey between black and white, with a slight tint.
fn random_shade(rng: &mut ChaCha8Rng) -> Rgb {
    let shade: f32 = rng.random_range(0.05..0.95);
    [(); 3].map(|()| (shade + rng.random_range(-0.05..0.05)).clamp(0.0, 1.0))
}

/// Draws a colour that is clearly lighter or darker than the background.
fn contrasting_color(background: Rgb, rng: &mut ChaCha8Rng) -> Rgb {
    const CONTRAST: f32 = 0.3;
    loop {
        let color = [(); 3].map(|()| rng.random_range(0.0..1.0));
        if (luma(color) - luma(background)).abs() > CONTRAST {
            return color;
        }
    }
}
