//! Adapt frozen Vision Transformers with convolutional bypasses.

mod backbone;
mod checkpoint;
#[cfg(feature = "data")]
mod data;
mod error;
#[cfg(feature = "data")]
mod eval;
mod ffi;
mod files;
mod model;
mod nn;
mod petl;
mod seam;
#[cfg(feature = "train")]
mod train;

pub use backbone::{Backbone, FrozenViT, MlpActivation, Pass, Pooling, ViTConfig};
pub use checkpoint::{Container, LoadReport, TensorFile};
#[cfg(feature = "data")]
pub use data::{
    BatchConfig, Batches, FileEntry, FileList, ImageDataset, Normalization, Order, PartialBatch,
    Resize, bundled, decode_image, vtab,
};
pub use error::{Error, Result};
#[cfg(feature = "data")]
pub use eval::{Evaluation, evaluate};
pub use ffi::cuda::cuda_load_error;
pub use model::{AuditRow, PetlConfig, PetlModel, TrainableParams, audit};
pub use nn::Branch;
pub use petl::{ConvBypass, ConvBypassConfig, ConvInit, FixedLayout, Method, Placement, SubLayers};
pub use seam::{NoMethod, Seam, Site, SubLayer, TokenLayout};
#[cfg(feature = "train")]
pub use train::{
    AdamW, CosineSchedule, EpochReport, Fit, Observer, Progress, RunRecord, Selection, Silent,
    StepReport, Stepped, TrainConfig, fit, peak_rss_mb,
};

/// The programs of the README, compiled with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
