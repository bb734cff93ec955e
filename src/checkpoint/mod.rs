//! Reading checkpoints: containers, the tensor names of each model family, and load reports.

mod beside;
mod choice;
mod clip_text;
mod content;
mod convnext;
mod entry;
mod folder;
mod hub;
mod load;
mod names;
mod npy;
mod npz;
mod open;
mod pickle;
mod plan;
mod renamed;
mod report;
mod safetensors;
mod settings;
mod shards;
mod swin;
mod swin_settings;
mod tensor_file;
mod torch_legacy;
mod torch_zip;
mod unsupported;
mod vit;
mod vit_bias;
mod vit_kind;
mod vit_settings;
mod written;
mod written_class;
mod zip_index;

#[cfg(test)]
mod robustness;

pub use open::OpenOptions;
pub use report::{LoadReport, Setting, SettingSource};
pub(crate) use tensor_file::check_finite;
pub use tensor_file::{Container, TensorFile};
pub(crate) use written::NamedWeights;
pub use written::WeightNames;

/// Returns the square root of a square number from 1 on; `None` for any other number.
fn square_root(square: i64) -> Option<i64> {
    let root = u64::try_from(square).ok()?.isqrt() as i64;
    (root > 0 && root * root == square).then_some(root)
}
