//! The graph of a ViT: embedding, blocks, pooling. It is read beside `backbone/vit/mod.rs`.

use std::collections::BTreeMap;

use tch::Tensor;

use super::graph::{Graph, GraphValue, WeightSet, not_exportable};
use super::methods::Methods;
use super::proto::AttributeProto;
use crate::backbone::{
    AttentionPooling, Backbone, FrozenViT, MlpActivation, Pooling, RotaryPairs, ViTConfig,
};
use crate::error::Result;
use crate::model::FoldedMethod;
use crate::nn::RotaryTable;
use crate::seam::TokenLayout;

/// Tokens `[B, P + N, C]` and their layout.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    pub(super) value: GraphValue,
    pub(super) layout: TokenLayout,
}

/// The settings of a [`ViTConfig`] that the graph depends on.
#[derive(Debug)]
pub(super) struct Settings {
    patch_size: i64,
    pub(super) embed_dim: i64,
    depth: usize,
    pub(super) num_heads: i64,
    pub(super) activation: MlpActivation,
    pos_embed_prefix: i64,
    pub(super) norm_eps: f64,
    pooling: Pooling,
    attention_pool: Option<AttentionPooling>,
    /// The layout of the tokens without prompts.
    own_layout: TokenLayout,
}

impl Settings {
    /// Every field is named here, so that a new one has to be considered. Those that are not kept
    /// show in the names of the weights, all of which the graph has to use.
    fn of(config: &ViTConfig) -> Self {
        let &ViTConfig {
            image_size: _,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            mlp_dim: _,
            activation,
            class_token: _,
            num_registers: _,
            pos_embed: _,
            pos_embed_prefix,
            rotary: _,
            mixed_rotary: _,
            relative_bias: _,
            patch_bias: _,
            patch_norm: _,
            qkv_bias: _,
            proj_bias: _,
            rms_norm: _,
            norm_bias: _,
            pre_norm: _,
            layer_scale: _,
            attention_norm: _,
            mlp_norm: _,
            norm_placement: _,
            final_norm: _,
            pooling,
            attention_pool,
            norm_eps,
            projection: _,
        } = config;
        Settings {
            patch_size,
            embed_dim,
            depth: usize::try_from(depth).unwrap_or_default(),
            num_heads,
            activation,
            pos_embed_prefix,
            norm_eps,
            pooling,
            attention_pool,
            own_layout: config.layout(),
        }
    }
}

/// Checks that every layer of the config has a graph.
///
/// # Errors
/// [`Error::NotExportable`](crate::Error::NotExportable) otherwise.
fn check(config: &ViTConfig) -> Result<()> {
    let lacks = [
        (!config.norm_placement.is_before(), "norms after the sub-layers"),
        (config.mixed_rotary, "learned rotary frequencies"),
        (config.relative_bias, "relative position biases"),
        (config.rms_norm || !config.norm_bias, "RMS norms and norms without a bias"),
        (config.patch_norm, "a norm of the patches"),
        (
            config.attention_pool.is_some_and(|pool| pool.mlp_dim == 0),
            "an attention pooling without MLP",
        ),
    ];
    match lacks.into_iter().find(|(is_there, _)| *is_there) {
        Some((_, layer)) => Err(not_exportable("this ViT", format!("{layer} have no graph here"))),
        None => Ok(()),
    }
}

/// A ViT and its methods while their graph is made.
#[derive(Debug)]
pub(super) struct ViTGraph {
    pub(super) graph: Graph,
    pub(super) settings: Settings,
    pub(super) weights: WeightSet,
    pub(super) methods: Methods,
    pub(super) rotary: Option<(RotaryTable, RotaryPairs)>,
    /// The shape `[B, 1, 1]`, to which what all images share is expanded.
    batch: GraphValue,
}

impl ViTGraph {
    /// Makes the graph of the features `[B, C]` of `images [B, 3, H, W]`. Returns it with the value
    /// of the features.
    pub(super) fn of(vit: &FrozenViT, methods: Vec<FoldedMethod>) -> Result<(Graph, GraphValue)> {
        let config = vit.config();
        check(config)?;
        let weights = vit.named_weights().iter().filter(|(name, _)| vit.is_read(name));
        let weights: BTreeMap<String, Tensor> =
            weights.map(|(name, weight)| (name.clone(), weight.shallow_clone())).collect();
        let mut graph = Graph::default();
        let images = graph.input(super::INPUT);
        graph.enter("batch");
        let size = graph.node(
            "Shape",
            &[&images],
            vec![AttributeProto::int("start", 0), AttributeProto::int("end", 1)],
        );
        let ones = graph.ints(&[1, 1]);
        let mut vit = ViTGraph {
            batch: graph.concat(&[&size, &ones], 0),
            graph,
            settings: Settings::of(config),
            rotary: rotary(config, &weights)?,
            weights: WeightSet::new("the backbone", weights),
            methods: Methods::new(methods)?,
        };
        let features = vit.features(&images)?;
        vit.weights.check_used()?;
        vit.methods.check_used()?;
        Ok((vit.graph, features))
    }

    fn features(&mut self, images: &GraphValue) -> Result<GraphValue> {
        let mut tokens = self.embed(images)?;
        for block in 0..self.settings.depth {
            let is_last = block + 1 == self.settings.depth;
            let read = if is_last { self.settings.pooling.first_tokens() } else { None };
            tokens = self.block(block, tokens, read)?;
        }
        self.pool(&tokens)
    }

    /// Computes `[B, 3, H, W] -> [B, P + N, C]`.
    fn embed(&mut self, images: &GraphValue) -> Result<Tokens> {
        let (c, patch) = (self.settings.embed_dim, self.settings.patch_size);
        let layout = self.settings.own_layout;
        self.graph.enter("patch_embed");
        let weight = self.constant("patch_embed.proj.weight")?;
        let bias = self.constant_if_present("patch_embed.proj.bias")?;
        let map = self.graph.conv(images, (&weight, bias.as_ref()), [patch, patch, 0]);
        // [B, C, rows, cols] -> [B, N, C]
        let flat = self.graph.reshape(&map, &[0, c, layout.num_patches()]);
        let mut patches = self.graph.transpose(&flat, &[0, 2, 1]);
        let table = self.weights.find("pos_embed")?;
        self.graph.enter("embed");
        if let Some(table) = &table {
            let covered = self.settings.pos_embed_prefix;
            let rows = table.f_narrow(1, covered, layout.num_patches())?;
            let rows = self.graph.constant("pos_embed.patches", rows);
            patches = self.graph.add(&patches, &rows);
        }
        let mut value = patches;
        if let Some(prefix) = self.prefix(table.as_ref())? {
            let prefix = self.shared("prefix_tokens", prefix);
            value = self.graph.concat(&[&prefix, &value], 1);
        }
        if self.weights.has("norm_pre.weight") {
            value = self.norm(&value, "norm_pre")?;
        }
        Ok(Tokens { value, layout })
    }

    /// Returns class token and registers with their rows of the position table, `[1, P, C]`.
    fn prefix(&mut self, table: Option<&Tensor>) -> Result<Option<Tensor>> {
        let (mut parts, mut start) = (Vec::new(), 0);
        for name in ["cls_token", "reg_token"] {
            let Some(part) = self.weights.find(name)? else { continue };
            let len = part.size()[1];
            let is_covered = start + len <= self.settings.pos_embed_prefix;
            parts.push(match table.filter(|_| is_covered) {
                Some(table) => part.f_add(&table.f_narrow(1, start, len)?)?,
                None => part,
            });
            start += len;
        }
        if parts.is_empty() { Ok(None) } else { Ok(Some(Tensor::f_cat(&parts, 1)?)) }
    }

    /// Computes `[B, T, C] -> [B, C]`, or `[B, 2C]` for the class token beside the mean. The tokens
    /// are all tokens, or the first ones if pooling reads no others.
    fn pool(&mut self, tokens: &Tokens) -> Result<GraphValue> {
        self.graph.enter("pool");
        let value = &tokens.value;
        match self.settings.pooling {
            Pooling::ClassToken => {
                let token = self.graph.token(value, 0);
                self.final_norm(&token)
            }
            Pooling::Average => {
                let normed = self.final_norm(value)?;
                Ok(self.mean_of_patches(&normed, &tokens.layout))
            }
            Pooling::AverageThenNorm => {
                let mean = self.mean_of_patches(value, &tokens.layout);
                self.final_norm(&mean)
            }
            Pooling::ClassTokenAndAverage => {
                let normed = self.final_norm(value)?;
                let token = self.graph.token(&normed, 0);
                let mean = self.mean_of_patches(&normed, &tokens.layout);
                Ok(self.graph.concat(&[&token, &mean], 1))
            }
            Pooling::ClassAndDistillation => {
                let first = self.graph.narrow(value, 1, 0, 2);
                let normed = self.final_norm(&first)?;
                Ok(self.graph.mean_of_tokens(&normed))
            }
            Pooling::Attention => {
                let pool = self.settings.attention_pool;
                let read = self.pooled(tokens, pool.is_some_and(|pool| pool.reads_prefix));
                let normed = self.final_norm(&read)?;
                let heads = pool.and_then(|pool| pool.num_heads);
                self.attention_pool(&normed, heads.unwrap_or(self.settings.num_heads))
            }
        }
    }

    /// Returns the patches, and with `prefix` the class and register tokens before them.
    fn pooled(&mut self, tokens: &Tokens, prefix: bool) -> GraphValue {
        let layout = tokens.layout;
        let patches = self.graph.narrow(&tokens.value, 1, layout.prefix, layout.num_patches());
        let own = self.settings.own_layout.prefix;
        if !prefix || own == 0 {
            return patches;
        }
        // Prompts are the last prefix tokens.
        let first = self.graph.narrow(&tokens.value, 1, 0, own);
        self.graph.concat(&[&first, &patches], 1)
    }

    fn mean_of_patches(&mut self, x: &GraphValue, layout: &TokenLayout) -> GraphValue {
        let patches = self.graph.narrow(x, 1, layout.prefix, layout.num_patches());
        self.graph.mean_of_tokens(&patches)
    }

    /// Runs the norm behind the blocks or the pooling, if there is one.
    fn final_norm(&mut self, x: &GraphValue) -> Result<GraphValue> {
        match ["norm", "fc_norm"].into_iter().find(|name| self.weights.has(&weight_of(name))) {
            Some(name) => self.norm(x, name),
            None => Ok(x.clone()),
        }
    }

    pub(super) fn norm(&mut self, x: &GraphValue, name: &str) -> Result<GraphValue> {
        self.graph.norm(x, &mut self.weights, name, self.settings.norm_eps)
    }

    /// Runs a norm if the backbone has it.
    pub(super) fn norm_if_present(&mut self, x: GraphValue, name: &str) -> Result<GraphValue> {
        if self.weights.has(&weight_of(name)) { self.norm(&x, name) } else { Ok(x) }
    }

    pub(super) fn linear(&mut self, x: &GraphValue, name: &str) -> Result<GraphValue> {
        self.graph.linear(x, &mut self.weights, name)
    }

    pub(super) fn constant(&mut self, name: &str) -> Result<GraphValue> {
        let tensor = self.weights.get(name)?;
        Ok(self.graph.constant(name, tensor))
    }

    pub(super) fn constant_if_present(&mut self, name: &str) -> Result<Option<GraphValue>> {
        let tensor = self.weights.find(name)?;
        Ok(tensor.map(|tensor| self.graph.constant(name, tensor)))
    }

    /// Returns tokens `[1, T, C]` that are the same for each image of the batch: `[B, T, C]`.
    pub(super) fn shared(&mut self, name: &str, tokens: Tensor) -> GraphValue {
        let tokens = self.graph.constant(name, tokens);
        self.graph.node("Expand", &[&tokens, &self.batch.clone()], Vec::new())
    }
}

fn weight_of(layer: &str) -> String {
    format!("{layer}.weight")
}

/// Returns the angles of the patches if positions are rotary.
fn rotary(
    config: &ViTConfig,
    weights: &BTreeMap<String, Tensor>,
) -> Result<Option<(RotaryTable, RotaryPairs)>> {
    let (Some(rotary), Some(like)) = (&config.rotary, weights.values().next()) else {
        return Ok(None);
    };
    let head_dim = config.embed_dim / config.num_heads;
    Ok(Some((RotaryTable::new(rotary, config.grid(), head_dim, like)?, rotary.pairs)))
}
