//! Windows over the patch grid, within which a Swin block attends (Liu et al., arXiv 2103.14030).

use std::cell::OnceCell;

use tch::{Device, Kind, Tensor};

use super::stored::widened;
use super::{ContinuousBias, Weight};
use crate::error::Result;

/// The division of a token grid into windows. The grid is rolled by `shift`, and it is padded with
/// rows and columns of zeros if windows do not divide it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Windows {
    grid: (i64, i64),
    size: (i64, i64),
    shift: (i64, i64),
    /// Whether the grid is padded before it is rolled, instead of after it.
    pads_first: bool,
}

impl Windows {
    /// Creates windows of at most `size`, rolled by half of it if `shifted`. If one window covers a
    /// side of the grid, the window is as long as that side and nothing is rolled along it. timm
    /// decides this for each side separately, too.
    pub(crate) fn new(grid: (i64, i64), size: (i64, i64), shifted: bool) -> Self {
        let side = |grid: i64, size: i64| match (grid <= size, shifted) {
            (true, _) => (grid, 0),
            (false, true) => (size, size / 2),
            (false, false) => (size, 0),
        };
        let (rows, cols) = (side(grid.0, size.0), side(grid.1, size.1));
        Windows { grid, size: (rows.0, cols.0), shift: (rows.1, cols.1), pads_first: false }
    }

    /// Returns the windows with the padding before the roll if `pads_first` is true.
    pub(crate) fn padding_first(self, pads_first: bool) -> Self {
        Windows { pads_first, ..self }
    }

    /// Returns whether the order of padding and rolling matters.
    pub(crate) fn is_padded_and_rolled(&self) -> bool {
        self.padded() != self.grid && self.shift != (0, 0)
    }

    /// Returns the rows and columns of one window.
    pub(crate) fn size(&self) -> (i64, i64) {
        self.size
    }

    /// Returns how many windows lie below each other and side by side.
    fn count(&self) -> (i64, i64) {
        let count = |grid: i64, size: i64| (grid + size - 1) / size;
        (count(self.grid.0, self.size.0), count(self.grid.1, self.size.1))
    }

    fn padded(&self) -> (i64, i64) {
        let count = self.count();
        (count.0 * self.size.0, count.1 * self.size.1)
    }

    /// Cuts tokens into windows: `[B, N, C] -> [B * windows, A, C]` with A tokens in a window.
    pub(crate) fn partition(&self, tokens: &Tensor) -> Result<Tensor> {
        let x = tokens.f_unflatten(1, [self.grid.0, self.grid.1])?;
        let x = if self.pads_first {
            self.roll(self.pad(x)?, -1)?
        } else {
            self.pad(self.roll(x, -1)?)?
        };
        self.cut(&x)
    }

    /// Rolls `x [B, rows, cols, C]` by the shift in the direction `sign`.
    fn roll(&self, x: Tensor, sign: i64) -> Result<Tensor> {
        if self.shift == (0, 0) {
            return Ok(x);
        }
        Ok(x.f_roll([sign * self.shift.0, sign * self.shift.1], [1, 2])?)
    }

    /// Pads `x [B, rows, cols, C]` at the end of both sides.
    fn pad(&self, x: Tensor) -> Result<Tensor> {
        let (grid, padded) = (self.grid, self.padded());
        if padded == grid {
            return Ok(x);
        }
        Ok(x.f_constant_pad_nd([0, 0, 0, padded.1 - grid.1, 0, padded.0 - grid.0])?)
    }

    /// Drops the padding of `x [B, rows, cols, C]`.
    fn crop(&self, x: Tensor) -> Result<Tensor> {
        Ok(x.f_narrow(1, 0, self.grid.0)?.f_narrow(2, 0, self.grid.1)?)
    }

    /// Cuts the padded grid `[B, rows, cols, C]` into `[B * windows, A, C]`.
    fn cut(&self, x: &Tensor) -> Result<Tensor> {
        let ((down, across), (rows, cols)) = (self.count(), self.size);
        // [B, down, rows, across, cols, C] -> [B, down, across, rows, cols, C]
        let x = x.f_unflatten(2, [across, cols])?.f_unflatten(1, [down, rows])?;
        Ok(x.f_permute([0, 1, 3, 2, 4, 5])?.f_flatten(3, 4)?.f_flatten(0, 2)?)
    }

    /// Reverses [`Windows::partition`] and drops the padding.
    pub(crate) fn reverse(&self, windows: &Tensor) -> Result<Tensor> {
        let ((down, across), (rows, cols)) = (self.count(), self.size);
        // [B, down, across, rows, cols, C] -> [B, down, rows, across, cols, C]
        let x = windows.f_unflatten(1, [rows, cols])?.f_unflatten(0, [-1, down, across])?;
        let x = x.f_permute([0, 1, 3, 2, 4, 5])?.f_flatten(3, 4)?.f_flatten(1, 2)?;
        let x = if self.pads_first {
            self.crop(self.roll(x, 1)?)?
        } else {
            self.roll(self.crop(x)?, 1)?
        };
        Ok(x.f_flatten(1, 2)?)
    }

    /// Returns the number of rows of a table with one row for each offset between two tokens of a
    /// window.
    pub(crate) fn table_rows(&self) -> i64 {
        num_offsets(self.size)
    }

    /// Returns the row of the table for each pair of tokens, `[A * A]`.
    fn pairs(&self) -> Result<Tensor> {
        Ok(offsets(self.size)?.f_flatten(0, -1)?)
    }

    /// Returns `[windows, 1, A, A]`: `apart` between tokens that were not neighbours before the roll,
    /// zero otherwise. Returns `None` if nothing is rolled.
    fn mask(&self, apart: f64) -> Result<Option<Tensor>> {
        if self.shift == (0, 0) {
            return Ok(None);
        }
        let (padded, size, shift) = (self.padded(), self.size, self.shift);
        let rows = regions(padded.0, size.0, shift.0)?.f_mul_scalar(3)?.f_unsqueeze(1)?;
        let regions = rows.f_add(&regions(padded.1, size.1, shift.1)?.f_unsqueeze(0)?)?;
        // [windows, A, 1]
        let regions = self.cut(&regions.f_unsqueeze(0)?.f_unsqueeze(-1)?)?;
        let is_apart = regions.f_ne_tensor(&regions.f_transpose(1, 2)?)?;
        Ok(Some(is_apart.f_unsqueeze(1)?.f_to_kind(Kind::Float)?.f_mul_scalar(apart)?))
    }
}

/// Returns the number of different offsets between two places of a grid.
pub(super) fn num_offsets((rows, cols): (i64, i64)) -> i64 {
    (2 * rows - 1) * (2 * cols - 1)
}

/// Returns the number of the offset between each pair of places of a grid, `[A, A]` for A places.
pub(super) fn offsets((rows, cols): (i64, i64)) -> Result<Tensor> {
    let cells = Tensor::f_arange(rows * cols, (Kind::Int64, Device::Cpu))?;
    // Offset from the second token of a pair to the first, shifted to start at 0: [A, A].
    let offset = |place: Tensor, side: i64| -> Result<Tensor> {
        let offset = place.f_unsqueeze(1)?.f_sub(&place.f_unsqueeze(0)?)?;
        Ok(offset.f_add_scalar(side - 1)?)
    };
    let down = offset(cells.f_divide_scalar_mode(cols, "floor")?, rows)?;
    let across = offset(cells.f_remainder(cols)?, cols)?;
    Ok(down.f_mul_scalar(2 * cols - 1)?.f_add(&across)?)
}

/// Returns, for each position of a side, the number of its region, `[side]`. A roll by `shift`
/// brings several regions together in one window.
fn regions(side: i64, size: i64, shift: i64) -> Result<Tensor> {
    let places = Tensor::f_arange(side, (Kind::Int64, Device::Cpu))?;
    if shift == 0 {
        return Ok(places.f_zeros_like()?);
    }
    let behind = |place: i64| places.f_ge(place)?.f_to_kind(Kind::Int64);
    Ok(behind(side - size)?.f_add(&behind(side - shift)?)?)
}

/// The bias for each offset between two tokens of a window, `[(2 rows - 1) * (2 cols - 1), heads]`.
#[derive(Clone, Debug)]
pub(crate) enum BiasTable {
    /// The table is a weight.
    Learned(Weight),
    /// An MLP computes the table.
    Continuous(ContinuousBias),
}

impl BiasTable {
    /// Returns the table in the dtype that an operation on `x` needs.
    fn beside(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            BiasTable::Learned(table) => widened(table, x),
            BiasTable::Continuous(bias) => bias.table(x),
        }
    }
}

/// The bias that a block adds to the scores between the tokens of each window.
#[derive(Debug)]
pub(crate) struct WindowBias {
    windows: Windows,
    table: BiasTable,
    /// The value added to the scores between tokens that are neighbours only because of the roll.
    apart: f64,
    /// The rows of [`Windows::pairs`] and the mask. They are the same in every pass, so the first
    /// pass computes them. They are larger than the weights.
    fixed: OnceCell<(Tensor, Option<Tensor>)>,
}

impl WindowBias {
    /// Creates the bias. `apart` is added to the scores between tokens that are neighbours only
    /// because of the roll.
    pub(crate) fn new(windows: Windows, table: BiasTable, apart: f64) -> Self {
        WindowBias { windows, table, apart, fixed: OnceCell::new() }
    }

    /// Cuts `tokens [B, N, C]` into windows: `[B * windows, A, C]`.
    pub(crate) fn partition(&self, tokens: &Tensor) -> Result<Tensor> {
        self.windows.partition(tokens)
    }

    /// Reverses [`WindowBias::partition`].
    pub(crate) fn reverse(&self, windows: &Tensor) -> Result<Tensor> {
        self.windows.reverse(windows)
    }

    /// Returns the bias for the scores of `qkv`: `[B * windows, heads, A, A]` for a batch of B, or
    /// `[1, heads, A, A]` if it is the same in each window.
    pub(crate) fn for_batch(&self, batch: i64, qkv: &Tensor) -> Result<Tensor> {
        let (pairs, mask) = self.fixed(qkv.device())?;
        let (rows, cols) = self.windows.size;
        let area = rows * cols;
        let bias =
            self.table.beside(qkv)?.f_index_select(0, pairs)?.f_unflatten(0, [area, area])?;
        // [A, A, heads] -> [1, heads, A, A]
        let bias = bias.f_permute([2, 0, 1])?.f_unsqueeze(0)?;
        match mask {
            None => Ok(bias.f_contiguous()?),
            Some(mask) => {
                let bias = bias.f_add(&mask.f_to_kind(bias.kind())?)?;
                Ok(bias
                    .f_unsqueeze(0)?
                    .f_expand([batch, -1, -1, -1, -1], false)?
                    .f_flatten(0, 1)?)
            }
        }
    }

    fn fixed(&self, device: Device) -> Result<&(Tensor, Option<Tensor>)> {
        if let Some(fixed) = self.fixed.get() {
            return Ok(fixed);
        }
        let mask =
            self.windows.mask(self.apart)?.map(|mask| mask.f_to_device(device)).transpose()?;
        let fixed = (self.windows.pairs()?.f_to_device(device)?, mask);
        Ok(self.fixed.get_or_init(|| fixed))
    }
}

impl Clone for WindowBias {
    fn clone(&self) -> Self {
        let fixed = OnceCell::new();
        if let Some((pairs, mask)) = self.fixed.get() {
            let mask = mask.as_ref().map(Tensor::shallow_clone);
            // `set` cannot fail, because the cell is new.
            let _set = fixed.set((pairs.shallow_clone(), mask));
        }
        WindowBias { windows: self.windows, table: self.table.clone(), apart: self.apart, fixed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const APART: f64 = -100.0;

    #[test]
    fn a_partition_is_taken_back_and_keeps_every_token() {
        for (grid, size, shifted, padded) in [
            ((4, 6), (2, 3), true, (4, 6)),
            ((5, 7), (3, 3), true, (6, 9)),
            ((3, 8), (4, 3), true, (3, 9)),
            ((2, 2), (7, 7), true, (2, 2)),
            ((5, 1), (2, 2), false, (6, 1)),
        ] {
            let rolled_first = Windows::new(grid, size, shifted);
            assert_eq!(rolled_first.padded(), padded);
            let x = Tensor::arange(2 * grid.0 * grid.1 * 3, (Kind::Float, Device::Cpu)) + 1;
            let x = x.view([2, grid.0 * grid.1, 3]);
            let cuts = [false, true].map(|first| {
                let windows = rolled_first.padding_first(first);
                let cut = windows.partition(&x).unwrap();
                assert_eq!(windows.reverse(&cut).unwrap(), x);
                assert_eq!(cut.sum(Kind::Float), x.sum(Kind::Float));
                cut
            });
            assert_eq!(cuts[0] != cuts[1], rolled_first.is_padded_and_rolled());
        }
    }

    #[test]
    fn one_window_is_not_rolled_and_has_no_mask() {
        let windows = Windows::new((3, 3), (7, 3), true);
        assert_eq!((windows.size, windows.shift), ((3, 3), (0, 0)));
        assert!(windows.mask(APART).unwrap().is_none());
        let one_side = Windows::new((3, 8), (4, 4), true);
        assert_eq!((one_side.size, one_side.shift), ((3, 4), (0, 2)));
    }

    /// Compares with a loop over tokens that tests which tokens were neighbours before the roll.
    #[test]
    fn pairs_and_mask_are_those_of_a_loop() {
        let windows = Windows::new((5, 4), (2, 3), true);
        let ((rows, cols), (height, width)) = (windows.size, windows.padded());
        let pairs = Vec::<i64>::try_from(windows.pairs().unwrap()).unwrap();
        let mask = windows.mask(APART).unwrap().unwrap();
        let region = |at: i64, side: i64, size: i64, shift: i64| {
            if at < side - size { 0 } else { 1 + i64::from(at >= side - shift) }
        };
        for (a, b) in (0..rows * cols).flat_map(|a| (0..rows * cols).map(move |b| (a, b))) {
            let (down, across) = (a / cols - b / cols, a % cols - b % cols);
            let row = (down + rows - 1) * (2 * cols - 1) + across + cols - 1;
            assert_eq!(pairs[(a * rows * cols + b) as usize], row);
            for window in 0..(height / rows) * (width / cols) {
                let place = |t: i64| {
                    let (down, across) = (window / (width / cols), window % (width / cols));
                    let (y, x) = (down * rows + t / cols, across * cols + t % cols);
                    (region(y, height, rows, rows / 2), region(x, width, cols, cols / 2))
                };
                let expected = if place(a) == place(b) { 0.0 } else { APART };
                assert_eq!(mask.double_value(&[window, 0, a, b]), expected);
            }
        }
    }
}
