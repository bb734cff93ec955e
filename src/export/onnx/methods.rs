//! The graphs of the methods that do not fold into weights: at which place of a block they act, and
//! with what.

use super::graph::{GraphValue, WeightSet, not_exportable};
use super::vit::{Tokens, ViTGraph};
use crate::error::Result;
use crate::model::FoldedMethod;
use crate::petl::{
    AdaptFormerConfig, AdaptFormerInput, AdapterConfig, BottleneckActivation, ConvBypassConfig,
    ConvBypassVariant, Method, Placement, VptConfig,
};
use crate::seam::{Site, SubLayer, TokenLayout};

/// The methods of a model in the order in which they act at each place.
#[derive(Debug)]
pub(super) struct Methods(Vec<(MethodGraph, WeightSet)>);

/// What a method does, with the settings that its weights do not show. Which blocks and sub-layers
/// it acts on shows in the names of its weights.
#[derive(Clone, Debug)]
enum MethodGraph {
    Bypass { scale: f64, placement: Placement },
    Bottleneck(BottleneckGraph),
    Prompts { deep: bool },
}

/// Two linear layers with an activation between them.
#[derive(Clone, Debug)]
struct BottleneckGraph {
    /// The input beside the sub-layer; `None` if the method acts on the output of the sub-layer.
    beside: Option<AdaptFormerInput>,
    /// The names of the two layers.
    names: [&'static str; 2],
    activation: BottleneckActivation,
    scale: f64,
}

impl BottleneckGraph {
    /// Returns the path of the weights at a place.
    fn path(&self, site: Site) -> String {
        let block = site.block;
        match (self.beside, site.sub_layer) {
            (Some(_), SubLayer::Mlp) => format!("blocks.{block}.adaptmlp"),
            (Some(_), SubLayer::Attention) => String::new(),
            (None, SubLayer::Attention) => format!("blocks.{block}.attn.adapter"),
            (None, SubLayer::Mlp) => format!("blocks.{block}.mlp.adapter"),
        }
    }
}

fn bypass_path(site: Site) -> String {
    let part = match site.sub_layer {
        SubLayer::Attention => "adapter_attn",
        SubLayer::Mlp => "adapter_mlp",
    };
    format!("blocks.{}.{part}", site.block)
}

impl MethodGraph {
    /// Every field of a config is named here, so that a new one has to be considered.
    fn of(method: &Method) -> Result<Self> {
        match method {
            Method::ConvBypass(config) => Ok(Self::bypass(config)),
            Method::ConvBypassVariant(config) => {
                let ConvBypassVariant { base, mlp_kernel_size: _, channel_scale: _, blocks: _ } =
                    config;
                Ok(Self::bypass(base))
            }
            Method::Adapter(config) => {
                let &AdapterConfig {
                    bottleneck_dim: _,
                    sub_layers: _,
                    activation,
                    dropout: _,
                    scale,
                    channel_scale: _,
                    blocks: _,
                } = config;
                let names = ["down", "up"];
                Ok(MethodGraph::Bottleneck(BottleneckGraph {
                    beside: None,
                    names,
                    activation,
                    scale,
                }))
            }
            Method::AdaptFormer(config) => {
                let &AdaptFormerConfig {
                    bottleneck_dim: _,
                    scale,
                    channel_scale: _,
                    dropout: _,
                    input,
                    blocks: _,
                } = config;
                let (beside, names) = (Some(input), ["down_proj", "up_proj"]);
                let activation = BottleneckActivation::Relu;
                Ok(MethodGraph::Bottleneck(BottleneckGraph { beside, names, activation, scale }))
            }
            Method::Vpt(config) => {
                let &VptConfig { num_tokens: _, deep, dropout: _, blocks: _ } = config;
                Ok(MethodGraph::Prompts { deep })
            }
            other => {
                let reason = "only conv_bypass, adapter, adapt_former, vpt and methods that fold \
                              into weights can be exported; rep_adapter folds in only where no \
                              other method acts";
                Err(not_exportable(&format!("the method {}", other.name()), reason))
            }
        }
    }

    fn bypass(config: &ConvBypassConfig) -> Self {
        let &ConvBypassConfig {
            bottleneck_dim: _,
            kernel_size: _,
            scale,
            dropout: _,
            conv_init: _,
            sub_layers: _,
            placement,
        } = config;
        MethodGraph::Bypass { scale, placement }
    }
}

impl Methods {
    pub(super) fn new(methods: Vec<FoldedMethod>) -> Result<Self> {
        let sourced = methods.into_iter().map(|FoldedMethod { method, values }| {
            let owner = format!("the method {}", method.name());
            Ok((MethodGraph::of(&method)?, WeightSet::new(owner, values)))
        });
        sourced.collect::<Result<_>>().map(Methods)
    }

    pub(super) fn check_used(&self) -> Result<()> {
        self.0.iter().try_for_each(|(_, source)| source.check_used())
    }
}

impl ViTGraph {
    /// Runs the methods before a block: prompts join the prefix tokens, or replace those of the
    /// block before.
    pub(super) fn enter(&mut self, block: usize, mut tokens: Tokens) -> Result<Tokens> {
        for index in 0..self.methods.0.len() {
            let (kind, source) = &mut self.methods.0[index];
            let &mut MethodGraph::Prompts { deep } = kind else { continue };
            let own = source.find(&format!("blocks.{block}.prompts"))?;
            let before = block.checked_sub(1).filter(|_| deep);
            let stale = match before {
                Some(before) => source.find(&format!("blocks.{before}.prompts"))?,
                None => None,
            };
            let stale = stale.map_or(0, |prompts| prompts.size()[0]);
            if stale == 0 && own.is_none() {
                continue;
            }
            let Tokens { value, layout } = &tokens;
            let kept = layout.prefix - stale;
            let patches = self.graph.narrow(value, 1, layout.prefix, layout.num_patches());
            let mut parts = Vec::new();
            if kept > 0 {
                parts.push(self.graph.narrow(value, 1, 0, kept));
            }
            let mut prefix = kept;
            if let Some(own) = own {
                prefix += own.size()[0];
                parts.push(self.shared(&format!("blocks.{block}.prompts"), own.f_unsqueeze(0)?));
            }
            parts.push(patches);
            let value = self.graph.concat(&parts.iter().collect::<Vec<_>>(), 1);
            tokens = Tokens { value, layout: TokenLayout { prefix, ..*layout } };
        }
        Ok(tokens)
    }

    /// Runs the methods after a sub-layer, on its output `[B, T, C]`.
    pub(super) fn after_sub_layer(
        &mut self,
        site: Site,
        mut output: GraphValue,
        layout: &TokenLayout,
    ) -> Result<GraphValue> {
        for index in 0..self.methods.0.len() {
            let input = output.clone();
            match self.methods.0[index].0.clone() {
                MethodGraph::Bypass { scale, placement: Placement::Sequential } => {
                    output = self.add_bypass(index, site, scale, &input, layout, output)?;
                }
                MethodGraph::Bottleneck(bottleneck) if bottleneck.beside.is_none() => {
                    output = self.add_bottleneck(index, site, &bottleneck, &input, output)?;
                }
                _ => {}
            }
        }
        Ok(output)
    }

    /// Runs the methods beside a sub-layer and adds their outputs to `sum [B, T, C]`, the residual
    /// stream behind it. `tokens` is the stream before it, and `normed` is its norm.
    pub(super) fn beside(
        &mut self,
        site: Site,
        tokens: &Tokens,
        normed: &GraphValue,
        mut sum: GraphValue,
    ) -> Result<GraphValue> {
        for index in 0..self.methods.0.len() {
            match self.methods.0[index].0.clone() {
                MethodGraph::Bypass { scale, placement: Placement::Parallel } => {
                    sum = self.add_bypass(index, site, scale, normed, &tokens.layout, sum)?;
                }
                MethodGraph::Bottleneck(bottleneck) => {
                    let input = match bottleneck.beside {
                        Some(AdaptFormerInput::Raw) => &tokens.value,
                        Some(AdaptFormerInput::Normed) => normed,
                        None => continue,
                    };
                    sum = self.add_bottleneck(index, site, &bottleneck, input, sum)?;
                }
                _ => {}
            }
        }
        Ok(sum)
    }

    /// Adds a bypass of `x [B, T, C]` to `sum`, if there is one at this place.
    fn add_bypass(
        &mut self,
        method: usize,
        site: Site,
        scale: f64,
        x: &GraphValue,
        layout: &TokenLayout,
        sum: GraphValue,
    ) -> Result<GraphValue> {
        let (path, graph) = (bypass_path(site), &mut self.graph);
        let source = &mut self.methods.0[method].1;
        if !source.has(&format!("{path}.adapter_down.weight")) {
            return Ok(sum);
        }
        graph.enter(&path);
        let hidden = graph.linear(x, source, &format!("{path}.adapter_down"))?;
        let hidden = graph.quick_gelu(&hidden);
        let hidden = graph.convolved(&hidden, source, &format!("{path}.adapter_conv"), layout)?;
        let hidden = graph.quick_gelu(&hidden);
        let output = graph.up(&hidden, source, &path, "adapter_up", scale)?;
        Ok(graph.add(&sum, &output))
    }

    /// Adds a bottleneck of `x [B, T, C]` to `sum`, if there is one at this place.
    fn add_bottleneck(
        &mut self,
        method: usize,
        site: Site,
        bottleneck: &BottleneckGraph,
        x: &GraphValue,
        sum: GraphValue,
    ) -> Result<GraphValue> {
        let (path, [down, up]) = (bottleneck.path(site), bottleneck.names);
        let (graph, source) = (&mut self.graph, &mut self.methods.0[method].1);
        if !source.has(&format!("{path}.{down}.weight")) {
            return Ok(sum);
        }
        graph.enter(&path);
        let hidden = graph.linear(x, source, &format!("{path}.{down}"))?;
        let hidden = match bottleneck.activation {
            BottleneckActivation::Gelu => graph.gelu(&hidden),
            BottleneckActivation::QuickGelu => graph.quick_gelu(&hidden),
            BottleneckActivation::Relu => graph.relu(&hidden),
        };
        let output = graph.up(&hidden, source, &path, up, bottleneck.scale)?;
        Ok(graph.add(&sum, &output))
    }
}
