//! Convpass: a convolutional bypass of a sub-layer (arXiv 2207.07039, section 3).

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, nn};

use super::device_bypass;
use super::fused_bypass::{self, BypassInput, BypassWeights};
use super::params::{NewVariables, Params};
use super::up_projection::{Scale, UpProjection};
use super::{SubLayers, checks, widths};
use crate::error::{Error, Result};
use crate::ffi::autocast::Autocast;
use crate::nn::{Branch, Init, InitRng, Linear, dropout, quick_gelu};
use crate::seam::{Beside, TokenLayout};

/// The initial values of the middle convolution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConvInit {
    /// The centre tap passes each channel through; all other weights are zero.
    #[default]
    Identity,
    /// Xavier (Glorot) uniform.
    XavierUniform,
}

/// The position of a bypass relative to its sub-layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// Parallel to the sub-layer: `X + f(LN(X)) + s * Convpass(LN(X))`.
    #[default]
    Parallel,
    /// After the sub-layer: `X + Y + s * Convpass(Y)` with `Y = f(LN(X))`.
    Sequential,
}

/// Config of Convpass. The default is the paper's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConvBypassConfig {
    /// h, the number of channels between the 1x1 convolutions.
    pub bottleneck_dim: i64,
    /// Side of the kernel of the middle convolution; odd. A kernel of side 1 does not mix
    /// neighbours; this is the language-oriented bypass of the paper's ablation.
    pub kernel_size: i64,
    /// s, the factor of the output. The paper chooses it for each task from 0.01 to 100.
    pub scale: f64,
    /// Dropout rate before the up convolution, in training.
    pub dropout: f64,
    /// The initial values of the middle convolution.
    pub conv_init: ConvInit,
    /// The sub-layers that get a bypass.
    pub sub_layers: SubLayers,
    /// Whether the bypass is parallel to its sub-layer or after it.
    pub placement: Placement,
}

impl Default for ConvBypassConfig {
    fn default() -> Self {
        ConvBypassConfig {
            bottleneck_dim: 8,
            kernel_size: 3,
            scale: 1.0,
            dropout: 0.1,
            conv_init: ConvInit::Identity,
            sub_layers: SubLayers::Both,
            placement: Placement::Parallel,
        }
    }
}

impl ConvBypassConfig {
    /// Checks that the bypass can be created.
    ///
    /// # Errors
    /// Returns [`Error::Config`] for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("ConvBypassConfig"))
    }

    fn check(&self) -> Result<()> {
        widths::validate("bottleneck_dim", self.bottleneck_dim, &None)?;
        check_kernel("kernel_size", self.kernel_size)?;
        checks::scale(self.scale)?;
        checks::dropout(self.dropout)
    }

    /// Returns the number of weights of one bypass for tokens of width C: `(2h + 1)C + h^2 k^2 +
    /// 2h`.
    pub fn num_params(&self, embed_dim: i64) -> i64 {
        let (h, k) = (self.bottleneck_dim, self.kernel_size);
        let product = |factors: &[i64]| factors.iter().fold(1, |p: i64, &f| p.saturating_mul(f));
        let products: [&[i64]; 4] = [&[2, h, embed_dim], &[embed_dim], &[h, h, k, k], &[2, h]];
        products.into_iter().map(product).fold(0, i64::saturating_add)
    }
}

/// Checks the side of a convolution's kernel.
pub(super) fn check_kernel(field: &str, side: i64) -> Result<()> {
    if !(1..=63).contains(&side) || side % 2 == 0 {
        return Err(Error::config(field, "odd and within 1..=63", side));
    }
    Ok(())
}

/// One bypass: 1x1 convolution `C -> h`, QuickGELU, kxk convolution `h -> h` on the patch grid,
/// QuickGELU, dropout, 1x1 convolution `h -> C`.
///
/// The 1x1 convolutions are stored as matrices, `adapter_down.weight [h, C]` and `adapter_up.weight
/// [C, h]`, as in the published files. `adapter_conv.weight` is `[h, h, k, k]`.
#[derive(Debug)]
pub struct ConvBypass {
    down: Linear,
    conv_weight: Tensor,
    conv_bias: Tensor,
    up: UpProjection,
    dropout: f64,
}

impl ConvBypass {
    /// Creates the six variables of a bypass under `vs`, for tokens of width `embed_dim`. The down
    /// matrix starts Xavier uniform; the up matrix and all biases start at zero. libtorch's
    /// generator (`tch::manual_seed`) supplies the seed.
    ///
    /// # Errors
    /// Returns [`Error::Config`] for an invalid config or width, and [`Error::DuplicateVariable`]
    /// if `vs` already holds a bypass.
    pub fn new(vs: &nn::Path, embed_dim: i64, config: &ConvBypassConfig) -> Result<Self> {
        let rng = &mut InitRng::from_libtorch()?;
        let mut variables = NewVariables { vs, rng, low_bit: Default::default() };
        Self::build(&mut Params::new(&mut variables), embed_dim, config, false)
    }

    /// Creates a bypass like [`ConvBypass::new`]. If `channel_scale`, s is a trained value per
    /// channel.
    pub(super) fn build(
        params: &mut Params,
        embed_dim: i64,
        config: &ConvBypassConfig,
        channel_scale: bool,
    ) -> Result<Self> {
        config.validate()?;
        if !(1..=1 << 16).contains(&embed_dim) {
            return Err(Error::config("embed_dim", "within 1..=65536", embed_dim));
        }
        let (c, h, k) = (embed_dim, config.bottleneck_dim, config.kernel_size);
        let conv = match config.conv_init {
            ConvInit::Identity => Init::IdentityKernel,
            ConvInit::XavierUniform => Init::XavierUniform,
        };
        Ok(ConvBypass {
            down: params.linear("adapter_down", [h, c], Init::XavierUniform)?,
            conv_weight: params.get("adapter_conv.weight", &[h, h, k, k], conv)?,
            conv_bias: params.get("adapter_conv.bias", &[h], Init::Constant(0.0))?,
            up: UpProjection::new(params, "adapter_up", (c, h), config.scale, channel_scale)?,
            dropout: config.dropout,
        })
    }

    /// Computes `s * Convpass(tokens)`: `[B, P + N, C] -> [B, P + N, C]`.
    ///
    /// Each prefix token is convolved as a separate 1x1 image.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the shape of `tokens` does not match `layout`.
    pub fn forward(&self, tokens: &Tensor, layout: &TokenLayout, train: bool) -> Result<Tensor> {
        layout.check(tokens, self.up.weight.size()[0])?;
        let input = BypassInput {
            tokens,
            norm: None,
            layout,
            branch: &Branch::All,
            dropout: if train { self.dropout } else { 0.0 },
        };
        self.add(&input, None)
    }

    /// Returns the input and the output of the kxk convolution on the patches, in evaluation. The
    /// output is taken before its activation. The tokens are `[B, P + N, C]`, and the two maps are
    /// `[B, h, rows, cols]`.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the shape of `tokens` does not match `layout`.
    pub fn maps(&self, tokens: &Tensor, layout: &TokenLayout) -> Result<(Tensor, Tensor)> {
        layout.check(tokens, self.up.weight.size()[0])?;
        let before = quick_gelu(&self.down.forward(tokens)?)?;
        let after = self.convolve(&before, layout)?;
        let grid = |x: &Tensor| -> Result<Tensor> {
            let patches = x.f_narrow(1, layout.prefix, layout.num_patches())?;
            let (rows, cols) = layout.grid;
            Ok(patches.f_unflatten(1, [rows, cols])?.f_permute([0, 3, 1, 2])?)
        };
        Ok((grid(&before)?, grid(&after)?))
    }

    /// Converts this bypass into a tch module for tokens of the layout `layout`.
    pub fn with_layout(self, layout: TokenLayout) -> FixedLayout {
        FixedLayout { bypass: self, layout }
    }

    /// Returns `residual + s * Convpass(normed)` for the kept samples.
    pub(super) fn add_into(&self, residual: &Tensor, at: &Beside) -> Result<Tensor> {
        at.layout.check(at.normed, self.up.weight.size()[0])?;
        if residual.size() != at.normed.size() {
            return Err(Error::Input {
                argument: "residual",
                expected: format!("{:?}, the shape of the tokens", at.normed.size()),
                found: format!("{:?}", residual.size()),
            });
        }
        let input = BypassInput {
            tokens: at.normed,
            norm: at.norm.map(|norm| (at.raw, norm)),
            layout: at.layout,
            branch: at.branch,
            dropout: if at.train { self.dropout } else { 0.0 },
        };
        self.add(&input, Some(residual))
    }

    /// Adds the bypass in the fastest of three ways to compute the same.
    fn add(&self, input: &BypassInput, residual: Option<&Tensor>) -> Result<Tensor> {
        let Some(weights) = self.weights() else { return self.add_plainly(input, residual) };
        if fused_bypass::can_add(&weights, input, residual) {
            return fused_bypass::add(&weights, input, residual);
        }
        let own = input.tokens.kind();
        // Autocast leaves f64 as it is.
        let kind = Autocast::kind(input.tokens.device())?.filter(|_| own != Kind::Double);
        device_bypass::add(&weights, input, residual, kind.unwrap_or(own))
    }

    /// Computes the same with libtorch's operations and their gradients, also if s is trained.
    fn add_plainly(&self, input: &BypassInput, residual: Option<&Tensor>) -> Result<Tensor> {
        let tokens = &input.branch.select(input.tokens)?;
        let hidden = self.hidden(&BypassInput { tokens, ..*input })?;
        match residual {
            Some(residual) => self.up.add_into(residual, &hidden, input.branch),
            None => self.up.forward(&hidden),
        }
    }

    /// Returns the weights, or `None` if s is trained.
    fn weights(&self) -> Option<BypassWeights<'_>> {
        let Scale::Fixed(scale) = self.up.scale else { return None };
        Some(BypassWeights {
            down: (&self.down.weight, self.down.bias.as_ref()?),
            conv: (&self.conv_weight, &self.conv_bias),
            up: (&self.up.weight, &self.up.bias),
            scale,
        })
    }

    /// Computes everything before the up convolution, for all samples: `[B, P + N, C] -> [B, P + N,
    /// h]`.
    fn hidden(&self, input: &BypassInput) -> Result<Tensor> {
        let x = quick_gelu(&self.down.forward(input.tokens)?)?;
        let x = quick_gelu(&self.convolve(&x, input.layout)?)?;
        Ok(if input.dropout > 0.0 { dropout(&x, input.dropout)? } else { x })
    }

    /// Computes the kxk convolution, `[B, P + N, h] -> [B, P + N, h]`. Patches are convolved on
    /// their grid; a prefix token uses only the centre tap.
    fn convolve(&self, x: &Tensor, layout: &TokenLayout) -> Result<Tensor> {
        let (prefix, patches, (rows, cols)) = (layout.prefix, layout.num_patches(), layout.grid);
        let half = self.conv_weight.size()[2] / 2;
        let mut parts = Vec::with_capacity(2);
        if prefix > 0 {
            let centre = device_bypass::centre(&self.conv_weight)?;
            parts.push(x.f_narrow(1, 0, prefix)?.f_linear(&centre, Some(&self.conv_bias))?);
        }
        if patches > 0 {
            // [B, N, h] -> [B, rows, cols, h] -> [B, h, rows, cols]: channels last, no copy.
            let grid = x.f_narrow(1, prefix, patches)?.f_unflatten(1, [rows, cols])?;
            let grid = grid.f_permute([0, 3, 1, 2])?;
            let (stride, padding, dilation, groups) = ([1; 2], [half; 2], [1; 2], 1);
            let grid = grid.f_conv2d(
                &self.conv_weight,
                Some(&self.conv_bias),
                stride,
                padding,
                dilation,
                groups,
            )?;
            parts.push(grid.f_permute([0, 2, 3, 1])?.f_flatten(1, 2)?);
        }
        match &parts[..] {
            [] => Ok(x.shallow_clone()),
            [only] => Ok(only.shallow_clone()),
            _ => Ok(Tensor::f_cat(&parts, 1)?),
        }
    }
}

/// A [`ConvBypass`] for tokens of one layout, as a tch module.
#[derive(Debug)]
pub struct FixedLayout {
    bypass: ConvBypass,
    layout: TokenLayout,
}

impl nn::ModuleT for FixedLayout {
    /// # Panics
    /// Panics if the tokens have another shape, as tch's own modules do.
    fn forward_t(&self, tokens: &Tensor, train: bool) -> Tensor {
        self.bypass.forward(tokens, &self.layout, train).expect("the tokens fit the layout")
    }
}

#[cfg(test)]
mod tests {
    use super::super::fused_bypass::tests::add_with_mask;
    use super::*;
    use crate::seam::{NormOf, Site, SubLayer};
    use proptest::prelude::*;
    use tch::Device;
    use tch::nn::VarStore;

    const F64: (Kind, Device) = (Kind::Double, Device::Cpu);

    /// Creates a bypass in f64 whose six variables are all random.
    fn random_bypass(
        c: i64,
        config: &ConvBypassConfig,
        channel_scale: bool,
        seed: i64,
    ) -> (VarStore, ConvBypass) {
        let mut vs = VarStore::new(Device::Cpu);
        let mut rng = InitRng::from_seed(seed);
        let root = vs.root();
        let mut variables = NewVariables { vs: &root, rng: &mut rng, low_bit: Default::default() };
        let mut params = Params::new(&mut variables);
        let bypass = ConvBypass::build(&mut params, c, config, channel_scale).unwrap();
        vs.double();
        tch::no_grad(|| {
            let mut variables: Vec<_> = vs.variables().into_iter().collect();
            variables.sort_by(|a, b| a.0.cmp(&b.0));
            for (_, mut variable) in variables {
                variable.copy_(&normal(&mut rng, &variable.size(), 0.5));
            }
        });
        (vs, bypass)
    }

    fn normal(rng: &mut InitRng, shape: &[i64], std: f64) -> Tensor {
        rng.draw(Init::Normal { mean: 0.0, std }, shape).unwrap()
    }

    fn tokens(batch: i64, layout: &TokenLayout, c: i64, seed: i64) -> Tensor {
        let shape = [batch, layout.num_tokens(), c];
        normal(&mut InitRng::from_seed(seed), &shape, 1.0).to_kind(Kind::Double)
    }

    /// Computes the equations of the module, one value at a time.
    fn naive(bypass: &ConvBypass, tokens: &Tensor, layout: &TokenLayout) -> Vec<f64> {
        let get = |t: &Tensor| Vec::<f64>::try_from(t.flatten(0, -1)).unwrap();
        let [batch, t, c] = tokens.size()[..] else { panic!("three dimensions") };
        let (h, k) = (bypass.conv_weight.size()[0], bypass.conv_weight.size()[2]);
        let (x, wd, bd) =
            (get(tokens), get(&bypass.down.weight), get(bypass.down.bias.as_ref().unwrap()));
        let (wc, bc) = (get(&bypass.conv_weight), get(&bypass.conv_bias));
        let (wu, bu) = (get(&bypass.up.weight), get(&bypass.up.bias));
        let scale = match &bypass.up.scale {
            Scale::Fixed(scale) => vec![*scale; c as usize],
            Scale::PerChannel(scale) => get(scale),
        };
        let act = |x: f64| x / (1.0 + (-1.702 * x).exp());
        let mut out = Vec::new();
        for b in 0..batch {
            let down = |token: i64, j: i64| {
                let dot: f64 = (0..c)
                    .map(|i| x[((b * t + token) * c + i) as usize] * wd[(j * c + i) as usize])
                    .sum();
                act(dot + bd[j as usize])
            };
            for token in 0..t {
                // The neighbours of this token on its own grid; a prefix token has none.
                let (rows, cols, start) = if token < layout.prefix {
                    (1, 1, token)
                } else {
                    (layout.grid.0, layout.grid.1, layout.prefix)
                };
                let (row, col) = ((token - start) / cols, (token - start) % cols);
                let mut hidden = bc.clone();
                for (dy, dx) in (0..k).flat_map(|dy| (0..k).map(move |dx| (dy, dx))) {
                    let (y, x) = (row + dy - k / 2, col + dx - k / 2);
                    if !(0..rows).contains(&y) || !(0..cols).contains(&x) {
                        continue;
                    }
                    for (o, i) in (0..h).flat_map(|o| (0..h).map(move |i| (o, i))) {
                        let tap = wc[(((o * h + i) * k + dy) * k + dx) as usize];
                        hidden[o as usize] += tap * down(start + y * cols + x, i);
                    }
                }
                for o in 0..c {
                    let up: f64 =
                        (0..h).map(|j| act(hidden[j as usize]) * wu[(o * h + j) as usize]).sum();
                    out.push(scale[o as usize] * (up + bu[o as usize]));
                }
            }
        }
        out
    }

    /// Returns the input of the bypass for these tokens, without dropout.
    fn input<'a>(
        tokens: &'a Tensor,
        layout: &'a TokenLayout,
        branch: &'a Branch,
    ) -> BypassInput<'a> {
        BypassInput { tokens, norm: None, layout, branch, dropout: 0.0 }
    }

    fn max_gap(a: &Tensor, b: &Tensor) -> f64 {
        if a.numel() == 0 { 0.0 } else { (a - b).abs().max().double_value(&[]) }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        #[test]
        fn equals_its_naive_twin_on_any_shape(
            batch in 1i64..3, prefix in 0i64..6, rows in 0i64..5, cols in 1i64..6,
            c in 1i64..10, h in 1i64..6, half in 0i64..3, channel_scale in any::<bool>(),
            seed in any::<i64>(),
        ) {
            prop_assume!(prefix + rows > 0);
            let config = ConvBypassConfig {
                bottleneck_dim: h, kernel_size: 2 * half + 1, scale: 0.7,
                ..ConvBypassConfig::default()
            };
            let layout = TokenLayout { prefix, grid: (rows, cols) };
            let (_vs, bypass) = random_bypass(c, &config, channel_scale, seed);
            let x = tokens(batch, &layout, c, seed ^ 1);
            let expected = Tensor::from_slice(&naive(&bypass, &x, &layout)).view_as(&x);

            let forward = bypass.forward(&x, &layout, false).unwrap();
            prop_assert!(max_gap(&forward, &expected) < 1e-12);

            // The sum with the residual stream has to agree, for all samples and for kept samples.
            let residual = tokens(batch, &layout, c, seed ^ 2);
            let index = Tensor::from_slice(&[batch - 1]);
            let kept = Branch::Kept { index, scale: 1.25, rows: None };
            let mask = Tensor::zeros([batch, 1, 1], F64);
            let _filled = mask.get(batch - 1).fill_(1.25);
            for add in [ConvBypass::add, ConvBypass::add_plainly] {
                let add = |branch| add(&bypass, &input(&x, &layout, branch), Some(&residual)).unwrap();
                prop_assert!(max_gap(&add(&Branch::All), &(&residual + &expected)) < 1e-12);
                prop_assert!(max_gap(&add(&kept), &(&residual + &expected * &mask)) < 1e-12);
            }
        }
    }

    #[test]
    fn maps_are_what_the_forward_pass_goes_through() {
        let config = ConvBypassConfig { bottleneck_dim: 3, scale: 1.5, ..Default::default() };
        let layout = TokenLayout { prefix: 2, grid: (3, 4) };
        let (_vs, bypass) = random_bypass(5, &config, false, 21);
        let x = tokens(2, &layout, 5, 22);
        let (before, after) = bypass.maps(&x, &layout).unwrap();
        assert_eq!((before.size(), after.size()), (vec![2, 3, 3, 4], vec![2, 3, 3, 4]));
        let hidden = quick_gelu(&after).unwrap().permute([0, 2, 3, 1]).flatten(1, 2);
        let patches = bypass.up.forward(&hidden).unwrap();
        let whole = bypass.forward(&x, &layout, false).unwrap();
        assert!(max_gap(&patches, &whole.narrow(1, 2, 12)) < 1e-12);
        assert!(bypass.maps(&x.narrow(1, 0, 13), &layout).is_err());
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        let kept = Branch::Kept { index: Tensor::from_slice(&[1i64]), scale: 1.25, rows: None };
        for channel_scale in [true, false] {
            for (layout, branch) in [
                (TokenLayout { prefix: 2, grid: (3, 2) }, &Branch::All),
                (TokenLayout { prefix: 1, grid: (2, 2) }, &kept),
                (TokenLayout { prefix: 0, grid: (2, 2) }, &Branch::All),
                (TokenLayout { prefix: 3, grid: (0, 0) }, &Branch::All),
            ] {
                check_gradients(channel_scale, layout, branch);
            }
        }
    }

    /// In few bits, with a residual stream of the same dtype and in f32.
    #[test]
    fn few_bits_are_those_of_the_plain_path() {
        let config = ConvBypassConfig { bottleneck_dim: 5, scale: 0.7, ..Default::default() };
        let layout = TokenLayout { prefix: 1, grid: (3, 4) };
        let kept = Branch::Kept { index: Tensor::from_slice(&[2i64, 0]), scale: 1.25, rows: None };
        for (kind, stream) in [
            (Kind::BFloat16, Kind::BFloat16),
            (Kind::BFloat16, Kind::Float),
            (Kind::Half, Kind::Half),
            (Kind::Half, Kind::Float),
        ] {
            for branch in [&Branch::All, &kept] {
                let new = |seed| tokens(3, &layout, 12, seed);
                let run = |kind: Kind, stream: Kind, device: bool| {
                    let (mut vs, bypass) = random_bypass(12, &config, false, 31);
                    vs.set_kind(kind);
                    let x = new(32).to_kind(kind).set_requires_grad(true);
                    let residual = new(33).to_kind(stream).set_requires_grad(true);
                    let (input, weights) = (input(&x, &layout, branch), bypass.weights().unwrap());
                    let sum = if device {
                        device_bypass::add(&weights, &input, Some(&residual), kind)
                    } else {
                        bypass.add_plainly(&input, Some(&residual))
                    };
                    let sum = sum.unwrap();
                    assert_eq!(sum.kind(), stream);
                    (sum.to_kind(Kind::Double) * new(34)).sum(Kind::Double).backward();
                    let mut found = vec![sum, x.grad(), residual.grad()];
                    found.extend(weights.all().map(Tensor::grad));
                    found.into_iter().map(|t| t.detach().to_kind(Kind::Double)).collect::<Vec<_>>()
                };
                let expected = run(Kind::Double, Kind::Double, false);
                let found = run(kind, stream, true);
                for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let gap = max_gap(found, expected) / expected.abs().max().double_value(&[]);
                    let bound = if kind == Kind::Half { 6e-3 } else { 4e-2 };
                    assert!(gap < bound, "{index} in {kind:?} and {stream:?}, {branch:?}: {gap}");
                }
            }
        }
    }

    fn check_gradients(channel_scale: bool, layout: TokenLayout, branch: &Branch) {
        let config = ConvBypassConfig { bottleneck_dim: 3, scale: 1.5, ..Default::default() };
        let (vs, bypass) = random_bypass(5, &config, channel_scale, 11);
        let x = tokens(2, &layout, 5, 12).set_requires_grad(true);
        let residual = tokens(2, &layout, 5, 13);
        let probe = tokens(2, &layout, 5, 14);
        let loss = || {
            let input = input(&x, &layout, branch);
            let sum = bypass.add(&input, Some(&residual)).unwrap();
            (sum * &probe).sum(Kind::Double)
        };
        loss().backward();
        let mut leaves: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
        leaves.push(("tokens".into(), x.shallow_clone()));
        for (name, leaf) in leaves {
            let (gradient, flat) = (leaf.grad().flatten(0, -1), leaf.detach().view(-1));
            for i in 0..flat.size()[0] {
                let (step, centre) = (1e-5, flat.double_value(&[i]));
                let at = |value: f64| {
                    let _filled = flat.get(i).fill_(value);
                    tch::no_grad(loss).double_value(&[])
                };
                let slope = (at(centre + step) - at(centre - step)) / (2.0 * step);
                at(centre);
                let found = gradient.double_value(&[i]);
                assert!((slope - found).abs() < 1e-7 * (1.0 + slope.abs()), "{name}[{i}]");
            }
        }
    }

    /// Runs the bypass in f32 on normed tokens, fused or with libtorch's operations. Returns its
    /// output, then the gradients of the weights in the order of their names, of the raw tokens,
    /// and of the residual stream.
    fn in_f32(case: &Fused, fused: bool) -> Vec<Tensor> {
        let Fused { config, layout, branch, c, seed, normed, batch } = case;
        let (mut vs, bypass) = random_bypass(*c, config, false, *seed);
        vs.float();
        let new = |seed| tokens(*batch, layout, *c, seed).to_kind(Kind::Float);
        let (raw, residual) = (new(1).set_requires_grad(true), new(2).set_requires_grad(true));
        let [weight, bias] = [3, 4].map(|seed| normal(&mut InitRng::from_seed(seed), &[*c], 1.0));
        let of = NormOf { weight: &weight, bias: &bias, eps: 1e-6 };
        let x = raw.layer_norm([*c], Some(&weight), Some(&bias), of.eps, false);
        let norm = normed.then_some((&raw, of));
        let input = BypassInput { norm, ..input(&x, layout, branch) };
        let kept = if matches!(branch, Branch::All) { *batch } else { 1 };
        let shape = [kept, layout.num_tokens(), config.bottleneck_dim];
        let draws = InitRng::from_seed(6).draw(Init::Uniform { bound: 1.0 }, &shape).unwrap();
        let mask = (config.dropout > 0.0).then(|| draws.gt(-0.4).to_kind(Kind::Float) / 0.7);
        let sum = if fused {
            let weights = bypass.weights().unwrap();
            assert!(fused_bypass::can_add(&weights, &input, Some(&residual)));
            add_with_mask(&weights, &input, &residual, mask.as_ref()).unwrap()
        } else {
            let tokens = &input.branch.select(input.tokens).unwrap();
            let hidden = bypass.hidden(&BypassInput { tokens, ..input }).unwrap();
            let hidden = mask.iter().fold(hidden, |hidden, mask| hidden * mask);
            bypass.up.add_into(&residual, &hidden, branch).unwrap()
        };
        (&sum * new(5)).sum(Kind::Float).backward();
        let mut variables: Vec<_> = vs.variables().into_iter().collect();
        variables.sort_by(|a, b| a.0.cmp(&b.0));
        let leaves = variables.into_iter().map(|(_, v)| v).chain([raw, residual]);
        [sum].into_iter().chain(leaves.map(|leaf| leaf.grad())).collect()
    }

    #[derive(Debug)]
    struct Fused {
        config: ConvBypassConfig,
        layout: TokenLayout,
        branch: Branch,
        batch: i64,
        c: i64,
        seed: i64,
        normed: bool,
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        #[test]
        fn fused_equals_the_plain_path(
            batch in 1i64..4, prefix in 0i64..4, rows in 0i64..6, cols in 1i64..6,
            lanes in 1i64..4, h in 1i64..20, half in 0i64..3, all in any::<bool>(),
            dropout in prop_oneof![Just(0.0), Just(0.3)], normed in any::<bool>(),
            seed in any::<i64>(),
        ) {
            prop_assume!(prefix + rows > 0);
            let config = ConvBypassConfig {
                bottleneck_dim: h, kernel_size: 2 * half + 1, scale: 0.7, dropout,
                ..ConvBypassConfig::default()
            };
            let index = Tensor::from_slice(&[batch - 1]);
            let kept = Branch::Kept { index, scale: 1.25, rows: None };
            let branch = if all { Branch::All } else { kept };
            let layout = TokenLayout { prefix, grid: (rows, cols) };
            let case = Fused { config, layout, branch, batch, c: 8 * lanes, seed, normed };
            let (fused, plain) = (in_f32(&case, true), in_f32(&case, false));
            for (index, (fused, plain)) in fused.iter().zip(&plain).enumerate() {
                prop_assert_eq!(fused.size(), plain.size());
                let size = plain.abs().max().double_value(&[]).max(1.0);
                let gap = max_gap(fused, plain) / size;
                prop_assert!(gap < 1e-5, "{} of {:?}: {}", index, case, gap);
            }
        }
    }

    /// The fused path accepts no tensor without values. A batch without samples has to reach the
    /// plain path, and to leave gradients of zero.
    #[test]
    fn a_batch_without_samples_has_gradients_of_zero() {
        let config = ConvBypassConfig { dropout: 0.0, ..Default::default() };
        let layout = TokenLayout { prefix: 1, grid: (2, 3) };
        let (mut vs, bypass) = random_bypass(24, &config, false, 1);
        vs.float();
        let [residual, x] = [2, 3]
            .map(|seed| tokens(0, &layout, 24, seed).to_kind(Kind::Float).set_requires_grad(true));
        let (weights, input) = (bypass.weights().unwrap(), input(&x, &layout, &Branch::All));
        assert!(!fused_bypass::can_add(&weights, &input, Some(&residual)));
        let site = Site { block: 0, sub_layer: SubLayer::Mlp };
        let (layout, branch) = (&layout, &Branch::All);
        let at = Beside { site, raw: &x, normed: &x, norm: None, layout, branch, train: true };
        let sum = bypass.add_into(&residual, &at).unwrap();
        assert_eq!(sum.size(), [0, 7, 24]);
        sum.sum(Kind::Float).backward();
        assert_eq!((x.grad().size(), residual.grad().size()), (sum.size(), sum.size()));
        for (name, variable) in vs.variables() {
            let gradient = variable.grad();
            assert!(
                gradient.defined() && gradient.count_nonzero(None::<i64>).int64_value(&[]) == 0,
                "{name}"
            );
        }
    }

    #[test]
    fn starts_at_zero_with_published_shapes_and_counts() {
        for (conv_init, c, expected) in
            [(ConvInit::Identity, 768, 13_648), (ConvInit::XavierUniform, 1024, 864_000 / 48)]
        {
            let config = ConvBypassConfig { conv_init, ..Default::default() };
            let vs = VarStore::new(Device::Cpu);
            let bypass = ConvBypass::new(&vs.root(), c, &config).unwrap();
            let count: usize = vs.trainable_variables().iter().map(Tensor::numel).sum();
            assert_eq!((count as i64, config.num_params(c)), (expected, expected));

            let layout = TokenLayout { prefix: 1, grid: (4, 4) };
            let x = tokens(2, &layout, c, 3).to_kind(Kind::Float);
            let out = bypass.forward(&x, &layout, true).unwrap();
            assert_eq!(out.count_nonzero(None::<i64>).int64_value(&[]), 0);
        }
    }

    /// Bypasses in f32 use the fused path and those in f64 do not. Both have to return the same
    /// error.
    #[test]
    fn a_layout_that_does_not_fit_is_an_error_on_both_paths() {
        let config = ConvBypassConfig { dropout: 0.0, ..Default::default() };
        let mut wrong = vec![(-1, (2, 3)), (7, (-1, 1)), (7, (-1, -1)), (1, (2, -2))];
        wrong.extend([(0, (2, 2)), (0, (0, 0)), (1, (2, 3)), (5, (1, 0))]);
        wrong.extend([(i64::MAX, (1, 1)), (0, (i64::MAX, i64::MAX)), (4, (1 << 32, 1 << 32))]);
        for kind in [Kind::Float, Kind::Double] {
            let (mut vs, bypass) = random_bypass(8, &config, false, 1);
            if kind == Kind::Float {
                vs.float();
            }
            let fits = TokenLayout { prefix: 0, grid: (2, 3) };
            let x = tokens(2, &fits, 8, 2).to_kind(kind);
            let site = Site { block: 0, sub_layer: SubLayer::Mlp };
            let add = |residual: &Tensor, layout: &TokenLayout| {
                let norm = None;
                let (raw, branch) = (&x, &Branch::All);
                let at = Beside { site, raw, normed: &x, norm, layout, branch, train: false };
                bypass.add_into(residual, &at)
            };
            let weights = bypass.weights().unwrap();
            let input = input(&x, &fits, &Branch::All);
            assert_eq!(fused_bypass::can_add(&weights, &input, None), kind == Kind::Float);
            assert!(add(&x, &fits).is_ok());
            let narrow = x.narrow(1, 0, 5);
            assert!(matches!(add(&narrow, &fits), Err(Error::Input { argument: "residual", .. })));
            for &(prefix, grid) in &wrong {
                let layout = TokenLayout { prefix, grid };
                for found in [bypass.forward(&x, &layout, false), add(&x, &layout)] {
                    assert!(
                        matches!(found, Err(Error::Input { .. })),
                        "{kind:?} {layout:?}: {found:?}"
                    );
                }
                assert!(matches!(bypass.maps(&x, &layout), Err(Error::Input { .. })), "{layout:?}");
            }
            // A grid without patches that has the largest possible number of rows.
            let endless = TokenLayout { prefix: 6, grid: (i64::MAX, 0) };
            let alone = TokenLayout { prefix: 6, grid: (0, 0) };
            let [found, expected] =
                [endless, alone].map(|l| bypass.forward(&x, &l, false).unwrap());
            assert_eq!(found, expected);
            for shape in [&[12, 8][..], &[2, 6, 4], &[2, 6, 8, 1], &[]] {
                let odd = Tensor::zeros(shape, (kind, Device::Cpu));
                let found = bypass.forward(&odd, &fits, false);
                assert!(matches!(found, Err(Error::Input { .. })), "{shape:?}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_told() {
        let vs = VarStore::new(Device::Cpu);
        let new = |config: ConvBypassConfig| ConvBypass::new(&vs.root(), 16, &config);
        let wrong = [
            ConvBypassConfig { kernel_size: 2, ..Default::default() },
            ConvBypassConfig { bottleneck_dim: 0, ..Default::default() },
            ConvBypassConfig { scale: f64::NAN, ..Default::default() },
            ConvBypassConfig { dropout: 1.0, ..Default::default() },
        ];
        for config in wrong {
            assert!(matches!(new(config).unwrap_err(), Error::Config { .. }));
        }
        assert!(ConvBypass::new(&vs.root(), -1, &ConvBypassConfig::default()).is_err());
        let bypass = new(ConvBypassConfig::default()).unwrap();
        let twice = new(ConvBypassConfig::default()).unwrap_err();
        assert!(matches!(twice, Error::DuplicateVariable { .. }), "{twice}");

        let none = Tensor::zeros([2, 0, 16], (Kind::Float, Device::Cpu));
        let out = bypass.forward(&none, &TokenLayout { prefix: 0, grid: (0, 3) }, true).unwrap();
        assert_eq!(out.size(), [2, 0, 16]);
        let x = Tensor::zeros([1, 5, 16], (Kind::Float, Device::Cpu));
        for grid in [(3, 3), (-2, -2), (i64::MAX, 2)] {
            let layout = TokenLayout { prefix: 1, grid };
            assert!(bypass.forward(&x, &layout, false).is_err(), "{grid:?}");
        }
    }
}
