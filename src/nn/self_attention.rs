//! Self-attention on a CPU as one node of the autograd graph.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::ffi::{Backward, attach, for_each};

/// Returns whether [`attend`] supports `qkv`: a tensor on a CPU that needs a gradient, in a dtype
/// in which `attend` is as exact as libtorch's own function.
pub(super) fn can_attend(qkv: &Tensor) -> bool {
    let kind_fits = matches!(qkv.kind(), Kind::Float | Kind::Double);
    kind_fits && qkv.device() == Device::Cpu && qkv.requires_grad() && qkv.numel() > 0
}

/// Computes softmax attention between all tokens: `[B, T, 3C] -> [B, T, C]`. The last dimension of
/// `qkv` holds queries, keys and values in thirds; `heads` is the number of heads.
///
/// The forward pass is libtorch's. Backward does not save the output. The softmax gradient needs
/// the row sums of the output times its gradient, and these equal the row sums of the probabilities
/// times their gradient, which backward computes anyway. Backward writes the three gradients into
/// one tensor. libtorch pads each of them with zeros to the size of all three and adds the results.
///
/// # Errors
/// Returns the error that libtorch reports.
pub(super) fn attend(qkv: &Tensor, heads: i64) -> Result<Tensor> {
    let output = tch::no_grad(|| {
        let [q, k, v] = split(qkv, heads)?;
        let (dropout, causal, mask, scale, grouped) =
            (0.0, false, None::<&Tensor>, None::<f64>, false);
        Tensor::f_scaled_dot_product_attention(&q, &k, &v, mask, dropout, causal, scale, grouped)
    })?;
    let output = output.f_transpose(1, 2)?.f_flatten(2, 3)?;
    attach(output, &[qkv], &[qkv], SelfAttention { heads })
}

/// Splits `[B, T, 3C]` into queries, keys and values, each `[B, heads, T, C / heads]`.
fn split(qkv: &Tensor, heads: i64) -> Result<[Tensor; 3], tch::TchError> {
    let thirds = qkv.f_unflatten(-1, [3, heads, -1])?.f_permute([2, 0, 3, 1, 4])?;
    Ok([thirds.f_select(0, 0)?, thirds.f_select(0, 1)?, thirds.f_select(0, 2)?])
}

/// The backward half of [`attend`]. It saves `qkv`.
struct SelfAttention {
    heads: i64,
}

impl Backward for SelfAttention {
    fn backward(
        &self,
        saved: &[Tensor],
        gradient: &Tensor,
        _wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let [qkv] = saved else { return Ok(Vec::new()) };
        let result = qkv.f_empty_like()?;
        let gradient = gradient.f_unflatten(-1, [self.heads, -1])?.f_transpose(1, 2)?;
        let (parts, into) = (split(qkv, self.heads)?, split(&result, self.heads)?);
        let mut samples = Vec::new();
        for sample in 0..qkv.size()[0] {
            let of = |t: &Tensor| t.f_select(0, sample);
            samples.push(Mutex::new(Sample {
                qkv: [of(&parts[0])?, of(&parts[1])?, of(&parts[2])?],
                gradient: of(&gradient)?,
                into: [of(&into[0])?, of(&into[1])?, of(&into[2])?],
                outcome: Ok(()),
            }));
        }
        // Each thread computes whole samples, so that their scores stay in its cache.
        for_each(samples.len(), |index| {
            let mut sample = samples[index].lock().unwrap_or_else(PoisonError::into_inner);
            sample.outcome = tch::no_grad(|| sample.differentiate());
        })?;
        for sample in samples {
            sample.into_inner().unwrap_or_else(PoisonError::into_inner).outcome?;
        }
        Ok(vec![Some(result)])
    }
}

/// One sample of a batch.
struct Sample {
    /// Queries, keys and values, `[heads, T, d]`.
    qkv: [Tensor; 3],
    /// Gradient of the output, `[heads, T, d]`.
    gradient: Tensor,
    /// Views that receive the gradients of queries, keys and values.
    into: [Tensor; 3],
    outcome: Result<(), tch::TchError>,
}

impl Sample {
    /// Computes the gradients. With `P = softmax(s Q K^T)` and `D` the gradient of the output: `dV
    /// = P^T D`, `dP = D V^T`, and the gradient of the scores is `P * (dP - rowsum(P * dP))`.
    fn differentiate(&mut self) -> Result<(), tch::TchError> {
        let ([q, k, v], gradient) = (&self.qkv, &self.gradient);
        let scale = (q.size()[2] as f64).sqrt().recip();
        let turned = |t: &Tensor| t.f_transpose(1, 2);
        let p = q.f_bmm(&turned(k)?)?.f_mul_scalar_(scale)?.f_softmax(-1, q.kind())?;
        let mut dp = gradient.f_bmm(&turned(v)?)?;
        let row_sums = p.f_mul(&dp)?.f_sum_dim_intlist(-1, true, p.kind())?;
        let mut scores = dp.f_sub_(&row_sums)?;
        scores = scores.f_mul_(&p)?.f_mul_scalar_(scale)?;
        self.into[0].f_copy_(&scores.f_bmm(k)?)?;
        self.into[1].f_copy_(&turned(&scores)?.f_bmm(q)?)?;
        self.into[2].f_copy_(&turned(&p)?.f_bmm(gradient)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::InitRng;

    /// Compares with libtorch's own node for several sizes.
    #[test]
    fn equals_libtorchs() {
        let mut rng = InitRng::from_seed(5);
        let mut normal = |shape: &[i64], kind| rng.normal(shape, 1.0).unwrap().to_kind(kind);
        let shapes = [(1, 1, 1, 1), (2, 7, 3, 4), (3, 50, 2, 8), (1, 197, 12, 64), (2, 33, 1, 5)];
        for (batch, tokens, heads, d) in shapes {
            for (kind, bound) in [(Kind::Float, 2e-6), (Kind::Double, 1e-13)] {
                let qkv = normal(&[batch, tokens, 3 * heads * d], kind);
                let probe = normal(&[batch, tokens, heads * d], kind);
                let run = |fused: bool| {
                    let qkv = qkv.copy().set_requires_grad(true);
                    assert!(can_attend(&qkv));
                    let output = if fused {
                        attend(&qkv, heads).unwrap()
                    } else {
                        let [q, k, v] = split(&qkv, heads).unwrap();
                        let none = None::<&Tensor>;
                        let x = Tensor::scaled_dot_product_attention(
                            &q,
                            &k,
                            &v,
                            none,
                            0.0,
                            false,
                            None::<f64>,
                            false,
                        );
                        x.transpose(1, 2).flatten(2, 3)
                    };
                    (&output * &probe).sum(kind).backward();
                    (output.detach(), qkv.grad())
                };
                let ((output, gradient), (expected, expected_gradient)) = (run(true), run(false));
                assert_eq!(output, expected);
                let largest = expected_gradient.abs().max().double_value(&[]).max(1.0);
                let gap = (gradient - expected_gradient).abs().max().double_value(&[]);
                assert!(gap <= bound * largest, "{batch} {tokens} {heads} {d} {kind:?}: {gap}");
            }
        }
    }
}
