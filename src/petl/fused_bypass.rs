//! A bypass on a CPU as one node of the autograd graph.
//!
//! The arithmetic of [`ConvBypass`](super::ConvBypass)'s operations on tensors, a sample at a time.
//! What it saves for the way back is as narrow as the bottleneck: the tokens that it read are the
//! layer norm of what the backbone saves anyway, and are made from that again.

use std::sync::{Mutex, PoisonError};

use pulp::Arch;
use tch::{Device, Kind, Tensor};

use super::bypass_kernel::{self as kernel, Gradients, Kept, Norm, Packed, Sizes, Stored};
use super::lanes::GROUP;
use crate::error::{Error, Result};
use crate::ffi::{Backward, Fresh, attach, floats, for_each};
use crate::nn::Branch;
use crate::seam::{NormOf, TokenLayout};

/// Beyond this bottleneck libtorch's products are no slower.
const MAX_BOTTLENECK: i64 = 64;

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
    fn all(&self) -> [&'a Tensor; 6] {
        [self.down.0, self.down.1, self.conv.0, self.conv.1, self.up.0, self.up.1]
    }
}

/// What a bypass reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct BypassInput<'a> {
    /// `[B, T, C]`.
    pub(super) tokens: &'a Tensor,
    /// Of which tensor they are the layer norm, and of which one, where that is what they are.
    pub(super) norm: Option<(&'a Tensor, NormOf<'a>)>,
    pub(super) layout: &'a TokenLayout,
    /// The samples that take part.
    pub(super) branch: &'a Branch,
    /// Dropout rate.
    pub(super) dropout: f64,
}

/// Whether [`add`] accepts a bypass of these weights on these tokens: a full convolution over a
/// square odd kernel, and everything in f32 on a CPU.
pub(super) fn can_add(
    weights: &BypassWeights,
    input: &BypassInput,
    residual: Option<&Tensor>,
) -> bool {
    let (h, c) = (weights.down.0.size()[0], weights.down.0.size()[1]);
    let fits = |t: &Tensor| t.kind() == Kind::Float && t.device() == Device::Cpu && t.numel() > 0;
    let norm = input.norm.into_iter().flat_map(|(raw, norm)| [raw, norm.weight, norm.bias]);
    let tensors = weights.all().into_iter().chain([input.tokens]).chain(residual).chain(norm);
    let fits_kernel = c % GROUP as i64 == 0 && h <= MAX_BOTTLENECK && have_shapes(weights, h, c);
    fits_kernel && tensors.into_iter().all(fits)
}

/// Whether the weights are those of a full convolution of h channels between projections of width
/// c; the kernel would read a grouped one wrongly.
fn have_shapes(weights: &BypassWeights, h: i64, c: i64) -> bool {
    let is_full = match weights.conv.0.size()[..] {
        [outputs, inputs, rows, cols] => {
            outputs == h && inputs == h && rows == cols && rows % 2 == 1
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

/// `residual + s * Convpass(tokens)` for the samples of the branch, `[B, T, C]`; without a
/// residual the second term alone, for every sample. Only where [`can_add`].
///
/// # Errors
/// What libtorch says.
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

/// [`add`] with what dropout multiplies the kept samples by, `[K, T, h]`.
fn add_masked(
    weights: &BypassWeights,
    input: &BypassInput,
    residual: Option<&Tensor>,
    samples: Samples,
    mask: Option<Tensor>,
) -> Result<Tensor> {
    let (output, backward, saved) =
        tch::no_grad(|| forward(weights, input, residual, samples, mask))?;
    let inputs: Vec<&Tensor> =
        weights.all().into_iter().chain([input.tokens]).chain(residual).collect();
    if inputs.iter().any(|tensor| tensor.requires_grad()) {
        attach(output, &inputs, &saved.iter().collect::<Vec<_>>(), backward)
    } else {
        Ok(output)
    }
}

/// The output, and what the way back needs of this pass.
fn forward(
    weights: &BypassWeights,
    input: &BypassInput,
    residual: Option<&Tensor>,
    samples: Samples,
    mask: Option<Tensor>,
) -> Result<(Tensor, FusedBypass, Vec<Tensor>)> {
    let (rows, cols) = input.layout.grid;
    let sizes = Sizes {
        prefix: input.layout.prefix as usize,
        grid: (rows as usize, cols as usize),
        c: weights.down.0.size()[1] as usize,
        h: weights.down.0.size()[0] as usize,
        k: weights.conv.0.size()[2] as usize,
    };
    let scale = (weights.scale * input.branch.scale()) as f32;
    let packed = pack(weights, &sizes, scale)?;
    let tokens = input.tokens.f_contiguous()?;
    let residual = residual.map(|residual| residual.f_contiguous()).transpose()?;

    let narrow = |width: usize| [samples.kept, sizes.tokens(), width].map(|n| n as i64);
    let mut output = Fresh::new(&tokens.size())?;
    let [mut down, mut conv] =
        [Fresh::new(&narrow(sizes.width()))?, Fresh::new(&narrow(sizes.width()))?];
    {
        let batch = samples.slots.len();
        let (tokens, residual) = (floats(&tokens), residual.as_ref().map(floats));
        let masks = mask.as_ref().map(floats);
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
            let mask = masks.map(|masks| sample_of(masks, slot, samples.kept));
            let tokens = sample_of(tokens, sample, batch);
            let kept = Kept { down, conv };
            let (sizes, weights) = (&sizes, &packed);
            let forward = kernel::Forward { sizes, weights, tokens, residual, mask, output, kept };
            Arch::new().dispatch(forward);
        })?;
    }
    let (output, down, conv) = (output.done(), down.done(), conv.done());
    let mut saved = vec![down, conv];
    let (has_mask, eps) = (mask.is_some(), input.norm.map(|(_, norm)| norm.eps as f32));
    saved.extend(mask);
    match input.norm {
        None => saved.push(tokens),
        Some((raw, norm)) => {
            saved.push(raw.f_contiguous()?);
            saved.extend([norm.weight.f_contiguous()?, norm.bias.f_contiguous()?]);
        }
    }
    Ok((output, FusedBypass { sizes, packed, scale, samples, has_mask, eps }, saved))
}

/// What dropout multiplies by, drawn as libtorch's own dropout draws it.
fn mask(shape: &[i64], rate: f64) -> Result<Option<Tensor>> {
    if rate == 0.0 {
        return Ok(None);
    }
    let mut mask = Tensor::f_empty(shape, (Kind::Float, Device::Cpu))?;
    let _drawn = mask.f_bernoulli_float_(1.0 - rate)?;
    Ok(Some(mask.f_div_scalar_(1.0 - rate)?))
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

/// The samples of a batch that take part.
#[derive(Debug)]
struct Samples {
    /// For each of the batch, its number among those that do.
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
                        expected: format!("positions within 0..{batch}, each once"),
                        found: sample.to_string(),
                    });
                }
            }
        }
        Ok(Samples { slots, kept: index.len() })
    }
}

/// One thread's part of an output at a time.
type Share<'a> = Mutex<&'a mut [f32]>;

fn shares(all: &mut [f32], count: usize) -> Vec<Share<'_>> {
    let length = (all.len() / count.max(1)).max(1);
    all.chunks_exact_mut(length).map(Mutex::new).collect()
}

fn lock<'a, 'b>(share: &'b Share<'a>) -> std::sync::MutexGuard<'b, &'a mut [f32]> {
    share.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The numbers of one of `count` samples.
fn sample_of(all: &[f32], sample: usize, count: usize) -> &[f32] {
    let length = all.len() / count;
    &all[sample * length..][..length]
}

/// The way back. Saved are the two [`Kept`], the mask if there is one, and the tokens; where those
/// are from before the norm, its weight and bias too.
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
        let mut tokens =
            if wanted[Self::TOKENS] { Some(Fresh::new(&gradient.size())?) } else { None };
        self.run(saved, floats(&contiguous), &mut parts, tokens.as_mut())?;
        let mut gradients: Vec<_> = self.unpack(&parts.done())?.into_iter().map(Some).collect();
        gradients.push(tokens.map(Fresh::done));
        gradients.extend(wanted.get(Self::RESIDUAL).map(|_| Some(gradient.shallow_clone())));
        Ok(gradients)
    }
}

impl FusedBypass {
    /// Where the tokens stand among the inputs, after the six weights, and the residual.
    const TOKENS: usize = 6;
    const RESIDUAL: usize = 7;

    /// Fills `parts`, each kept sample's gradients of the weights, and `token_gradients`.
    fn run(
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
            Arch::new().dispatch(kernel::Backward {
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

    /// The sum of `parts` as the gradients of the six weights, in their shapes.
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

    /// [`add`] with a mask of the caller's: libtorch's generator is the whole process's, and other
    /// tests draw from it meanwhile.
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
}
