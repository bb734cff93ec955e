//! Activations for which libtorch has no kernel.

use tch::Tensor;

use crate::error::Result;

/// The slope of QuickGELU, `x * sigmoid(1.702 x)`.
pub(crate) const QUICK_GELU_SLOPE: f64 = 1.702;

/// Returns QuickGELU of `x`, `x * sigmoid(1.702 x)`.
///
/// The code computes `silu(1.702 x) / 1.702`, which saves one tensor for backward; the product with
/// a sigmoid saves two.
pub(crate) fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    let mut scaled = x.f_mul_scalar(QUICK_GELU_SLOPE)?.f_silu()?;
    Ok(scaled.f_mul_scalar_(QUICK_GELU_SLOPE.recip())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn quick_gelu_is_its_definition() {
        let x = Tensor::linspace(-8.0, 8.0, 101, (Kind::Double, Device::Cpu));
        let naive = &x * (&x * 1.702).sigmoid();
        let gap = (quick_gelu(&x).unwrap() - naive).abs().max().double_value(&[]);
        assert!(gap < 1e-14, "{gap}");
    }
}
