//! A bypass on a CPU as one node of the autograd graph.
//!
//! The result equals that of the tensor operations of [`ConvBypass`](super::ConvBypass), computed
//! one sample at a time. The tensors that it saves for backward are as narrow as the bottleneck.
//! The input tokens are not saved if they are the layer norm of a tensor that the backbone saves
//! anyway; backward recomputes them.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use super::bypass_kernel::{self as kernel, Gradients, Kept, Norm, Packed, Sizes, Stored};
use super::lanes::{GROUP, dispatch};
use crate::error::{Error, Result};
use crate::ffi::{Backward, Fresh, attach, floats, for_each};
use crate::nn::{Branch, fill_dropout_mask};
use crate::seam::{NormOf, TokenLayout};

/// The widest bottleneck to accept. With a wider one, libtorch's matrix products are at least as
/// fast.
const MAX_BOTTLENECK: i64 = 64;
/// The largest number of pairs of a token and a tap. The kernel lists each pair in 12 bytes.
const MAX_TAPS: i64 = 1 << 24;

/// The weights of a bypass.
#[derive(Clone, Copy, Debug)]
pub(super) struct BypassWeights<'a> {
    /// `[h, C]`, `[h]`.
    pub(super) down: (&'a Tensor, &'a Tensor),
    /// `[h, h, k, k]`, `[h]`.
    pub(super) conv: (&'a Tensor, &'a Tensor),
    /// `[C, h]`, `[C]`.
    pub(super) up: (&'a Tensor, &'a Tensor),
    /// s.
    pub(super) scale: f64,
}

impl<'a> BypassWeights<'a> {
    pub(super) fn all(&self) -> [&'a Tensor; 6] {
        [self.down.0, self.down.1, self.conv.0, self.conv.1, self.up.0, self.up.1]
    }
}

/// The input of a bypass.
#[derive(Clone, Copy, Debug)]
pub(super) struct BypassInput<'a> {
    /// `[B, T, C]`.
    pub(super) tokens: &'a Tensor,
    /// `Some((x, norm))` if `tokens == norm(x)`; backward then recomputes `tokens` instead of
    /// saving them.
    pub(super) norm: Option<(&'a Tensor, NormOf<'a>)>,
    /// The order of the tokens. The caller checks it.
    pub(super) layout: &'a TokenLayout,
    /// The samples that the bypass is computed for.
    pub(super) branch: &'a Branch,
    /// Dropout rate.
    pub(super) dropout: f64,
}

/// Returns whether [`add`] supports these weights and tokens. It needs a full convolution with a
/// square odd kernel, and every tensor in f32 on a CPU.
pub(super) fn can_add(
    weights: &BypassWeights,
    input: &BypassInput,
    residual: Option<&Tensor>,
) -> bool {
    let &[h, c] = &weights.down.0.size()[..] else { return false };
    let fits = |t: &Tensor| t.kind() == Kind::Float && t.device() == Device::Cpu && t.numel() > 0;
    let norm = input.norm.into_iter().flat_map(|(raw, norm)| [raw, norm.weight, norm.bias]);
    let tensors = weights.all().into_iter().chain([input.tokens]).chain(residual).chain(norm);
    c % GROUP as i64 == 0
        && h <= MAX_BOTTLENECK
        && have_shapes(weights, h, c)
        && input.norm.is_none_or(|norm| is_norm_of(norm, input.tokens, c))
        && input.layout.num_tokens() <= MAX_TAPS / weights.conv.0.size()[2].pow(2)
        && tensors.into_iter().all(fits)
}

/// Returns whether the weights have the shapes of a full convolution of h channels between
/// projections of width c. The kernel would read the weight of a grouped convolution wrongly.
fn have_shapes(weights: &BypassWeights, h: i64, c: i64) -> bool {
    let is_full = match weights.conv.0.size()[..] {
        [outputs, inputs, rows, cols] => {
            (outputs, inputs) == (h, h) && rows == cols && rows % 2 == 1
        }
        _ => false,
    };
    let is_vector = |bias: &Tensor, width: i64| bias.size() == [width];
    is_full
        && weights.up.0.size() == [c, h]
        && is_vector(weights.down.1, h)
        && is_vector(weights.conv.1, h)
        && is_vector(weights.up.1, c)
}

/// Returns whether the shapes of `tokens` and `raw` fit a norm over c channels.
fn is_norm_of((raw, norm): (&Tensor, NormOf), tokens: &Tensor, c: i64) -> bool {
    raw.size() == tokens.size() && norm.weight.size() == [c] && norm.bias.size() == [c]
}

/// Returns `residual + s * Convpass(tokens)` for the samples of the branch, `[B, T, C]`. Without a
/// residual, returns only the second term, for every sample. [`can_add`] has to be true.
///
/// # Errors
/// Returns the error that libtorch reports.
pub(super) fn add(
    weights: &BypassWeights,
    input: &BypassInput,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let samples = Samples::new(input.branch, input.tokens.size()[0] as usize)?;
    let shape = [samples.kept as i64, input.tokens.size()[1], weights.down.0.size()[0]];
    let mask = mask(&shape, input.dropout)?;
    add_masked(weights, input, residual, samples, mask)
}

/// [`add`] with a given dropout mask `[K, T, h]`, the factors of the kept samples.
fn add_masked(
    weights: &BypassWeights,
    input: &BypassInput,
    residual: Option<&Tensor>,
    samples: Samples,
    mask: Option<Tensor>,
) -> Result<Tensor> {
    let (output, backward, saved) =
        tch::no_grad(|| forward(weights, input, residual, samples, mask))?;
    connect(output, weights.all(), input.tokens, residual, &saved, backward)
}

/// The index of the tokens among the inputs of the node of a bypass, after the six weights, and the
/// index of the residual.
pub(super) const TOKENS: usize = 6;
pub(super) const RESIDUAL: usize = 7;

/// Makes `output` the result of a bypass in the autograd graph if one of its inputs requires a
/// gradient.
pub(super) fn connect<'a>(
    output: Tensor,
    weights: impl IntoIterator<Item = &'a Tensor>,
    tokens: &'a Tensor,
    residual: Option<&'a Tensor>,
    saved: &[Tensor],
    backward: impl Backward,
) -> Result<Tensor> {
    let inputs: Vec<&Tensor> = weights.into_iter().chain([tokens]).chain(residual).collect();
    if inputs.iter().any(|tensor| tensor.requires_grad()) {
        attach(output, &inputs, &saved.iter().collect::<Vec<_>>(), backward)
    } else {
        Ok(output)
    }
}

/// Computes the output of the bypass. Returns it with the node that computes the gradients and the
/// tensors that the node saves.
fn forward(
    weights: &BypassWeights,
    input: &BypassInput,
    residual: Option<&Tensor>,
    samples: Samples,
    mask: Option<Tensor>,
) -> Result<(Tensor, FusedBypass, Vec<Tensor>)> {
    let sizes = sizes(weights, input.layout);
    let scale = (weights.scale * input.branch.scale()) as f32;
    let packed = pack(weights, &sizes, scale)?;
    let (has_mask, eps) = (mask.is_some(), input.norm.map(|(_, norm)| norm.eps as f32));
    let bypass = FusedBypass { sizes, packed, scale, samples, has_mask, eps };

    let tokens = input.tokens.f_contiguous()?;
    let residual = residual.map(|residual| residual.f_contiguous()).transpose()?;
    let (output, kept) = bypass.run_forward(&tokens, residual.as_ref(), mask.as_ref())?;
    let mut saved = Vec::from(kept);
    saved.extend(mask);
    match input.norm {
        None => saved.push(tokens),
        Some((raw, norm)) => {
            saved.push(raw.f_contiguous()?);
            saved.extend([norm.weight.f_contiguous()?, norm.bias.f_contiguous()?]);
        }
    }
    Ok((output, bypass, saved))
}

fn sizes(weights: &BypassWeights, layout: &TokenLayout) -> Sizes {
    let (rows, cols) = layout.grid;
    Sizes {
        prefix: layout.prefix as usize,
        grid: (rows as usize, cols as usize),
        c: weights.down.0.size()[1] as usize,
        h: weights.down.0.size()[0] as usize,
        k: weights.conv.0.size()[2] as usize,
    }
}

/// Draws a dropout mask in the same way as libtorch's own dropout.
fn mask(shape: &[i64], rate: f64) -> Result<Option<Tensor>> {
    if rate == 0.0 {
        return Ok(None);
    }
    let mask = Tensor::f_empty(shape, (Kind::Float, Device::Cpu))?;
    fill_dropout_mask(mask, rate).map(Some)
}

fn pack(weights: &BypassWeights, sizes: &Sizes, scale: f32) -> Result<Packed> {
    let mut tensors = Vec::with_capacity(6);
    for tensor in weights.all() {
        tensors.push(tensor.f_contiguous()?);
    }
    let values = |index: usize| floats(&tensors[index]);
    let stored = Stored {
        down: values(0),
        down_bias: values(1),
        conv: values(2),
        conv_bias: values(3),
        up: values(4),
        up_bias: values(5),
    };
    Ok(Packed::new(sizes, &stored, scale))
}

/// The samples of a batch that the bypass is computed for.
#[derive(Debug)]
struct Samples {
    /// For each sample of the batch, its index among the kept samples, or `None` if it is dropped.
    slots: Vec<Option<usize>>,
    kept: usize,
}

impl Samples {
    fn new(branch: &Branch, batch: usize) -> Result<Self> {
        let Branch::Kept { index, .. } = branch else {
            return Ok(Samples { slots: (0..batch).map(Some).collect(), kept: batch });
        };
        let index = Vec::<i64>::try_from(index.f_to_kind(Kind::Int64)?)?;
        let mut slots = vec![None; batch];
        for (slot, &sample) in index.iter().enumerate() {
            let place = usize::try_from(sample).ok().and_then(|sample| slots.get_mut(sample));
            match place {
                Some(place) if place.is_none() => *place = Some(slot),
                _ => {
                    return Err(Error::Input {
                        argument: "branch",
                        expected: format!("positions within 0..{batch}, each at most once"),
                        found: sample.to_string(),
                    });
                }
            }
        }
        Ok(Samples { slots, kept: index.len() })
    }
}

/// The part of an output that one thread writes at a time.
type Share<'a> = Mutex<&'a mut [f32]>;

fn shares(all: &mut [f32], count: usize) -> Vec<Share<'_>> {
    let length = (all.len() / count.max(1)).max(1);
    all.chunks_exact_mut(length).map(Mutex::new).collect()
}

fn lock<'a, 'b>(share: &'b Share<'a>) -> std::sync::MutexGuard<'b, &'a mut [f32]> {
    share.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the values of one of `count` samples.
fn sample_of(all: &[f32], sample: usize, count: usize) -> &[f32] {
    let length = all.len() / count;
    &all[sample * length..][..length]
}

/// The backward half of [`add`]. It saves the two tensors of [`Kept`], then the mask if there is
/// one, then the tokens. If the saved tokens are those before the norm, it also saves the weight
/// and bias of the norm.
#[derive(Debug)]
struct FusedBypass {
    sizes: Sizes,
    packed: Packed,
    scale: f32,
    samples: Samples,
    has_mask: bool,
    eps: Option<f32>,
}

impl Backward for FusedBypass {
    fn backward(
        &self,
        saved: &[Tensor],
        gradient: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let FusedBypass { sizes, samples, .. } = self;
        let contiguous = gradient.f_contiguous()?;
        let shape = [samples.kept as i64, sizes.num_gradients() as i64];
        let mut parts = Fresh::new(&shape)?;
        let mut tokens = if wanted[TOKENS] { Some(Fresh::new(&gradient.size())?) } else { None };
        self.run_backward(saved, floats(&contiguous), &mut parts, tokens.as_mut())?;
        let mut gradients: Vec<_> = self.unpack(&parts.done())?.into_iter().map(Some).collect();
        gradients.push(tokens.map(Fresh::done));
        gradients.extend(wanted.get(RESIDUAL).map(|_| Some(gradient.shallow_clone())));
        Ok(gradients)
    }
}

impl FusedBypass {
    /// Returns the output and the two tensors of [`Kept`] for all kept samples.
    fn run_forward(
        &self,
        tokens: &Tensor,
        residual: Option<&Tensor>,
        mask: Option<&Tensor>,
    ) -> Result<(Tensor, [Tensor; 2])> {
        let FusedBypass { sizes, packed, samples, .. } = self;
        let batch = samples.slots.len();
        let narrow = [samples.kept, sizes.tokens(), sizes.width()].map(|n| n as i64);
        let mut output = Fresh::new(&tokens.size())?;
        let [mut down, mut conv] = [Fresh::new(&narrow)?, Fresh::new(&narrow)?];
        {
            let (tokens, residual, masks) =
                (floats(tokens), residual.map(floats), mask.map(floats));
            let outputs = shares(output.floats(), batch);
            let (downs, convs) =
                (shares(down.floats(), samples.kept), shares(conv.floats(), samples.kept));
            for_each(batch, |sample| {
                let output = &mut **lock(&outputs[sample]);
                let residual = residual.map(|residual| sample_of(residual, sample, batch));
                let Some(slot) = samples.slots[sample] else {
                    return output.copy_from_slice(residual.unwrap_or(&[]));
                };
                let (down, conv) = (&mut **lock(&downs[slot]), &mut **lock(&convs[slot]));
                dispatch(kernel::Forward {
                    sizes,
                    weights: packed,
                    tokens: sample_of(tokens, sample, batch),
                    residual,
                    mask: masks.map(|masks| sample_of(masks, slot, samples.kept)),
                    output,
                    kept: Kept { down, conv },
                });
            })?;
        }
        Ok((output.done(), [down.done(), conv.done()]))
    }

    /// Writes the gradients of the weights, one part per kept sample, to `parts`, and the gradients
    /// of the tokens to `token_gradients`.
    fn run_backward(
        &self,
        saved: &[Tensor],
        gradient: &[f32],
        parts: &mut Fresh,
        token_gradients: Option<&mut Fresh>,
    ) -> Result<()> {
        let FusedBypass { sizes, packed, samples, .. } = self;
        let (kept, saved) = saved.split_at(2);
        let (mask, saved) = saved.split_at(usize::from(self.has_mask));
        let norm =
            self.eps.map(|eps| Norm { weight: floats(&saved[1]), bias: floats(&saved[2]), eps });
        let (down, conv, tokens) = (floats(&kept[0]), floats(&kept[1]), floats(&saved[0]));
        let mask = mask.first().map(floats);
        let batch = samples.slots.len();
        let parts = shares(parts.floats(), samples.kept);
        let token_gradients = token_gradients.map(|gradients| shares(gradients.floats(), batch));
        for_each(batch, |sample| {
            let mut token_gradient = token_gradients.as_ref().map(|all| lock(&all[sample]));
            let token_gradient = token_gradient.as_mut().map(|share| &mut ***share);
            let Some(slot) = samples.slots[sample] else {
                return token_gradient.into_iter().for_each(|gradient| gradient.fill(0.0));
            };
            let part = &mut **lock(&parts[slot]);
            part.fill(0.0);
            let of = |all| sample_of(all, slot, samples.kept);
            dispatch(kernel::Backward {
                sizes,
                weights: packed,
                norm,
                tokens: sample_of(tokens, sample, batch),
                mask: mask.map(of),
                kept: Kept { down: of(down), conv: of(conv) },
                gradient: sample_of(gradient, sample, batch),
                token_gradient,
                gradients: Gradients::split(sizes, part),
            });
        })
    }

    /// Sums `parts` over the samples and returns the gradients of the six weights in their shapes.
    fn unpack(&self, parts: &Tensor) -> Result<[Tensor; 6]> {
        let (h, w, c) = (self.sizes.h as i64, self.sizes.width() as i64, self.sizes.c as i64);
        let lengths = self.sizes.gradient_parts().map(|length| length as i64);
        let (k, scale) = (self.sizes.k as i64, f64::from(self.scale));
        let sum = parts.f_sum_dim_intlist(0, false, Kind::Float)?;
        let parts = sum.f_split_with_sizes(lengths, 0)?;
        let matrix = |part: &Tensor| part.f_view([w, c])?.f_narrow(0, 0, h);
        // [k * k, w inputs, w outputs] -> [h outputs, h inputs, k, k]
        let taps = parts[2].f_view([k * k, w, w])?.f_narrow(1, 0, h)?.f_narrow(2, 0, h)?;
        let taps = taps.f_permute([2, 1, 0])?.f_reshape([h, h, k, k])?;
        Ok([
            matrix(&parts[0])?,
            parts[1].f_narrow(0, 0, h)?,
            taps,
            parts[3].f_narrow(0, 0, h)?,
            matrix(&parts[4])?.f_transpose(0, 1)?.f_mul_scalar(scale)?,
            parts[5].f_mul_scalar(scale)?,
        ])
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// [`add`] with a mask from the caller. The whole process shares libtorch's generator, so other
    /// tests may draw from it at the same time.
    pub(crate) fn add_with_mask(
        weights: &BypassWeights,
        input: &BypassInput,
        residual: &Tensor,
        mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let samples = Samples::new(input.branch, input.tokens.size()[0] as usize)?;
        add_masked(weights, input, Some(residual), samples, mask.map(Tensor::shallow_clone))
    }

    #[test]
    fn the_mask_is_dropouts() {
        assert!(mask(&[2, 3], 0.0).unwrap().is_none());
        let mask = mask(&[100, 100], 0.25).unwrap().unwrap();
        let (zeros, kept) = (mask.eq(0.0), mask.eq(f64::from(1.0f32 / 0.75)));
        assert_eq!(zeros.logical_or(&kept).all().int64_value(&[]), 1);
        let share = kept.to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
        assert!((share - 0.75).abs() < 0.03, "{share}");
    }

    /// The kernel would read weights of these shapes wrongly, without an error. `can_add` must
    /// return false, so that the plain path handles or rejects them. The shapes are wrong for a
    /// bypass of `[h, C]` = `[4, 8]` with a 3x3 kernel.
    #[test]
    fn weights_of_other_shapes_are_not_accepted() {
        let new = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let full: [&[i64]; 6] = [&[4, 8], &[4], &[4, 4, 3, 3], &[4], &[8, 4], &[8]];
        let accepts = |shapes: [&[i64]; 6], raw: &[i64], grid: (i64, i64)| {
            let [a, b, c, d, e, f] = shapes.map(new);
            let weights =
                BypassWeights { down: (&a, &b), conv: (&c, &d), up: (&e, &f), scale: 1.0 };
            let (raw, weight) = (new(raw), new(&[8]));
            let norm = NormOf { weight: &weight, bias: &weight, eps: 1e-6 };
            let input = BypassInput {
                tokens: &new(&[1, 5, 8]),
                norm: Some((&raw, norm)),
                layout: &TokenLayout { prefix: 1, grid },
                branch: &Branch::All,
                dropout: 0.0,
            };
            can_add(&weights, &input, None)
        };
        let (raw, grid) = ([1, 5, 8], (2, 2));
        assert!(accepts(full, &raw, grid));
        let others: [(usize, &[i64]); 10] = [
            (0, &[4]),
            (1, &[8]),
            (2, &[4, 2, 3, 3]),
            (2, &[4, 1, 3, 3]),
            (2, &[4, 4, 3, 1]),
            (2, &[4, 4, 2, 2]),
            (2, &[4, 4, 9]),
            (3, &[1]),
            (4, &[4, 8]),
            (5, &[4]),
        ];
        for (place, shape) in others {
            let mut shapes = full;
            shapes[place] = shape;
            assert!(!accepts(shapes, &raw, grid), "weight {place} of shape {shape:?}");
        }
        assert!(!accepts(full, &[1, 4, 8], grid), "tokens that the norm did not give");
        assert!(!accepts(full, &raw, (1 << 20, 1 << 20)), "a list of taps beyond memory");
    }
}
