//! The linear layers of a block that low-rank methods act on.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::seam::{BackboneShape, Layer, LayerWeights};

/// A linear map of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinearTarget {
    /// The query projection.
    Q,
    /// The key projection.
    K,
    /// The value projection.
    V,
    /// The projection after attention.
    Proj,
    /// The first linear layer of the MLP.
    Fc1,
    /// The second linear layer of the MLP.
    Fc2,
}

impl LinearTarget {
    /// Returns the path of the map below `blocks.N`.
    pub(crate) fn path(self) -> &'static str {
        match self {
            LinearTarget::Q => "attn.q",
            LinearTarget::K => "attn.k",
            LinearTarget::V => "attn.v",
            LinearTarget::Proj => "attn.proj",
            LinearTarget::Fc1 => "mlp.fc1",
            LinearTarget::Fc2 => "mlp.fc2",
        }
    }

    /// Returns the numbers of inputs and outputs of this map in a block of the backbone.
    pub(crate) fn size(self, shape: &BackboneShape, block: usize) -> Result<(i64, i64)> {
        let (layer, share) = match self {
            LinearTarget::Q | LinearTarget::K | LinearTarget::V => (Layer::Qkv(block), 3),
            LinearTarget::Proj => (Layer::Proj(block), 1),
            LinearTarget::Fc1 => (Layer::Fc1(block), 1),
            LinearTarget::Fc2 => (Layer::Fc2(block), 1),
        };
        match shape.layer(layer) {
            Some(layer) => Ok((layer.inputs, layer.outputs / share)),
            None => {
                let expected = "linear layers that the backbone has";
                Err(Error::config("targets", expected, format!("{layer:?}")))
            }
        }
    }
}

/// Returns the block of `layer` and the maps whose concatenated outputs are the output of the
/// layer.
pub(super) fn targets_of(layer: Layer) -> Option<(usize, &'static [LinearTarget])> {
    use LinearTarget::{Fc1, Fc2, K, Proj, Q, V};
    Some(match layer {
        Layer::Qkv(block) => (block, &[Q, K, V]),
        Layer::Q(block) => (block, &[Q]),
        Layer::Kv(block) => (block, &[K, V]),
        Layer::Proj(block) => (block, &[Proj]),
        Layer::Fc1(block) => (block, &[Fc1]),
        Layer::Fc2(block) => (block, &[Fc2]),
        _ => return None,
    })
}

/// Merges a linear map into the weight of a layer. `add` receives inputs `[.., in]` and outputs
/// `[.., out]` and returns the outputs plus those of the map.
pub(super) fn merge_linear(
    weights: LayerWeights,
    add: impl FnOnce(&Tensor, Tensor) -> Result<Tensor>,
) -> Result<LayerWeights> {
    // The rows of the identity as inputs give the transposed matrix as output.
    let (kind, device) = (weights.weight.kind(), weights.weight.device());
    let identity =
        Tensor::f_eye(weights.weight.size()[1], (Kind::Float, device))?.f_unsqueeze(0)?;
    let own = weights.weight.f_to_kind(Kind::Float)?.f_transpose(0, 1)?.f_unsqueeze(0)?;
    let merged = add(&identity, own)?.f_squeeze_dim(0)?.f_transpose(0, 1)?;
    Ok(LayerWeights { weight: merged.f_contiguous()?.f_to_kind(kind)?, ..weights })
}
