//! Adapt frozen Vision Transformers with convolutional bypasses.

mod backbone;
mod checkpoint;
#[cfg(feature = "data")]
pub mod data;
mod error;
mod ffi;
mod files;
mod model;
mod nn;
mod petl;
mod seam;

pub use backbone::{Backbone, FrozenViT, MlpActivation, Pass, Pooling, ViTConfig};
pub use checkpoint::{Container, LoadReport, TensorFile};
#[cfg(feature = "data")]
pub use data::{
    BatchConfig, Batches, FileEntry, FileList, ImageDataset, Normalization, Order, PartialBatch,
    Resize, bundled, decode_image, vtab,
};
pub use error::{Error, Result};
pub use ffi::cuda::cuda_load_error;
pub use model::{PetlConfig, PetlModel, TrainableParams};
pub use nn::Branch;
pub use petl::{ConvBypass, ConvBypassConfig, ConvInit, FixedLayout, Method, Placement, SubLayers};
pub use seam::{NoMethod, Seam, Site, SubLayer, TokenLayout};

/// The programs of the README, compiled with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
