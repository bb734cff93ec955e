//! The graph of a block. It is read beside `backbone/block.rs` and the layers in `nn`.

use tch::{Device, Kind, Tensor};

use super::graph::{Graph, GraphValue};
use super::vit::{Tokens, ViTGraph};
use crate::backbone::{MlpActivation, RotaryPairs};
use crate::error::Result;
use crate::seam::{Site, SubLayer, TokenLayout};

impl ViTGraph {
    /// Computes `[B, T, C] -> [B, T, C]`, or only the first `read` tokens if later layers read no
    /// others.
    pub(super) fn block(
        &mut self,
        block: usize,
        tokens: Tokens,
        read: Option<i64>,
    ) -> Result<Tokens> {
        let name = format!("blocks.{block}");
        self.graph.enter(&name);
        let entered = self.enter(block, tokens)?;
        let normed = self.norm(&entered.value, &format!("{name}.norm1"))?;
        let (mut tokens, mut beside) = (entered.clone(), normed.clone());
        if let Some(count) = read {
            tokens.value = self.graph.narrow(&tokens.value, 1, 0, count);
            beside = self.graph.narrow(&beside, 1, 0, count);
            tokens.layout = TokenLayout { prefix: count, grid: (0, 0) };
        }
        self.graph.enter(format!("{name}.attn"));
        let branch = self.attend(&name, &normed, entered.layout.prefix, read)?;
        let branch = self.layer_scale(branch, &format!("{name}.ls1.gamma"))?;
        self.graph.enter(&name);
        let attention = Site { block, sub_layer: SubLayer::Attention };
        tokens.value = self.join(attention, &tokens, branch, &beside)?;
        let normed = self.norm(&tokens.value, &format!("{name}.norm2"))?;
        self.graph.enter(format!("{name}.mlp"));
        let branch = self.mlp(&normed, &format!("{name}.mlp"), self.settings.activation)?;
        let branch = self.layer_scale(branch, &format!("{name}.ls2.gamma"))?;
        self.graph.enter(&name);
        let mlp = Site { block, sub_layer: SubLayer::Mlp };
        tokens.value = self.join(mlp, &tokens, branch, &normed)?;
        Ok(Tokens { value: tokens.value, layout: entered.layout })
    }

    /// Adds the output of a sub-layer to the residual stream, with the methods after and beside it.
    fn join(
        &mut self,
        site: Site,
        tokens: &Tokens,
        output: GraphValue,
        normed: &GraphValue,
    ) -> Result<GraphValue> {
        let output = self.after_sub_layer(site, output, &tokens.layout)?;
        let sum = self.graph.add(&tokens.value, &output);
        let sum = self.beside(site, tokens, normed, sum)?;
        self.graph.enter(format!("blocks.{}", site.block));
        Ok(sum)
    }

    /// Multiplies each channel by its factor, if there are factors.
    fn layer_scale(&mut self, x: GraphValue, name: &str) -> Result<GraphValue> {
        let factors = self.constant_if_present(name)?;
        Ok(factors.map_or(x.clone(), |factors| self.graph.mul(&x, &factors)))
    }

    /// Runs the MLP `name`: `[.., C] -> [.., C]`.
    pub(super) fn mlp(
        &mut self,
        x: &GraphValue,
        name: &str,
        activation: MlpActivation,
    ) -> Result<GraphValue> {
        let hidden = self.linear(x, &format!("{name}.fc1"))?;
        let hidden = match activation {
            MlpActivation::Gelu => self.graph.gelu(&hidden),
            MlpActivation::GeluTanh => self.graph.gelu_tanh(&hidden),
            MlpActivation::QuickGelu => self.graph.quick_gelu(&hidden),
            MlpActivation::Relu => self.graph.relu(&hidden),
            MlpActivation::Silu => self.graph.silu(&hidden),
            MlpActivation::SwiGlu => {
                let half = self.weights.get(&format!("{name}.fc2.weight"))?.size()[1];
                let halves = self.graph.split(&hidden, -1, &[half, half]);
                let gate = self.graph.silu(&halves[0]);
                self.graph.mul(&gate, &halves[1])
            }
        };
        let hidden = self.norm_if_present(hidden, &format!("{name}.norm"))?;
        self.linear(&hidden, &format!("{name}.fc2"))
    }

    /// Computes attention over the normed tokens, of which `prefix` come before the patches:
    /// `[B, T, C] -> [B, T, C]`, or only the first `read` tokens.
    fn attend(
        &mut self,
        block: &str,
        normed: &GraphValue,
        prefix: i64,
        read: Option<i64>,
    ) -> Result<GraphValue> {
        let (c, heads) = (self.settings.embed_dim, self.settings.num_heads);
        let qkv = format!("{block}.attn.qkv");
        let parts = match read {
            None => {
                let fused = self.linear(normed, &qkv)?;
                self.graph.split(&fused, -1, &[c, c, c])
            }
            Some(count) => {
                let first = self.graph.narrow(normed, 1, 0, count);
                let layer = (&mut self.weights, qkv.as_str());
                let q = self.graph.linear_rows(&first, layer, (0, c), "q")?;
                let layer = (&mut self.weights, qkv.as_str());
                let kv = self.graph.linear_rows(normed, layer, (c, 2 * c), "kv")?;
                [vec![q], self.graph.split(&kv, -1, &[c, c])].concat()
            }
        };
        let [mut q, mut k, v] = [0, 1, 2].map(|part: usize| self.heads(&parts[part], heads));
        // Fewer queries than keys are queries of prefix tokens, which are not rotated.
        if read.is_none() {
            q = self.rotated(&q, prefix)?;
        }
        k = self.rotated(&k, prefix)?;
        let mixed = self.softmax_attention([&q, &k, &v], heads);
        let mixed = self.norm_if_present(mixed, &format!("{block}.attn.norm"))?;
        self.linear(&mixed, &format!("{block}.attn.proj"))
    }

    /// Splits `[B, T, C]` into heads, `[B, heads, T, d]`.
    pub(super) fn heads(&mut self, x: &GraphValue, heads: i64) -> GraphValue {
        let head_dim = self.settings.embed_dim / heads;
        let x = self.graph.reshape(x, &[0, 0, heads, head_dim]);
        self.graph.transpose(&x, &[0, 2, 1, 3])
    }

    /// Computes softmax attention from queries, keys and values in heads, `[B, heads, T, d]`, and
    /// joins the heads: `[B, T, C]`.
    pub(super) fn softmax_attention(
        &mut self,
        [q, k, v]: [&GraphValue; 3],
        heads: i64,
    ) -> GraphValue {
        let c = self.settings.embed_dim;
        let q = self.graph.scaled(q, ((c / heads) as f64).sqrt().recip());
        let k = self.graph.transpose(k, &[0, 1, 3, 2]);
        let scores = self.graph.matmul(&q, &k);
        let weights = self.graph.softmax(&scores);
        let mixed = self.graph.matmul(&weights, v);
        let mixed = self.graph.transpose(&mixed, &[0, 2, 1, 3]);
        self.graph.reshape(&mixed, &[0, 0, c])
    }

    /// Rotates queries or keys, `[B, heads, T, d]`, if positions are rotary. The `prefix` tokens
    /// before the patches have the angle 0.
    fn rotated(&mut self, x: &GraphValue, prefix: i64) -> Result<GraphValue> {
        let Some((table, pairs)) = &self.rotary else { return Ok(x.clone()) };
        let (cos, sin) = table.values();
        let (half, like) = (cos.size()[1], (Kind::Float, Device::Cpu));
        let ones = Tensor::f_ones([prefix, half], like)?;
        let cos = Tensor::f_cat(&[&ones, cos], 0)?;
        let sin = Tensor::f_cat(&[&ones.f_zeros_like()?, sin], 0)?;
        // One number for each channel: (u, v) becomes (u, v) * cos + (v, u) * (-sin, sin).
        let (pair, sizes) = match pairs {
            RotaryPairs::Halves => (-2, [0, 0, 0, 2, half]),
            RotaryPairs::Neighbours => (-1, [0, 0, 0, half, 2]),
        };
        let wide = |a: &Tensor, b: &Tensor| Tensor::f_stack(&[a, b], pair)?.f_flatten(1, 2);
        let (cos, sin) = (wide(&cos, &cos)?, wide(&sin.f_neg()?, &sin)?);
        let cos = self.graph.constant(format!("rotary.cos.{prefix}"), cos);
        let sin = self.graph.constant(format!("rotary.sin.{prefix}"), sin);
        let exchanged = exchange(&mut self.graph, x, sizes, pair);
        let (x, exchanged) = (self.graph.mul(x, &cos), self.graph.mul(&exchanged, &sin));
        Ok(self.graph.add(&x, &exchanged))
    }
}

/// Exchanges the two channels of each pair in `[B, heads, T, d]`. In the shape `sizes` they lie
/// along the dimension `pair`.
fn exchange(graph: &mut Graph, x: &GraphValue, sizes: [i64; 5], pair: i64) -> GraphValue {
    let x = graph.reshape(x, &sizes);
    let channels = graph.split(&x, pair, &[1, 1]);
    let x = graph.concat(&[&channels[1], &channels[0]], pair);
    graph.reshape(&x, &[0, 0, 0, sizes[3] * sizes[4]])
}
