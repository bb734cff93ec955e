//! An adapted model: a backbone, a method and a head.

mod adapter_file;
mod head;
mod petl_model;
mod trainable_params;

pub use petl_model::{PetlConfig, PetlModel};
pub use trainable_params::TrainableParams;
