//! Weights that are kept in f16 beside activations of another dtype.
//!
//! libtorch's products in f16 have no fast path on a CPU: a step takes ten times as long as in f32.
//! There a backbone keeps its weights in f16, and each is widened for the operation that reads it.

use std::ops::Deref;

use tch::{Kind, Tensor};

use crate::error::Result;

/// Whether an operation on `x` needs a wider `weight`. Other dtypes meet only under autocast, which
/// casts the operands of products, and layer norm accepts f32 weights beside any dtype.
pub(super) fn is_narrower(weight: &Tensor, x: &Tensor) -> bool {
    weight.kind() == Kind::Half && x.kind() != Kind::Half
}

/// `weight` as an operation on `x` reads it.
pub(crate) fn widened(weight: &Tensor, x: &Tensor) -> Result<Tensor> {
    if is_narrower(weight, x) {
        return Ok(weight.f_to_kind(Kind::Float)?);
    }
    Ok(weight.shallow_clone())
}

/// A weight that is no part of a [`Linear`](super::Linear) or a norm: a token, a table, a factor.
/// It is used as the tensor that it holds, by [`Weight::beside`] where it meets activations, and
/// `Clone` shares that tensor.
#[derive(Debug)]
pub struct Weight(pub(crate) Tensor);

impl Weight {
    /// The weight in the dtype that an operation on `x` needs: weights in f16 stand beside
    /// activations in f32 on a CPU.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch cannot allocate the result.
    pub fn beside(&self, x: &Tensor) -> Result<Tensor> {
        widened(self, x)
    }
}

impl Deref for Weight {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.0
    }
}

impl Clone for Weight {
    fn clone(&self) -> Self {
        Weight(self.0.shallow_clone())
    }
}
