//! Which sub-layers a method acts at.

use serde::{Deserialize, Serialize};

use crate::seam::SubLayer;

/// The sub-layers of each block at which a method acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SubLayers {
    /// Attention and MLP: for the bypass, the paper's Convpass; for Adapter, Houlsby's.
    #[default]
    Both,
    /// Attention alone: the paper's Convpass-attn.
    Attention,
    /// The MLP alone; for Adapter, Pfeiffer's.
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
