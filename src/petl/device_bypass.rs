//! A bypass on any device and in any dtype as one node of the autograd graph, in few operators.
//!
//! On a GPU each operator is a kernel to launch, and the tensors of a bypass are so narrow that the
//! launches weigh more than the arithmetic. Compared with the equations of the bypass:
//!
//! - QuickGELU is one operator, `silu`: with k = 1.702, `silu(k x) = k quick_gelu(x)`. The factor k
//!   is part of the product before it, and 1 / k of the product after it.
//! - The tokens `[B, N, h]` of the patches are an image in channels-last order already. A prefix
//!   token, which only the centre tap reaches, is multiplied into its place beside them.
//! - The up product has its bias and every factor, and one sum adds it to the residual stream: the
//!   stream is rounded once.
//! - Dropout sets the argument of the second QuickGELU to [`DROPPED`], where its value and its slope
//!   are 0, so that backward needs no mask.

use tch::{Kind, Tensor};

use super::fused_bypass::{BypassInput, BypassWeights, RESIDUAL, TOKENS, connect};
use crate::error::{Error, Result};
use crate::ffi::{Backward, add_product, add_scaled, convolution_backward};
use crate::nn::{QUICK_GELU_SLOPE as K, fill_keep_mask};
use crate::seam::TokenLayout;

/// `silu` and its slope are 0 here in every dtype, f16 included.
const DROPPED: f64 = -1e4;

/// Returns `residual + s * Convpass(tokens)` for the samples of the branch, `[B, T, C]`, computed in
/// the dtype `kind`. Without a residual, returns only the second term, in this dtype, for the kept
/// samples.
///
/// # Errors
/// Returns the error that libtorch reports.
pub(super) fn add(
    weights: &BypassWeights,
    input: &BypassInput,
    residual: Option<&Tensor>,
    kind: Kind,
) -> Result<Tensor> {
    // libtorch's own nodes select the samples and convert the dtypes.
    let tokens = input.branch.select(input.tokens)?.f_to_kind(kind)?;
    let mut converted = Vec::with_capacity(6);
    for weight in weights.all() {
        converted.push(weight.f_to_kind(kind)?);
    }
    let shape = [tokens.size()[0], tokens.size()[1], weights.down.0.size()[0]];
    let mask = match input.dropout {
        0.0 => None,
        rate => {
            let mask = tokens.f_new_empty(shape, (Kind::Bool, tokens.device()))?;
            Some(fill_keep_mask(mask, rate)?)
        }
    };
    let bypass = DeviceBypass {
        layout: *input.layout,
        scale: weights.scale * input.branch.scale(),
        kept: (1.0 - input.dropout).recip(),
    };
    let index = residual.and_then(|residual| input.branch.kept_of(residual.size()[0]));
    let (output, saved) = tch::no_grad(|| {
        let hidden = bypass.hidden(&converted, &tokens, mask.as_ref())?;
        let output = bypass.output(&converted, &hidden.up, residual, index)?;
        let Hidden { down, activated, conv, up } = hidden;
        let mut saved = vec![tokens.shallow_clone(), down, activated, conv, up];
        saved.extend([0, 2, 4].map(|matrix| converted[matrix].shallow_clone()));
        saved.extend(index.map(Tensor::shallow_clone));
        Ok::<_, Error>((output, saved))
    })?;
    connect(output, &converted, &tokens, residual, &saved, bypass)
}

/// The backward half of [`add`]. It saves the tokens, the tensors of [`Hidden`] in their order, the
/// three matrices, then the positions of the kept samples if some are dropped.
#[derive(Debug)]
struct DeviceBypass {
    layout: TokenLayout,
    /// s, times the factor of drop path.
    scale: f64,
    /// The factor of what dropout keeps.
    kept: f64,
}

/// Tensors between the projections, `[K, T, h]` for K kept samples.
struct Hidden {
    /// k times the down product.
    down: Tensor,
    /// The activation of `down`, which is k times QuickGELU.
    activated: Tensor,
    /// k times the output of the convolution, or [`DROPPED`].
    conv: Tensor,
    /// The activation of `conv`.
    up: Tensor,
}

/// Views `[.., width]` as a matrix.
fn matrix(x: &Tensor) -> Result<Tensor> {
    let width = x.size().last().copied().unwrap_or_default();
    Ok(x.f_reshape([x.numel() as i64 / width.max(1), width])?)
}

/// Views a tensor that is written to, `[.., width]`, as a matrix over the same memory.
fn rows_of(x: &Tensor) -> Result<Tensor> {
    let width = x.size().last().copied().unwrap_or_default();
    Ok(x.f_view([x.numel() as i64 / width.max(1), width])?)
}

/// Returns the centre tap `[h, h]` of a kernel `[h, h, k, k]`.
pub(super) fn centre(kernel: &Tensor) -> Result<Tensor> {
    let middle = kernel.size()[3] / 2;
    Ok(kernel.f_select(3, middle)?.f_select(2, middle)?)
}

impl DeviceBypass {
    /// Returns the prefix tokens of `x [K, T, h]`, or `None` if there are none.
    fn prefix(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let count = self.layout.prefix;
        Ok(if count > 0 { Some(x.f_narrow(1, 0, count)?) } else { None })
    }

    /// Returns the patches of `x [K, T, h]` as images `[K, rows, cols, h]`, or `None` if there are
    /// none.
    fn patches(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let (count, (rows, cols)) = (self.layout.num_patches(), self.layout.grid);
        if count == 0 {
            return Ok(None);
        }
        Ok(Some(x.f_narrow(1, self.layout.prefix, count)?.f_unflatten(1, [rows, cols])?))
    }

    /// Computes everything before the up product for `tokens [K, T, C]`.
    fn hidden(&self, weights: &[Tensor], tokens: &Tensor, mask: Option<&Tensor>) -> Result<Hidden> {
        let [down_weight, down_bias, kernel, kernel_bias, ..] = weights else { unreachable!() };
        let shape = [tokens.size()[0], tokens.size()[1], down_bias.size()[0]];
        let empty = || tokens.f_new_empty(shape, (tokens.kind(), tokens.device()));
        let down = empty()?;
        let rows = rows_of(&down)?;
        add_product(&rows, (K, down_bias), K, &matrix(tokens)?, &down_weight.f_transpose(0, 1)?)?;
        let activated = down.f_silu()?;
        let conv = empty()?;
        if let (Some(out), Some(x)) = (self.prefix(&conv)?, self.prefix(&activated)?) {
            let tap = centre(kernel)?.f_transpose(0, 1)?.f_expand([shape[0], -1, -1], false)?;
            add_product(&out, (K, kernel_bias), 1.0, &x, &tap)?;
        }
        if let (Some(out), Some(x)) = (self.patches(&conv)?, self.patches(&activated)?) {
            let (image, none) = (x.f_permute([0, 3, 1, 2])?, None::<&Tensor>);
            let padding = [kernel.size()[3] / 2; 2];
            let image = image.f_conv2d(kernel, none, [1; 2], padding, [1; 2], 1)?;
            add_scaled(&out, &image.f_permute([0, 2, 3, 1])?, K, kernel_bias)?;
        }
        let conv = match mask {
            Some(mask) => conv.f_where_scalarother(mask, DROPPED)?,
            None => conv,
        };
        let up = conv.f_silu()?;
        Ok(Hidden { down, activated, conv, up })
    }

    /// Adds the up product of `up [K, T, h]` to the residual stream `[B, T, C]`, at the positions
    /// `index` if only these samples are kept.
    fn output(
        &self,
        weights: &[Tensor],
        up: &Tensor,
        residual: Option<&Tensor>,
        index: Option<&Tensor>,
    ) -> Result<Tensor> {
        let [.., up_weight, up_bias] = weights else { unreachable!() };
        let (factor, up_weight) = (self.up_factor(), up_weight.f_transpose(0, 1)?);
        let shape = [up.size()[0], up.size()[1], up_bias.size()[0]];
        let delta = up.f_new_empty(shape, (up.kind(), up.device()))?;
        add_product(&rows_of(&delta)?, (self.scale, up_bias), factor, &matrix(up)?, &up_weight)?;
        Ok(match (residual, index) {
            (None, _) => delta,
            (Some(residual), None) => residual.f_add(&delta)?.f_to_kind(residual.kind())?,
            (Some(residual), Some(index)) => {
                residual.f_index_add(0, index, &delta.f_to_kind(residual.kind())?)?
            }
        })
    }

    /// The factor of the up product, whose left side is k times the activation.
    fn up_factor(&self) -> f64 {
        self.scale * self.kept / K
    }

    /// Returns k times the gradient of `conv`, from that of the output, `[K T, C]`.
    fn conv_gradient(
        &self,
        gradient: &Tensor,
        conv: &Tensor,
        up_weight: &Tensor,
    ) -> Result<Tensor> {
        let up = conv.f_empty_like()?;
        let rows = rows_of(&up)?;
        add_product(&rows, (0.0, &rows), K * self.up_factor(), gradient, up_weight)?;
        Ok(conv.f_silu_backward(&up)?)
    }

    /// Returns k times the gradient of `down`, and the gradient of the kernel, from k times the
    /// gradient of `conv`.
    fn down_gradient(
        &self,
        gradient: &Tensor,
        [down, activated]: [&Tensor; 2],
        kernel: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let result = down.f_empty_like()?;
        let of_image = match (self.patches(gradient)?, self.patches(activated)?) {
            (Some(gradient), Some(x)) => {
                let [gradient, x] = [gradient.f_permute([0, 3, 1, 2])?, x.f_permute([0, 3, 1, 2])?];
                Some(convolution_backward(&gradient, &x, kernel)?)
            }
            _ => None,
        };
        if let (Some((x, _)), Some(down), Some(out)) =
            (&of_image, self.patches(down)?, self.patches(&result)?)
        {
            let _written = down.f_silu_backward_grad_input(&out, &x.f_permute([0, 2, 3, 1])?)?;
        }
        let kernel_gradient = match of_image {
            Some((_, kernel)) => kernel,
            None => kernel.f_zeros_like()?,
        };
        if let (Some(gradient), Some(x), Some(down), Some(out)) = (
            self.prefix(gradient)?,
            self.prefix(activated)?,
            self.prefix(down)?,
            self.prefix(&result)?,
        ) {
            let (rows, tap) = (matrix(&gradient)?, centre(&kernel_gradient)?);
            add_product(&tap, (1.0, &tap), 1.0, &rows.f_transpose(0, 1)?, &matrix(&x)?)?;
            let x = rows.f_mm(&centre(kernel)?)?.f_view_as(&down)?;
            let _written = down.f_silu_backward_grad_input(&out, &x)?;
        }
        // In the order of memory of the kernel, which is not that of a convolution's gradient.
        let scaled = kernel.f_empty_like()?;
        add_scaled(&scaled, &kernel_gradient, K.recip() - 1.0, &kernel_gradient)?;
        Ok((result, scaled))
    }
}

impl Backward for DeviceBypass {
    fn backward(
        &self,
        saved: &[Tensor],
        gradient: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let [tokens, down, activated, conv, up, down_weight, kernel, up_weight, rest @ ..] = saved
        else {
            unreachable!("{} tensors are saved", saved.len())
        };
        let index = rest.first();
        let kept = match index {
            Some(index) => gradient.f_index_select(0, index)?,
            None => gradient.shallow_clone(),
        };
        let kept = matrix(&kept.f_to_kind(tokens.kind())?)?;
        let over_tokens = |x: &Tensor| x.f_sum_dim_intlist(&[0i64, 1][..], false, None);

        let up_gradient = up_weight.f_empty_like()?;
        let factor = self.up_factor();
        add_product(
            &up_gradient,
            (0.0, &up_gradient),
            factor,
            &kept.f_transpose(0, 1)?,
            &matrix(up)?,
        )?;
        let mut up_bias = kept.f_sum_dim_intlist(&[0i64][..], false, None)?;
        if self.scale != 1.0 {
            up_bias = up_bias.f_mul_scalar_(self.scale)?;
        }
        let conv_gradient = self.conv_gradient(&kept, conv, up_weight)?;
        let (down_gradient, kernel_gradient) =
            self.down_gradient(&conv_gradient, [down, activated], kernel)?;
        // Both gradients have the factor k, which the products and the sums need.
        let rows = matrix(&down_gradient)?;
        let tokens_gradient =
            if wanted[TOKENS] { Some(rows.f_mm(down_weight)?.f_view_as(tokens)?) } else { None };
        let mut gradients = vec![
            Some(rows.f_transpose(0, 1)?.f_mm(&matrix(tokens)?)?),
            Some(over_tokens(&down_gradient)?),
            Some(kernel_gradient),
            Some(over_tokens(&conv_gradient)?),
            Some(up_gradient),
            Some(up_bias),
            tokens_gradient,
        ];
        gradients.extend(wanted.get(RESIDUAL).map(|_| Some(gradient.shallow_clone())));
        Ok(gradients)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn what_is_dropped_has_no_value_and_no_slope() {
        for kind in [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half] {
            let x = Tensor::full([3], DROPPED, (kind, Device::Cpu)).set_requires_grad(true);
            let y = x.silu();
            y.sum(kind).backward();
            for found in [&y, &x.grad()] {
                assert_eq!(found.abs().max().double_value(&[]), 0.0, "{kind:?}: {found:?}");
            }
        }
    }
}
