//! The choice of sub-layers at which a method acts.

use serde::{Deserialize, Serialize};

use crate::seam::SubLayer;

/// The sub-layers of each block at which a method acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SubLayers {
    /// Attention and MLP. For the bypass this is the paper's Convpass, for Adapter it is Houlsby's.
    #[default]
    Both,
    /// Only attention: the paper's Convpass-attn.
    Attention,
    /// Only the MLP. For Adapter this is Pfeiffer's.
    Mlp,
}

impl SubLayers {
    pub(super) fn contains(self, sub_layer: SubLayer) -> bool {
        match self {
            SubLayers::Both => true,
            SubLayers::Attention => sub_layer == SubLayer::Attention,
            SubLayers::Mlp => sub_layer == SubLayer::Mlp,
        }
    }
}
