//! Methods, one in each file. A method implements [`PetlMethod`]; [`Method`] is the enum of all
//! methods as data.

mod adapter;
mod adaptformer;
mod bottleneck;
mod bypass_kernel;
mod bypasses;
mod checks;
mod compose;
mod conv_bypass;
#[cfg(test)]
mod counts;
mod custom;
mod device_bypass;
mod fact;
mod fused_bypass;
mod lanes;
mod linear_probe;
mod linear_targets;
mod lora;
mod low_bit;
mod method;
mod method_name;
mod params;
mod pass_values;
mod petl_method;
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
pub use bypasses::{Bypasses, ConvBypassVariant};
pub use conv_bypass::{ConvBypass, ConvBypassConfig, ConvInit, FixedLayout, Placement};
pub use custom::{CustomMethod, MethodReader};
pub use fact::{FactConfig, FactForm};
pub use linear_targets::LinearTarget;
pub use lora::LoraConfig;
pub use low_bit::LowBitConfig;
pub(crate) use low_bit::{Coded, Coding, pack, unpack};
pub use method::Method;
pub(crate) use params::NewVariables;
pub use params::Params;
pub(crate) use pass_values::PassValues;
pub use petl_method::{ActsFrom, PetlMethod};
pub use rep_adapter::RepAdapterConfig;
pub use ssf::SsfConfig;
pub use sub_layers::SubLayers;
pub use unfreeze::Unfrozen;
pub use vpt::VptConfig;

pub use crate::nn::Init;
