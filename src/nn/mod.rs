//! Layers over plain tensors, one in each file. No layer owns a `VarStore`, so the same layer works
//! with frozen and with trained weights.

mod activation;
mod attention;
mod attention_pool;
mod bias_table;
mod continuous_bias;
mod conv;
mod cosine;
mod drop_path;
mod grid_bias;
mod init;
mod linear;
mod merge;
mod mlp;
mod noise;
mod norm;
mod patch_embed;
mod pos_embed;
mod rotary;
mod rows;
mod self_attention;
mod stored;
mod variable;
mod window;

pub(crate) use activation::{QUICK_GELU_SLOPE, quick_gelu};
pub(crate) use attention::{Attention, Positions, Projected};
pub(crate) use attention_pool::AttentionPool;
pub(crate) use bias_table::resize_bias_table;
pub(crate) use continuous_bias::ContinuousBias;
pub use conv::Conv;
pub use drop_path::{Branch, DropPath};
pub(crate) use grid_bias::{GridBias, GridPairs};
pub use init::Init;
pub(crate) use init::{InitRng, identity_kernel};
pub use linear::Linear;
pub(crate) use linear::quantize;
pub(crate) use merge::side_by_side;
pub(crate) use mlp::Mlp;
pub use mlp::MlpActivation;
pub use noise::Noise;
#[cfg(feature = "train")]
pub(crate) use noise::seed_of;
pub(crate) use norm::NormKind;
pub use norm::{Norm, NormPlacement};
pub use patch_embed::PatchEmbed;
pub(crate) use pos_embed::{TableFilter, resize_pos_embed};
pub(crate) use rotary::{Frequencies, RotaryTable};
pub use rotary::{Rotary, RotaryCoordinates, RotaryPairs};
pub(crate) use rows::{Rows, dropout, fill_dropout_mask, fill_keep_mask};
pub use stored::Weight;
pub(crate) use stored::widened;
pub(crate) use variable::variable;
pub(crate) use window::{BiasTable, WindowBias, Windows};
