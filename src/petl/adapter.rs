//! Adapter: a bottleneck with its own residual connection after a sub-layer (Houlsby et al., arXiv
//! 1902.00751; Pfeiffer et al., arXiv 2005.00247).

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::bottleneck::{Bottleneck, BottleneckActivation, Options};
use super::params::Params;
use super::petl_method::{ActsFrom, PetlMethod, json};
use super::{SubLayers, checks, widths};
use crate::error::Result;
use crate::nn::{Branch, Init};
use crate::seam::{BackboneShape, Place, Seam, Site, SubLayer, TokenLayout};

/// Config of Adapter: `Y + s * (act(Y W_down) W_up)`. Y is the output of a sub-layer, after layer
/// scale and before it is added to the residual stream.
///
/// The default is the Adapter of the comparison with Convpass: Pfeiffer's, only after the MLP, with
/// GELU. `sub_layers: SubLayers::Both` gives Houlsby's; together with `channel_scale` it gives
/// Adapter+. The first matrix starts Xavier uniform and the second at zero, so an adapter starts as
/// the identity. Houlsby draws both from a narrow normal distribution instead, and NOAH's code
/// starts both Xavier uniform and uses QuickGELU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterConfig {
    /// h, the bottleneck dim.
    pub bottleneck_dim: i64,
    /// The sub-layers that get an adapter.
    pub sub_layers: SubLayers,
    /// The activation between the two matrices.
    pub activation: BottleneckActivation,
    /// Dropout rate before the second matrix, in training; Houlsby and NOAH use none.
    pub dropout: f64,
    /// s, the factor of the branch; 1 in both papers.
    pub scale: f64,
    /// Whether s is trained, with one value per channel that starts at `scale`.
    pub channel_scale: bool,
    /// h of each block in place of `bottleneck_dim`; 0 leaves the block without an adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<Vec<i64>>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        AdapterConfig {
            bottleneck_dim: 8,
            sub_layers: SubLayers::Mlp,
            activation: BottleneckActivation::Gelu,
            dropout: 0.0,
            scale: 1.0,
            channel_scale: false,
            blocks: None,
        }
    }
}

impl AdapterConfig {
    /// Checks that the adapters can be created.
    ///
    /// # Errors
    /// Returns [`Error::Config`](crate::Error::Config) for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("AdapterConfig"))
    }

    fn check(&self) -> Result<()> {
        widths::validate("bottleneck_dim", self.bottleneck_dim, &self.blocks)?;
        checks::scale(self.scale)?;
        checks::dropout(self.dropout)
    }
}

impl PetlMethod for AdapterConfig {
    fn name(&self) -> &'static str {
        "adapter"
    }

    fn config(&self) -> Value {
        json(self)
    }

    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn needs(&self) -> &[Place] {
        &[Place::Blocks]
    }

    fn starts_as_identity(&self) -> bool {
        true
    }

    fn acts_from(&self, _: &BackboneShape) -> ActsFrom {
        widths::acts_from(self.bottleneck_dim, &self.blocks)
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        Ok(Box::new(Adapters::new(params, shape, self)?))
    }
}

/// The adapters of a whole backbone, `[attention, MLP]` in each block.
#[derive(Debug)]
pub(super) struct Adapters(Vec<[Option<Bottleneck>; 2]>);

impl Adapters {
    /// Creates the weights `blocks.N.{attn,mlp}.adapter.{down,up}.{weight,bias}`, and `...scale` if
    /// `channel_scale` is set.
    pub(super) fn new(
        params: &mut Params,
        shape: &BackboneShape,
        config: &AdapterConfig,
    ) -> Result<Self> {
        let options = Options {
            names: ("down", "up"),
            down_init: Init::XavierUniform,
            activation: config.activation,
            dropout: config.dropout,
            scale: config.scale,
            channel_scale: config.channel_scale,
        };
        let dims = &shape.block_dims;
        let widths = widths::resolve(config.bottleneck_dim, &config.blocks, dims.len())?;
        let mut blocks = Vec::with_capacity(dims.len());
        for (index, (&c, h)) in dims.iter().zip(widths).enumerate() {
            let mut adapter = |sub_layer, name| {
                let present = h > 0 && config.sub_layers.contains(sub_layer);
                let mut params = params.at(format_args!("blocks.{index}.{name}.adapter"));
                present.then(|| Bottleneck::new(&mut params, (c, h), &options)).transpose()
            };
            blocks.push([adapter(SubLayer::Attention, "attn")?, adapter(SubLayer::Mlp, "mlp")?]);
        }
        Ok(Adapters(blocks))
    }
}

impl Seam for Adapters {
    fn after_sub_layer(
        &self,
        site: Site,
        output: Tensor,
        _: &TokenLayout,
        train: bool,
    ) -> Result<Tensor> {
        let index = usize::from(site.sub_layer == SubLayer::Mlp);
        match self.0.get(site.block).and_then(|block| block[index].as_ref()) {
            Some(adapter) => adapter.add_into(&output, &output, &Branch::All, train),
            None => Ok(output),
        }
    }
}
