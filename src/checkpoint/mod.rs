//! Checkpoints: container readers, the names of each model family, and what a load did.

mod entry;
mod load;
mod names;
mod npy;
mod npz;
mod pickle;
mod plan;
mod report;
mod safetensors;
mod tensor_file;
mod torch_zip;
mod vit;
mod zip_index;

#[cfg(test)]
mod robustness;

pub use report::LoadReport;
pub use tensor_file::{Container, TensorFile};
