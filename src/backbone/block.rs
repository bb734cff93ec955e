//! A pre-norm block, and the method's places around its layers.

use tch::Tensor;

use super::weights::Weights;
use crate::error::Result;
use crate::ffi::untouched;
use crate::nn::{
    Attention, Branch, DropPath, LayerNorm, Linear, Mlp, MlpActivation, WindowBias, Windows,
};
use crate::seam::{Beside, Layer, NormOf, Seam, Site, SubLayer, TokenLayout};

#[derive(Debug)]
pub(super) struct Block {
    norm1: LayerNorm,
    /// The windows that attention is within; none where it is to all tokens.
    windows: Option<WindowBias>,
    attention: Attention,
    scale1: Option<Tensor>,
    norm2: LayerNorm,
    mlp: Mlp,
    scale2: Option<Tensor>,
}

/// The method's places at the layers.
#[derive(Clone, Copy)]
pub struct Hooks<'a> {
    pub(super) method: &'a dyn Seam,
    pub(super) train: bool,
}

impl Hooks<'_> {
    pub(super) fn after(&self, layer: Layer, input: &Tensor, output: Tensor) -> Result<Tensor> {
        self.method.after_layer(layer, input, output, self.train)
    }

    pub(super) fn linear(&self, layer: Layer, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        self.after(layer, x, linear.forward(x)?)
    }

    pub(super) fn norm(&self, layer: Layer, norm: &LayerNorm, x: &Tensor) -> Result<Tensor> {
        self.after(layer, x, norm.forward(x)?)
    }

    /// As [`Hooks::norm`] of a norm in numbers beside those of `x`, and that norm itself where the
    /// method left its output alone.
    fn norm_of<'n>(
        &self,
        layer: Layer,
        norm: &'n LayerNorm,
        x: &Tensor,
    ) -> Result<(Tensor, Option<NormOf<'n>>)> {
        let output = norm.apply(x)?;
        let normed = self.after(layer, x, output.shallow_clone())?;
        let LayerNorm { weight, bias, eps } = norm;
        let of = untouched(&normed, &output).then_some(NormOf { weight, bias, eps: *eps });
        Ok((normed, of))
    }
}

/// What a block needs to know of the pass it is in.
pub(super) struct Run<'a> {
    pub(super) index: usize,
    pub(super) layout: TokenLayout,
    pub(super) class_only: bool,
    pub(super) drop_path: DropPath,
    pub(super) hooks: Hooks<'a>,
}

impl Run<'_> {
    /// What a sub-layer reads of the `input` for it.
    fn before(&self, sub_layer: SubLayer, input: Tensor) -> Result<Tensor> {
        let site = Site { block: self.index, sub_layer };
        self.hooks.method.before_sub_layer(site, input, self.hooks.train)
    }
}

impl Block {
    /// `[B, T, C] -> [B, T, C]`, or `[B, 1, C]` where the class token alone is read later.
    pub(super) fn forward(&self, tokens: Tensor, run: &Run) -> Result<Tensor> {
        let (mut tokens, mut layout) = (tokens, run.layout);
        let norm1 = self.norm1.beside(&tokens)?;
        let (normed, norm) = run.hooks.norm_of(Layer::Norm1(run.index), &norm1, &tokens)?;
        let mut beside = normed.shallow_clone();
        if run.class_only {
            layout = TokenLayout { prefix: 1, grid: (0, 0) };
            tokens = tokens.f_narrow(1, 0, 1)?;
            beside = normed.f_narrow(1, 0, 1)?;
        }
        let tokens =
            self.sub_layer(SubLayer::Attention, tokens, (&beside, norm), &layout, run, |branch| {
                self.attend(&branch.select(&normed)?, run)
            })?;
        let norm2 = self.norm2.beside(&tokens)?;
        let (normed, norm) = run.hooks.norm_of(Layer::Norm2(run.index), &norm2, &tokens)?;
        self.sub_layer(SubLayer::Mlp, tokens, (&normed, norm), &layout, run, |branch| {
            let (fc1, fc2) = (Layer::Fc1(run.index), Layer::Fc2(run.index));
            let x = run.before(SubLayer::Mlp, branch.select(&normed)?)?;
            let x = run.hooks.linear(fc1, &self.mlp.fc1, &x)?;
            run.hooks.linear(fc2, &self.mlp.fc2, &self.mlp.activate(&x)?)
        })
    }

    /// Attention over the normed tokens, `[B, T, C] -> [B, T, C]`; of the first token alone,
    /// `[B, 1, C]`, where it alone is read later.
    fn attend(&self, normed: &Tensor, run: &Run) -> Result<Tensor> {
        let (hooks, index, attention) = (&run.hooks, run.index, &self.attention);
        let input = match &self.windows {
            Some(bias) => bias.windows.partition(normed)?,
            None => normed.shallow_clone(),
        };
        let input = run.before(SubLayer::Attention, input)?;
        let mixed = if run.class_only {
            let c = attention.proj.weight.size()[1];
            let first = input.f_narrow(1, 0, 1)?;
            let q = hooks.linear(Layer::Q(index), &attention.qkv.rows(0, c)?, &first)?;
            let kv = hooks.linear(Layer::Kv(index), &attention.qkv.rows(c, 2 * c)?, &input)?;
            attention.mix_split(&q, &kv)?
        } else {
            let qkv = hooks.linear(Layer::Qkv(index), &attention.qkv, &input)?;
            match &self.windows {
                Some(bias) => {
                    let table = bias.for_batch(normed.size()[0], &qkv)?;
                    let mixed = attention.mix(&qkv, Some(&table))?;
                    bias.windows.reverse(&mixed)?
                }
                None => attention.mix(&qkv, None)?,
            }
        };
        hooks.linear(Layer::Proj(index), &attention.proj, &mixed)
    }

    /// Adds the sub-layer `f` and what the method has beside it into the residual stream; each
    /// draws drop path for itself.
    fn sub_layer(
        &self,
        sub_layer: SubLayer,
        tokens: Tensor,
        (normed, norm): (&Tensor, Option<NormOf>),
        layout: &TokenLayout,
        run: &Run,
        f: impl FnOnce(&Branch) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (method, train) = (run.hooks.method, run.hooks.train);
        let site = Site { block: run.index, sub_layer };
        let layer_scale = match sub_layer {
            SubLayer::Attention => &self.scale1,
            SubLayer::Mlp => &self.scale2,
        };
        // Held only for a method that may read it.
        let raw = method.is_beside(site).then(|| tokens.shallow_clone());
        let branch = run.drop_path.draw(&tokens, train)?;
        let mut sum = tokens;
        if !branch.is_empty() {
            let mut output = f(&branch)?;
            if let Some(gamma) = layer_scale {
                output = output.f_mul(gamma)?;
            }
            let output = method.after_sub_layer(site, output, layout, train)?;
            sum = branch.add(&sum, &output)?;
        }
        if let Some(raw) = &raw {
            let branch = &run.drop_path.draw(&sum, train)?;
            if !branch.is_empty() {
                let at = Beside { site, raw, normed, norm, layout, branch, train };
                sum = method.beside(&at, sum)?;
            }
        }
        Ok(sum)
    }
}

/// What a block's weights are called, and their sizes.
pub(super) struct BlockShape {
    /// In front of the names.
    pub(super) name: String,
    /// C.
    pub(super) dim: i64,
    /// Width between the layers of the MLP (of each half, for SwiGLU).
    pub(super) hidden: i64,
    pub(super) num_heads: i64,
    pub(super) activation: MlpActivation,
    /// Whether tokens attend to themselves and those before them alone: the words of a text do.
    pub(super) causal: bool,
    pub(super) qkv_bias: bool,
    pub(super) layer_scale: bool,
    pub(super) norm_eps: f64,
}

impl Block {
    /// A block that attends within `windows`, or to all tokens.
    pub(super) fn build(
        shape: &BlockShape,
        windows: Option<Windows>,
        weights: &mut Weights,
    ) -> Result<Self> {
        let (c, hidden, eps) = (shape.dim, shape.hidden, shape.norm_eps);
        let name = |part: &str| format!("{}.{part}", shape.name);
        let activation = shape.activation;
        Ok(Block {
            norm1: weights.norm(&name("norm1"), c, eps)?,
            windows: match windows {
                Some(windows) => {
                    let sizes = [windows.table_rows(), shape.num_heads];
                    let table = weights.get(&name("attn.relative_position_bias_table"), &sizes)?;
                    Some(WindowBias::new(windows, table))
                }
                None => None,
            },
            attention: Attention {
                qkv: weights.linear(&name("attn.qkv"), 3 * c, c, shape.qkv_bias)?,
                proj: weights.linear(&name("attn.proj"), c, c, true)?,
                num_heads: shape.num_heads,
                causal: shape.causal,
            },
            scale1: weights.get_if(shape.layer_scale, &name("ls1.gamma"), &[c])?,
            norm2: weights.norm(&name("norm2"), c, eps)?,
            mlp: Mlp {
                fc1: weights.linear(&name("mlp.fc1"), activation.halves() * hidden, c, true)?,
                fc2: weights.linear(&name("mlp.fc2"), c, hidden, true)?,
                activation,
            },
            scale2: weights.get_if(shape.layer_scale, &name("ls2.gamma"), &[c])?,
        })
    }
}
