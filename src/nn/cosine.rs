//! Queries and keys of cosine attention (Swin V2, Liu et al., arXiv 2111.09883).

use tch::{Kind, Tensor};

use crate::error::Result;

/// The smallest length by which a vector is divided, as in `torch.nn.functional.normalize`.
const MIN_LENGTH: f64 = 1e-12;

/// The largest factor of a cosine.
const MAX_FACTOR: f64 = 100.0;

/// Returns queries and keys `[B, heads, T, d]` whose dot products are cosines times the factor of
/// their head. `logit_scale` is the logarithm of the factors, `[heads, 1, 1]`. A factor is at most
/// [`MAX_FACTOR`].
pub(super) fn normalized(q: &Tensor, k: &Tensor, logit_scale: &Tensor) -> Result<(Tensor, Tensor)> {
    let scale = wide(logit_scale)?.f_clamp_max(MAX_FACTOR.ln())?.f_exp()?;
    let kind = q.kind();
    let q = unit(q)?.f_mul(&scale)?.f_to_kind(kind)?;
    Ok((q, unit(k)?.f_to_kind(kind)?))
}

/// Divides each vector of the last dimension by its length. Vectors of half precision become f32,
/// because [`MIN_LENGTH`] is zero in f16.
fn unit(x: &Tensor) -> Result<Tensor> {
    let x = wide(x)?;
    let length = x.f_norm_scalaropt_dim(2.0, -1i64, true)?.f_clamp_min(MIN_LENGTH)?;
    Ok(x.f_div(&length)?)
}

fn wide(x: &Tensor) -> Result<Tensor> {
    match x.kind() {
        Kind::Half | Kind::BFloat16 => Ok(x.f_to_kind(Kind::Float)?),
        _ => Ok(x.shallow_clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn factors_are_limited_and_a_zero_vector_stays_zero() {
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double] {
            let q = Tensor::from_slice(&[3.0, 4.0, 0.0, 0.0]).view([1, 2, 1, 2]).to_kind(kind);
            let scale = Tensor::from_slice(&[2f32.ln(), 9.0]).view([2, 1, 1]);
            let (q, k) = normalized(&q, &q, &scale).unwrap();
            assert_eq!((q.kind(), q.device()), (kind, Device::Cpu));
            let scores = q.matmul(&k.transpose(2, 3)).to_kind(Kind::Double);
            assert!((scores.double_value(&[0, 0, 0, 0]) - 2.0).abs() < 2e-2, "{kind:?}");
            assert_eq!(scores.double_value(&[0, 1, 0, 0]), 0.0);
        }
        let one = Tensor::ones([1, 1, 1, 1], (Kind::Double, Device::Cpu));
        let scale = Tensor::full([1, 1, 1], 9.0, (Kind::Double, Device::Cpu));
        let (q, _) = normalized(&one, &one, &scale).unwrap();
        assert!((q.double_value(&[0, 0, 0, 0]) - 100.0).abs() < 1e-9);
    }
}
