//! Adapted models: a backbone, a method and a head.

mod adapted;
mod adapter_file;
mod adapter_info;
mod audit;
mod dense;
mod fold;
mod head;
mod labels;
mod low_bit;
mod peft;
mod petl_model;
mod prefix;
mod recompute;
mod trainable_params;

pub(crate) use adapter_file::{Bytes, encode};
pub use adapter_info::AdapterInfo;
pub use audit::{AuditRow, audit, audit_shape};
#[cfg(feature = "onnx")]
pub(crate) use fold::FoldedMethod;
pub(crate) use fold::plain;
pub use labels::HeadSource;
pub use peft::{PeftHead, PeftNames, PeftOptions};
pub use petl_model::{PetlConfig, PetlModel};
pub use trainable_params::TrainableParams;
