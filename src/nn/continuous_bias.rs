//! The continuous position bias of Swin V2 (Liu et al., arXiv 2111.09883): a small MLP computes the
//! bias from the offset between two tokens.

use tch::{Device, Kind, Tensor};

use super::Weight;
use super::stored::widened;
use crate::error::Result;

/// An MLP that computes the table of relative position bias of a window.
#[derive(Clone, Debug)]
pub(crate) struct ContinuousBias {
    /// The offsets between two tokens on a logarithmic scale.
    coordinates: Weight,
    /// `[hidden, 2]` and `[hidden]`.
    first: (Weight, Weight),
    /// `[heads, hidden]`.
    second: Weight,
}

/// The largest offset of the pretraining window is this value before the logarithm is taken.
const RANGE: f64 = 8.0;

/// The table is between zero and this value.
const MAX_BIAS: f64 = 16.0;

impl ContinuousBias {
    /// Creates the MLP for windows of `rows` times `cols` tokens. `pretrained` is the window of the
    /// pretraining, by which offsets are divided; a zero stands for the window itself. The weights
    /// are `first [hidden, 2]` and `[hidden]`, and `second [heads, hidden]`.
    pub(crate) fn new(
        (rows, cols): (i64, i64),
        pretrained: (i64, i64),
        first: (Weight, Weight),
        second: Weight,
    ) -> Result<Self> {
        let down = offsets(rows, pretrained.0)?.f_unsqueeze(1)?;
        let across = offsets(cols, pretrained.1)?.f_unsqueeze(0)?;
        let shape = [2 * rows - 1, 2 * cols - 1];
        let parts = [down.f_expand(shape, false)?, across.f_expand(shape, false)?];
        let coordinates = Tensor::f_stack(&parts, -1)?.f_flatten(0, 1)?;
        let coordinates = coordinates.f_to_device(first.0.device())?;
        Ok(ContinuousBias { coordinates: Weight(coordinates), first, second })
    }

    /// Computes the table `[(2 rows - 1) * (2 cols - 1), heads]` in the dtype that an operation on
    /// `x` needs.
    pub(crate) fn table(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (widened(&self.first.0, x)?, widened(&self.first.1, x)?);
        let coordinates = self.coordinates.f_to_kind(weight.kind())?;
        let hidden = coordinates.f_linear(&weight, Some(&bias))?.f_relu()?;
        let table = hidden.f_linear(&widened(&self.second, x)?, None::<&Tensor>)?;
        Ok(table.f_sigmoid()?.f_mul_scalar(MAX_BIAS)?)
    }
}

/// Returns the offsets `1 - side ..= side - 1` along one side of a window on the logarithmic scale,
/// `[2 side - 1]`.
fn offsets(side: i64, pretrained: i64) -> Result<Tensor> {
    let largest = (if pretrained > 0 { pretrained } else { side } - 1).max(1);
    let scale = |offset: i64| {
        let place = offset as f64 / largest as f64 * RANGE;
        (place.signum() * (place.abs() + 1.0).log2() / RANGE.log2()) as f32
    };
    let offsets: Vec<f32> = (1 - side..side).map(scale).collect();
    Ok(Tensor::f_from_slice(&offsets)?.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_on_a_logarithmic_scale() {
        let list = |side, pretrained| Vec::<f32>::try_from(offsets(side, pretrained).unwrap());
        let end = 9f32.log2() / 3.0;
        assert_eq!(list(2, 0).unwrap(), [-end, 0.0, end]);
        assert_eq!(list(1, 0).unwrap(), [0.0]);
        assert_eq!(list(1, 1).unwrap(), [0.0]);
        // Half of the pretraining window of 3.
        assert_eq!(list(2, 3).unwrap()[2], 5f32.log2() / 3.0);
    }

    /// Compares a table with a loop over offsets, whose MLP adds up rows and columns.
    #[test]
    fn rows_come_before_columns() {
        let weight = |values: &[f32], shape: &[i64]| Weight(Tensor::from_slice(values).view(shape));
        let first = (weight(&[1.0, 0.0, 0.0, 1.0], &[2, 2]), weight(&[2.0, 3.0], &[2]));
        let bias =
            ContinuousBias::new((2, 3), (0, 0), first, weight(&[1.0, -0.5], &[1, 2])).unwrap();
        let table = bias.table(&Tensor::zeros([1], (Kind::Float, Device::Cpu))).unwrap();
        assert_eq!(table.size(), [15, 1]);
        let scale = |place: f64| place.signum() * (place.abs() + 1.0).log2() / 3.0;
        for (row, col) in (0..3).flat_map(|row| (0..5).map(move |col| (row, col))) {
            let (down, across) = (scale(8.0 * (row - 1) as f64), scale(4.0 * (col - 2) as f64));
            let sum = (down + 2.0).max(0.0) - 0.5 * (across + 3.0).max(0.0);
            let expected = 16.0 / (1.0 + (-sum).exp());
            let found = table.double_value(&[row * 5 + col, 0]);
            assert!((found - expected).abs() < 1e-5, "{row} {col}: {found}, not {expected}");
        }
    }
}
