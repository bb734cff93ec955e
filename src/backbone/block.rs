//! A block of attention and MLP that calls the method at the places around its layers.

use tch::Tensor;

use super::Stream;
use super::hooks::BlockPass;
use super::weights::Weights;
use crate::error::Result;
use crate::nn::{
    Attention, BiasTable, ContinuousBias, GridBias, GridPairs, Mlp, MlpActivation, Norm, NormKind,
    NormPlacement, Positions, Projected, RotaryTable, Rows, Weight, WindowBias, Windows,
};
use crate::seam::{Layer, NormOf, SubLayer, TokenLayout};

/// The tokens that the block computes. All tokens can still be keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queries {
    /// All tokens.
    All,
    /// Only this many tokens, which are the first of the prefix.
    First(i64),
}

#[derive(Clone, Debug)]
pub(super) struct Block {
    norm_placement: NormPlacement,
    norm1: Norm,
    attention: Attention,
    /// The norm between attention and its projection.
    inner_norm1: Option<Norm>,
    scale1: Option<Weight>,
    norm2: Norm,
    mlp: Mlp,
    /// The norm between the activation and the second layer of the MLP.
    inner_norm2: Option<Norm>,
    scale2: Option<Weight>,
}

impl Block {
    /// Computes `[B, T, C] -> [B, T, C]`, or fewer tokens if only these are read later. The stream
    /// must be the result of [`BlockPass::enter`].
    pub(super) fn forward(
        &self,
        stream: Stream,
        queries: Queries,
        pass: &BlockPass,
    ) -> Result<Tensor> {
        let Stream { mut tokens, mut layout } = stream;
        let norm1 = self.norm1.beside(&tokens)?;
        let (normed, norm) = self.input(SubLayer::Attention, &norm1, &tokens, pass)?;
        let mut beside = normed.shallow_clone();
        let prefix = layout.prefix;
        if let Queries::First(count) = queries {
            layout = TokenLayout { prefix: count, grid: (0, 0) };
            tokens = tokens.f_narrow(1, 0, count)?;
            beside = normed.f_narrow(1, 0, count)?;
        }
        let attention = SubLayer::Attention;
        let tokens = pass.join(attention, tokens, (&beside, norm), &layout, |branch| {
            let x = self.attend(&branch.select(&normed)?, prefix, queries, pass)?;
            self.output(Layer::Norm1(pass.block), &self.norm1, scaled(x, &self.scale1)?, pass)
        })?;
        let norm2 = self.norm2.beside(&tokens)?;
        let (normed, norm) = self.input(SubLayer::Mlp, &norm2, &tokens, pass)?;
        pass.join(SubLayer::Mlp, tokens, (&normed, norm), &layout, |branch| {
            let (fc1, fc2) = (Layer::Fc1(pass.block), Layer::Fc2(pass.block));
            let x = pass.before(SubLayer::Mlp, branch.select(&normed)?)?;
            let x = pass.hooks.linear(fc1, &self.mlp.fc1, &x)?;
            let x = normed_by(&self.inner_norm2, self.mlp.activate(&x)?)?;
            let x = pass.hooks.linear(fc2, &self.mlp.fc2, &x)?;
            self.output(Layer::Norm2(pass.block), &self.norm2, scaled(x, &self.scale2)?, pass)
        })
    }

    /// Returns the input of a sub-layer for `tokens`. Also returns `norm` if the input is its
    /// output and the method did not change it.
    fn input<'n>(
        &self,
        sub_layer: SubLayer,
        norm: &'n Norm,
        tokens: &Tensor,
        pass: &BlockPass,
    ) -> Result<(Tensor, Option<NormOf<'n>>)> {
        match self.norm_placement {
            NormPlacement::Before => pass.norm_of(sub_layer, norm, tokens),
            NormPlacement::After => Ok((tokens.shallow_clone(), None)),
        }
    }

    /// Applies the norm `layer` to the output of a sub-layer if the norms come after them.
    fn output(&self, layer: Layer, norm: &Norm, x: Tensor, pass: &BlockPass) -> Result<Tensor> {
        match self.norm_placement {
            NormPlacement::Before => Ok(x),
            NormPlacement::After => pass.hooks.norm(layer, norm, &x),
        }
    }

    /// Computes attention over the normed tokens, `[B, T, C] -> [B, T, C]`, of which `prefix` are
    /// prefix tokens. If only the first tokens are read later, only their output is computed.
    fn attend(
        &self,
        normed: &Tensor,
        prefix: i64,
        queries: Queries,
        pass: &BlockPass,
    ) -> Result<Tensor> {
        let attention = &self.attention;
        let input = match attention.windows() {
            Some(windows) => windows.partition(normed)?,
            None => normed.shallow_clone(),
        };
        let batch = normed.size().first().copied().unwrap_or_default();
        let projected = {
            let windows = input.size().first().copied().unwrap_or_default() / batch.max(1);
            let _rows = Rows::each_counts(windows);
            let input = pass.before(SubLayer::Attention, input)?;
            self.project(&input, queries, pass)?
        };
        let mixed = attention.mix(&projected, batch, prefix)?;
        let mixed = match attention.windows() {
            Some(windows) => windows.reverse(&mixed)?,
            None => mixed,
        };
        let mixed = normed_by(&self.inner_norm1, mixed)?;
        pass.hooks.linear(Layer::Proj(pass.block), &attention.proj, &mixed)
    }

    /// Computes queries of the tokens that are read later, and keys and values of all tokens.
    fn project(&self, input: &Tensor, queries: Queries, pass: &BlockPass) -> Result<Projected> {
        let (qkv, hooks, block) = (&self.attention.qkv, &pass.hooks, pass.block);
        match queries {
            Queries::All => Ok(Projected::Fused(hooks.linear(Layer::Qkv(block), qkv, input)?)),
            Queries::First(count) => {
                let c = self.attention.proj.weight.size()[1];
                let first = input.f_narrow(1, 0, count)?;
                let q = hooks.linear(Layer::Q(block), &qkv.rows(0, c)?, &first)?;
                let kv = hooks.linear(Layer::Kv(block), &qkv.rows(c, 2 * c)?, input)?;
                Ok(Projected::Split(q, kv))
            }
        }
    }
}

/// Multiplies `output [B, T, C]` by a factor for each channel, if there is one.
fn scaled(output: Tensor, gamma: &Option<Weight>) -> Result<Tensor> {
    match gamma {
        Some(gamma) => Ok(output.f_mul(gamma)?),
        None => Ok(output),
    }
}

/// Applies a norm inside a sub-layer, if there is one.
fn normed_by(norm: &Option<Norm>, x: Tensor) -> Result<Tensor> {
    match norm {
        Some(norm) => norm.forward(&x),
        None => Ok(x),
    }
}

/// The names and the sizes of a block's weights.
pub(super) struct BlockShape {
    /// Prefix of the names, without the dot.
    pub(super) name: String,
    /// C.
    pub(super) dim: i64,
    /// Width between the layers of the MLP (of each half, for SwiGLU).
    pub(super) hidden: i64,
    pub(super) num_heads: i64,
    pub(super) activation: MlpActivation,
    /// Whether a token attends only to itself and earlier tokens, as the tokens of a text do.
    pub(super) causal: bool,
    pub(super) qkv_bias: bool,
    /// Whether the projection after attention and the layers of the MLP have a bias.
    pub(super) proj_bias: bool,
    pub(super) layer_scale: bool,
    pub(super) norm_placement: NormPlacement,
    pub(super) norms: NormKind,
    /// Whether there is a norm between attention and its projection.
    pub(super) attention_norm: bool,
    /// Whether there is a norm between the activation and the second layer of the MLP.
    pub(super) mlp_norm: bool,
    /// The rotation of queries and keys, if positions are rotary.
    pub(super) rotary: Option<RotaryTable>,
    /// The pairs of tokens that have a learned bias, if attention is global and has one.
    pub(super) grid_pairs: Option<GridPairs>,
}

impl BlockShape {
    /// Returns how attention uses positions, within `windows` or globally if `None`.
    fn positions(&self, windows: Option<&WindowShape>, weights: &mut Weights) -> Result<Positions> {
        let name = format!("{}.attn", self.name);
        Ok(match (windows, &self.grid_pairs, &self.rotary) {
            (Some(windows), ..) => {
                Positions::Windows(windows.bias(&name, self.num_heads, weights)?)
            }
            (None, Some(pairs), _) => {
                let name = format!("{name}.relative_position_bias_table");
                let table = weights.get(&name, &[pairs.num_rows(), self.num_heads])?;
                let (pairs, table) = (pairs.clone(), table.shallow_clone());
                Positions::Grid(GridBias { pairs, table })
            }
            (None, None, Some(table)) => Positions::Rotary(table.clone()),
            (None, None, None) => Positions::InTokens,
        })
    }
}

/// The windows within which a block attends.
pub(super) struct WindowShape {
    pub(super) windows: Windows,
    /// Hidden width of the MLP that computes the position bias, and rows and columns of the window of
    /// the pretraining. The bias is a table of weights if `None`.
    pub(super) continuous_bias: Option<(i64, (i64, i64))>,
    /// Whether the scores are cosines times a learned factor.
    pub(super) cosine: bool,
    /// The value added to the scores between tokens that are neighbours only because of the roll.
    pub(super) apart: f64,
}

impl WindowShape {
    /// Builds the position bias of `heads` heads. `name` is the name of the attention.
    fn bias(&self, name: &str, heads: i64, weights: &mut Weights) -> Result<WindowBias> {
        let name = |part: &str| format!("{name}.{part}");
        let table = match self.continuous_bias {
            None => {
                let sizes = [self.windows.table_rows(), heads];
                BiasTable::Learned(weights.get(&name("relative_position_bias_table"), &sizes)?)
            }
            Some((hidden, pretrained)) => {
                let first = weights.get(&name("cpb_mlp.0.weight"), &[hidden, 2])?;
                let first = (first, weights.get(&name("cpb_mlp.0.bias"), &[hidden])?);
                let second = weights.get(&name("cpb_mlp.2.weight"), &[heads, hidden])?;
                let size = self.windows.size();
                BiasTable::Continuous(ContinuousBias::new(size, pretrained, first, second)?)
            }
        };
        Ok(WindowBias::new(self.windows, table, self.apart))
    }
}

impl Block {
    /// Builds a block that attends within `windows`, or to all tokens if `None`.
    pub(super) fn build(
        shape: &BlockShape,
        windows: Option<&WindowShape>,
        weights: &mut Weights,
    ) -> Result<Self> {
        let (c, hidden, norms) = (shape.dim, shape.hidden, shape.norms);
        let name = |part: &str| format!("{}.{part}", shape.name);
        let activation = shape.activation;
        let fc1 = activation.halves() * hidden;
        let norm_if = |present: bool, part: &str, dim: i64, weights: &mut Weights| {
            present.then(|| weights.norm_of(&name(part), dim, norms)).transpose()
        };
        let cosine = windows.is_some_and(|windows| windows.cosine);
        Ok(Block {
            norm_placement: shape.norm_placement,
            norm1: weights.norm_of(&name("norm1"), c, norms)?,
            attention: Attention {
                positions: shape.positions(windows, weights)?,
                qkv: weights.linear(&name("attn.qkv"), c, 3 * c, shape.qkv_bias)?,
                proj: weights.linear(&name("attn.proj"), c, c, shape.proj_bias)?,
                num_heads: shape.num_heads,
                causal: shape.causal,
                logit_scale: weights.get_if(
                    cosine,
                    &name("attn.logit_scale"),
                    &[shape.num_heads, 1, 1],
                )?,
            },
            inner_norm1: norm_if(shape.attention_norm, "attn.norm", c, weights)?,
            scale1: weights.get_if(shape.layer_scale, &name("ls1.gamma"), &[c])?,
            norm2: weights.norm_of(&name("norm2"), c, norms)?,
            mlp: Mlp {
                fc1: weights.linear(&name("mlp.fc1"), c, fc1, shape.proj_bias)?,
                fc2: weights.linear(&name("mlp.fc2"), hidden, c, shape.proj_bias)?,
                activation,
            },
            inner_norm2: norm_if(shape.mlp_norm, "mlp.norm", hidden, weights)?,
            scale2: weights.get_if(shape.layer_scale, &name("ls2.gamma"), &[c])?,
        })
    }
}
