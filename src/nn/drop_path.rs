//! Drop path (stochastic depth) that computes only the kept samples.

use tch::{Kind, Tensor};

use super::rows::{Rows, RowsGuard};
use crate::error::Result;
use crate::ffi::{Recording, send};

/// The samples of a batch that a residual branch is computed for, and the factor of its output.
/// Drop path with rate `r` keeps each sample with probability `1 - r` and divides the output by `1
/// - r`.
#[derive(Debug)]
pub enum Branch {
    /// Every sample is kept, without scaling.
    All,
    /// The samples at `index` (`[K]`, i64, on the device of the tokens) are kept, and their output
    /// is multiplied by `scale`. The entries of `index` are within `0..B`, each at most once. Only
    /// [`DropPath::draw`] creates this variant.
    #[non_exhaustive]
    Kept {
        /// Positions in the batch.
        index: Tensor,
        /// `1 / (1 - r)`; 0 if this process has none of the kept samples of a batch that several
        /// processes share, and computes one for nothing.
        scale: f64,
        /// The place of these samples among the kept ones of the shared batch, if there is one.
        #[doc(hidden)]
        rows: Option<KeptRows>,
    },
}

/// The place of a process's kept samples among those of all processes.
#[derive(Clone, Copy, Debug)]
pub struct KeptRows(Rows);

impl Branch {
    /// Makes the kept samples the rows of this thread until the guard is dropped, so that dropout in
    /// the branch draws for them.
    pub(crate) fn enter(&self) -> Option<RowsGuard> {
        match self {
            Branch::Kept { rows: Some(KeptRows(rows)), .. } => Some(rows.enter()),
            _ => None,
        }
    }

    /// Returns whether no sample is kept. There is nothing to compute then.
    pub fn is_empty(&self) -> bool {
        matches!(self, Branch::Kept { index, .. } if index.numel() == 0)
    }

    /// Returns the factor by which the branch's output is multiplied.
    pub fn scale(&self) -> f64 {
        match self {
            Branch::All => 1.0,
            Branch::Kept { scale, .. } => *scale,
        }
    }

    /// Returns the kept samples of `x`: `[B, ..] -> [K, ..]`.
    pub fn select(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self.kept_of(x.size().first().copied().unwrap_or_default()) {
            None => x.shallow_clone(),
            Some(index) => x.f_index_select(0, index)?,
        })
    }

    /// Puts the kept samples at their positions in a batch of zeros: `[K, ..] -> [B, ..]`.
    pub(crate) fn spread(&self, x: &Tensor, batch: i64) -> Result<Tensor> {
        let Some(index) = self.kept_of(batch) else { return Ok(x.shallow_clone()) };
        let mut shape = x.size();
        shape[0] = batch;
        Ok(x.f_new_zeros(shape, (x.kind(), x.device()))?.f_index_copy(0, index, x)?)
    }

    /// Returns the positions of the kept samples, or `None` if all are kept.
    pub(crate) fn kept_of(&self, batch: i64) -> Option<&Tensor> {
        match self {
            Branch::Kept { index, .. } if index.numel() as i64 != batch => Some(index),
            _ => None,
        }
    }

    /// Adds the output `[K, ..]` of the branch into the residual stream `[B, ..]`.
    pub fn add(&self, residual: &Tensor, output: &Tensor) -> Result<Tensor> {
        let scale = match self {
            Branch::All => return Ok(residual.f_add(output)?),
            Branch::Kept { scale, .. } => *scale,
        };
        Ok(match self.kept_of(residual.size().first().copied().unwrap_or_default()) {
            None => {
                let scale =
                    output.f_new_full([0i64; 0], scale, (output.kind(), output.device()))?;
                residual.f_addcmul(output, &scale)?
            }
            // Under autocast the dtypes of `output` and `residual` may differ.
            Some(index) => {
                let scaled = output.f_mul_scalar(scale)?.f_to_kind(residual.kind())?;
                residual.f_index_add(0, index, &scaled)?
            }
        })
    }
}

/// Draws the samples of a batch that a branch is computed for ([`Branch`]). It uses libtorch's CPU
/// generator.
#[derive(Clone, Copy, Debug)]
pub struct DropPath {
    rate: f64,
}

impl DropPath {
    /// Creates the drop path of block `block`. The rate grows linearly from 0 at the first of
    /// `depth` blocks to `rate` at the last.
    pub(crate) fn linear(rate: f64, block: usize, depth: usize) -> Self {
        DropPath { rate: rate * block as f64 / (depth.max(2) - 1) as f64 }
    }

    /// Draws the kept samples for a batch of the size of `x` (`[B, ..]`). Outside training it keeps
    /// all samples and draws nothing.
    ///
    /// # Errors
    /// Returns [`Error::Torch`](crate::Error::Torch) if libtorch cannot allocate the result.
    pub fn draw(&self, x: &Tensor, train: bool) -> Result<Branch> {
        if !train || self.rate == 0.0 {
            return Ok(Branch::All);
        }
        Recording::refuse_draw("drop_path", self.rate)?;
        let keep = 1.0 - self.rate;
        // The draw runs on the CPU even if `x` is on a GPU. The kept samples determine shapes, and
        // reading them back from a GPU would wait for the GPU.
        let batch = x.size().first().copied().unwrap_or_default();
        let rows = Rows::active().filter(|rows| rows.own == batch);
        let drawn = rows.map_or(batch, |rows| rows.all);
        let uniform = Tensor::f_rand([drawn], (Kind::Double, tch::Device::Cpu))?;
        let kept = uniform.f_lt(keep)?;
        let scale = keep.recip();
        let branch = match rows {
            None => Branch::Kept { index: positions(&kept)?, scale, rows: None },
            Some(rows) => shared(&kept, rows, scale)?,
        };
        let Branch::Kept { index, scale, rows } = branch else { return Ok(branch) };
        Ok(Branch::Kept { index: send(&index, x.device())?, scale, rows })
    }
}

/// Returns the positions at which `kept` `[B]` is true.
fn positions(kept: &Tensor) -> Result<Tensor> {
    Ok(kept.f_nonzero()?.f_flatten(0, -1)?)
}

/// Returns the branch of a process that has `rows` of the samples, of which `kept` are kept.
///
/// If the process has none of the kept samples, it computes its first sample with a factor of 0, so
/// that it draws what the others draw and its weights get gradients.
fn shared(kept: &Tensor, rows: Rows, scale: f64) -> Result<Branch> {
    let count = |kept: Tensor| -> Result<i64> { Ok(kept.f_sum(Kind::Int64)?.f_int64_value(&[])?) };
    let all = count(kept.shallow_clone())?;
    let mut index = positions(&kept.f_narrow(0, rows.first, rows.own)?)?;
    let own = index.numel() as i64;
    if all == 0 || own > 0 {
        let first = count(kept.f_narrow(0, 0, rows.first)?)?;
        let rows = Some(KeptRows(Rows { first, own, all }));
        return Ok(Branch::Kept { index, scale, rows });
    }
    index = Tensor::f_from_slice(&[0i64])?;
    let rows = Some(KeptRows(Rows { first: 0, own: 1, all }));
    Ok(Branch::Kept { index, scale: 0.0, rows })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn equals_a_mask_over_the_whole_batch() {
        let (x, f) = (Tensor::rand([6, 3], (Kind::Float, Device::Cpu)), |x: &Tensor| x * 3.0);
        let branch =
            Branch::Kept { index: Tensor::from_slice(&[0i64, 2, 5]), scale: 1.25, rows: None };
        let fast = branch.add(&x, &f(&branch.select(&x).unwrap())).unwrap();
        let mask = Tensor::from_slice(&[1.25f32, 0.0, 1.25, 0.0, 0.0, 1.25]).view([6, 1]);
        assert_eq!(fast, &x + f(&x) * mask);
    }

    #[test]
    fn rate_is_linear_over_depth_and_off_in_evaluation() {
        let rates: Vec<f64> = (0..12).map(|i| DropPath::linear(0.1, i, 12).rate).collect();
        assert_eq!((rates[0], rates[11]), (0.0, 0.1));
        assert!((rates[5] - 0.1 * 5.0 / 11.0).abs() < 1e-12);

        let x = Tensor::zeros([20_000, 1], (Kind::Float, Device::Cpu));
        let path = DropPath { rate: 0.25 };
        assert!(matches!(path.draw(&x, false).unwrap(), Branch::All));
        let kept = path.draw(&x, true).unwrap().select(&x).unwrap().size()[0];
        assert!((14_600..15_400).contains(&kept), "{kept}");
    }
}
