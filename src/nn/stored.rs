//! Weights in f16 used with activations of another dtype.
//!
//! libtorch has no fast path for products in f16 on a CPU: a step takes ten times as long as in
//! f32. A backbone on a CPU therefore keeps f16 weights in f16 and widens each one for the
//! operation that reads it.

use std::ops::Deref;

use tch::{Kind, Tensor};

use crate::error::Result;

/// Returns whether an operation on `x` needs a wider `weight`. Other pairs of dtypes need no
/// conversion: they occur only under autocast, which casts the operands of products, and layer norm
/// accepts f32 weights with any dtype.
pub(super) fn is_narrower(weight: &Tensor, x: &Tensor) -> bool {
    weight.kind() == Kind::Half && x.kind() != Kind::Half
}

/// Returns `weight` in the dtype that an operation on `x` needs.
pub(crate) fn widened(weight: &Tensor, x: &Tensor) -> Result<Tensor> {
    if is_narrower(weight, x) {
        return Ok(weight.f_to_kind(Kind::Float)?);
    }
    Ok(weight.shallow_clone())
}

/// A weight outside of a [`Linear`](super::Linear) or a norm: a token, a table or a factor. It
/// dereferences to its tensor; [`Weight::beside`] returns it for use with activations. `Clone`
/// shares the tensor.
#[derive(Debug)]
pub struct Weight(pub(crate) Tensor);

impl Weight {
    /// Returns the weight in the dtype that an operation on `x` needs: a weight in f16 is widened
    /// to f32 if `x` is not in f16.
    ///
    /// # Errors
    /// Returns [`Error::Torch`](crate::Error::Torch) if libtorch cannot allocate the result.
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
