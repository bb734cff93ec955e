//! Places the labels of marks so that no label covers another label or a mark.

/// A rectangle in pixels, y downwards.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rect {
    pub(super) left: f64,
    pub(super) top: f64,
    pub(super) right: f64,
    pub(super) bottom: f64,
}

impl Rect {
    /// Around a point.
    pub(super) fn around((x, y): (f64, f64), half_width: f64, half_height: f64) -> Self {
        Rect {
            left: x - half_width,
            top: y - half_height,
            right: x + half_width,
            bottom: y + half_height,
        }
    }

    /// Returns the point of the rectangle that is nearest to the given point.
    pub(super) fn nearest(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (x.clamp(self.left, self.right), y.clamp(self.top, self.bottom))
    }

    fn overlaps(&self, other: &Rect) -> bool {
        self.left < other.right
            && other.left < self.right
            && self.top < other.bottom
            && other.top < self.bottom
    }

    fn lies_in(&self, frame: &Rect) -> bool {
        self.left >= frame.left
            && self.right <= frame.right
            && self.top >= frame.top
            && self.bottom <= frame.bottom
    }
}

/// Directions in which a label is tried, best first.
const DIRECTIONS: [(f64, f64); 8] = [
    (1.0, 0.0),
    (-1.0, 0.0),
    (0.0, -1.0),
    (0.0, 1.0),
    (1.0, -1.0),
    (1.0, 1.0),
    (-1.0, -1.0),
    (-1.0, 1.0),
];

/// The number of distances at which a label is tried, in steps of half its height. Beyond the first
/// one the label needs a line to its mark.
const RINGS: usize = 24;

/// A label's place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Placed {
    pub(super) rect: Rect,
    /// Whether the label is so far from its mark that it needs a line to it.
    pub(super) apart: bool,
}

/// Small rectangles along the line from a mark, `radius` wide, to its label.
fn line(mark: (f64, f64), label: &Rect, radius: f64) -> Vec<Rect> {
    let end = label.nearest(mark);
    let (dx, dy) = (end.0 - mark.0, end.1 - mark.1);
    let length = dx.hypot(dy);
    // Not the end, which touches the label.
    let stops = (1..).map(|i| radius + 2.0 * f64::from(i)).take_while(|at| *at < length - 2.0);
    stops
        .map(|at| (mark.0 + dx * at / length, mark.1 + dy * at / length))
        .map(|point| Rect::around(point, 1.0, 1.0))
        .collect()
}

/// Returns the place of the label of each mark. A label is inside `frame`, as close to its mark as
/// possible, and covers no mark and no label that was placed before; if possible, its line does not
/// cross any either. `radius` is the radius of a mark in pixels. If no place is free, the label is
/// to the right of its mark.
pub(super) fn place(
    marks: &[(f64, f64)],
    sizes: &[(f64, f64)],
    radius: f64,
    frame: &Rect,
) -> Vec<Placed> {
    let mut taken: Vec<Rect> =
        marks.iter().map(|&mark| Rect::around(mark, radius + 1.0, radius + 1.0)).collect();
    let mut placed = Vec::with_capacity(marks.len());
    for (own, (&(x, y), &(width, height))) in marks.iter().zip(sizes).enumerate() {
        let at = |(dx, dy): (f64, f64), ring: usize| {
            let gap = radius + 4.0 + ring as f64 * height / 2.0;
            let diagonal = if dx != 0.0 && dy != 0.0 { 0.7 } else { 1.0 };
            let center =
                (x + dx * (gap * diagonal + width / 2.0), y + dy * (gap * diagonal + height / 2.0));
            Rect::around(center, width / 2.0, height / 2.0)
        };
        let clear = |rect: &Rect| !taken.iter().any(|other| rect.overlaps(other));
        // A line starts within the square around its own mark.
        let others = |rect: &Rect| {
            let mut taken = taken.iter().enumerate();
            !taken.any(|(index, other)| index != own && rect.overlaps(other))
        };
        let way = |ring: usize, rect: &Rect| match ring {
            0 => Vec::new(),
            _ => line((x, y), rect, radius),
        };
        let free = |rect: &Rect| rect.lies_in(frame) && clear(rect);
        let tries = || {
            let ring = |ring| DIRECTIONS.map(|towards| (ring, at(towards, ring)));
            (0..RINGS).flat_map(ring).filter(|(_, rect)| free(rect))
        };
        let found = tries().find(|(ring, rect)| way(*ring, rect).iter().all(others));
        // Among marks that cover each other a line may cross another.
        let (ring, rect) =
            found.or_else(|| tries().next()).unwrap_or_else(|| (0, at(DIRECTIONS[0], 0)));
        let way = way(ring, &rect);
        taken.push(rect);
        taken.extend(way);
        placed.push(Placed { rect, apart: ring > 0 });
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: Rect = Rect { left: 0.0, top: 0.0, right: 400.0, bottom: 300.0 };

    #[test]
    fn labels_of_crowded_marks_cover_nothing() {
        let marks: Vec<_> =
            (0..9).map(|i| (150.0 + 9.0 * i as f64, 150.0 + (i % 3) as f64)).collect();
        let sizes = vec![(90.0, 20.0); marks.len()];
        let placed = place(&marks, &sizes, 5.0, &FRAME);
        for (i, label) in placed.iter().enumerate() {
            assert!(label.rect.lies_in(&FRAME), "{label:?}");
            assert!(placed[..i].iter().all(|other| !label.rect.overlaps(&other.rect)));
            let dots = marks.iter().map(|&mark| Rect::around(mark, 5.0, 5.0));
            assert!(dots.into_iter().all(|dot| !label.rect.overlaps(&dot)));
        }
        assert!(placed.iter().any(|label| label.apart));
    }

    #[test]
    fn a_lone_label_is_right_of_its_mark_or_left_at_the_edge() {
        let alone = |x: f64| place(&[(x, 150.0)], &[(90.0, 20.0)], 5.0, &FRAME)[0].rect;
        assert!(alone(100.0).left > 100.0);
        assert!(alone(395.0).right < 395.0);
        // Wider than the frame: it has a place all the same.
        assert_eq!(place(&[(5.0, 5.0)], &[(900.0, 20.0)], 5.0, &FRAME).len(), 1);
    }
}
