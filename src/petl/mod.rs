//! Methods, one a file, and the one match that builds them.

mod adapter;
mod adaptformer;
mod bottleneck;
mod bypass_kernel;
mod bypasses;
mod checks;
mod compose;
mod conv_bypass;
mod fact;
mod fused_bypass;
mod lanes;
mod linear_targets;
mod lora;
mod low_bit;
mod method;
mod method_name;
mod params;
mod rep_adapter;
mod ssf;
mod sub_layers;
mod unfreeze;
mod up_projection;
mod vpt;
mod widths;

pub use adapter::AdapterConfig;
pub use adaptformer::{AdaptFormerConfig, AdaptFormerInput};
pub use bottleneck::BottleneckActivation;
#[cfg(feature = "report")]
pub(crate) use bypasses::Bypasses;
pub use bypasses::ConvBypassVariant;
pub use conv_bypass::{ConvBypass, ConvBypassConfig, ConvInit, FixedLayout, Placement};
pub use fact::{FactConfig, FactForm};
pub use linear_targets::LinearTarget;
pub use lora::LoraConfig;
pub use low_bit::LowBitConfig;
pub(crate) use low_bit::{Coded, Coding, pack, unpack};
pub use method::Method;
pub(crate) use params::{NewVariables, PassValues, Source};
pub use rep_adapter::RepAdapterConfig;
pub use ssf::SsfConfig;
pub use sub_layers::SubLayers;
pub use vpt::VptConfig;
