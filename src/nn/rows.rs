//! The rows that this process computes of a batch that several processes share, so that each draws
//! the random numbers that one process would draw for these rows.

use std::cell::Cell;
use std::marker::PhantomData;

use tch::Tensor;

use crate::error::Result;
use crate::ffi::Recording;

/// Consecutive rows of a batch. Random numbers are drawn for all rows of the batch, in the same way
/// in every process, and these are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    /// The first row of this process.
    pub(crate) first: i64,
    /// The number of rows of this process, at least 1.
    pub(crate) own: i64,
    /// The number of rows of all processes.
    pub(crate) all: i64,
}

thread_local! {
    /// `None` if this process computes all rows.
    static ROWS: Cell<Option<Rows>> = const { Cell::new(None) };
}

/// Restores the rows before it when it is dropped.
#[must_use = "the rows end as the guard is dropped"]
pub(crate) struct RowsGuard {
    before: Option<Rows>,
    /// Makes the guard `!Send`, because each thread has rows of its own.
    _thread: PhantomData<*const ()>,
}

impl Drop for RowsGuard {
    fn drop(&mut self) {
        ROWS.set(self.before);
    }
}

impl Rows {
    /// Returns the rows of this thread's pass; `None` if it computes whole batches.
    pub(crate) fn active() -> Option<Self> {
        ROWS.get()
    }

    /// Makes these the rows of this thread until the guard is dropped.
    pub(crate) fn enter(self) -> RowsGuard {
        RowsGuard { before: ROWS.replace(Some(self)), _thread: PhantomData }
    }

    /// Makes each row of this thread count `times`, as each sample does that is cut into windows.
    pub(crate) fn each_counts(times: i64) -> RowsGuard {
        let before = ROWS.get();
        ROWS.set(before.map(|Rows { first, own, all }| Rows {
            first: first * times,
            own: own * times,
            all: all * times,
        }));
        RowsGuard { before, _thread: PhantomData }
    }

    /// Draws with `draw`, for a tensor of the shape of all rows, and returns these rows of it.
    fn of(self, x: &Tensor, draw: impl FnOnce(&mut Tensor) -> Result<()>) -> Result<Tensor> {
        let mut shape = x.size();
        shape[0] = self.all;
        let mut all = match order(x) {
            None => Tensor::f_empty(&shape, (x.kind(), x.device()))?,
            Some(order) => Tensor::f_empty_permuted(&shape, order, (x.kind(), x.device()))?,
        };
        draw(&mut all)?;
        Ok(all.f_narrow(0, self.first, self.own)?)
    }
}

/// Returns the dimensions of a dense tensor in the order of its memory; `None` if that is their own
/// order. libtorch fills the mask of a dropout in this order.
fn order(x: &Tensor) -> Option<Vec<i64>> {
    let strides = x.stride();
    if x.is_contiguous() || strides.contains(&0) {
        return None;
    }
    let mut order: Vec<usize> = (0..strides.len()).collect();
    order.sort_by_key(|&dim| std::cmp::Reverse(strides[dim]));
    Some(order.into_iter().map(|dim| dim as i64).collect())
}

/// Sets a `rate` of the elements of `x` `[B, ..]` to 0 and divides the others by `1 - rate`, as
/// libtorch's dropout does in training.
pub(crate) fn dropout(x: &Tensor, rate: f64) -> Result<Tensor> {
    Recording::refuse_draw("dropout", rate)?;
    match Rows::active().filter(|rows| x.size().first() == Some(&rows.own)) {
        Some(rows) if rate > 0.0 => Ok(x.f_mul(&dropout_mask(x, rate, rows)?)?),
        _ => Ok(x.f_dropout(rate, true)?),
    }
}

/// Returns the factors of a dropout over `x`, of which this process has some `rows`.
fn dropout_mask(x: &Tensor, rate: f64, rows: Rows) -> Result<Tensor> {
    rows.of(x, |mask| {
        let _drawn = mask.f_bernoulli_float_(1.0 - rate)?;
        let _scaled = mask.f_div_scalar_(1.0 - rate)?;
        Ok(())
    })
}

/// Fills an empty `mask` `[B, ..]` with the factors of a dropout, in the same way as libtorch's own
/// dropout.
pub(crate) fn fill_dropout_mask(mask: Tensor, rate: f64) -> Result<Tensor> {
    Ok(fill_keep_mask(mask, rate)?.f_div_scalar_(1.0 - rate)?)
}

/// Fills an empty `mask` `[B, ..]` with 1 where a dropout keeps an element and with 0 elsewhere, in
/// the same way as libtorch's own dropout.
pub(crate) fn fill_keep_mask(mut mask: Tensor, rate: f64) -> Result<Tensor> {
    Recording::refuse_draw("dropout", rate)?;
    let draw = |mask: &mut Tensor| {
        let _drawn = mask.f_bernoulli_float_(1.0 - rate)?;
        Ok(())
    };
    match Rows::active().filter(|rows| mask.size().first() == Some(&rows.own)) {
        Some(rows) => Ok(rows.of(&mask, draw)?.f_contiguous()?),
        None => draw(&mut mask).map(|()| mask),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    /// Returns whether both draws were ever equal. All tests of the process draw from libtorch's one
    /// generator, so that a draw of another test may come between the two; they are compared many
    /// times.
    fn drawn_alike(draw: impl Fn() -> (Tensor, Tensor)) -> bool {
        (0..50).any(|_| {
            let (whole, rows) = draw();
            whole.equal(&rows)
        })
    }

    #[test]
    fn rows_of_a_dropout_are_those_of_the_whole_batch() {
        let contiguous = Tensor::ones([6, 5, 4], (Kind::Float, Device::Cpu));
        let permuted = Tensor::ones([6, 4, 5], (Kind::Float, Device::Cpu)).transpose(1, 2);
        let expanded = Tensor::ones([1, 5, 4], (Kind::Float, Device::Cpu)).expand([6, 5, 4], false);
        for x in [contiguous, permuted, expanded] {
            for (first, own) in [(0, 2), (2, 3), (5, 1)] {
                assert!(drawn_alike(|| {
                    tch::manual_seed(3);
                    let whole = dropout(&x, 0.4).unwrap().narrow(0, first, own);
                    tch::manual_seed(3);
                    let _rows = Rows { first, own, all: 6 }.enter();
                    (whole, dropout(&x.narrow(0, first, own), 0.4).unwrap())
                }));
            }
        }
        assert_eq!(Rows::active(), None);
    }

    #[test]
    fn windows_are_rows_of_their_sample() {
        let rows = Rows { first: 1, own: 2, all: 4 };
        let _rows = rows.enter();
        {
            let _windows = Rows::each_counts(3);
            assert_eq!(Rows::active(), Some(Rows { first: 3, own: 6, all: 12 }));
        }
        assert_eq!(Rows::active(), Some(rows));
    }
}
