//! Adapts frozen vision transformers with convolutional bypasses.
//!
//! An implementation of *Convolutional Bypasses Are Better Vision Transformer Adapters* (Jie and Deng,
//! arXiv 2207.07039) over libtorch. A pretrained ViT stays frozen; beside each of its sub-layers a small bypass
//! (1x1, 3x3 on the patch grid, 1x1) is trained on as few as 1,000 images and kept as one file of 1.3 MB.
//!
//! ```
//! use convpass::{ConvBypassConfig, FrozenViT, Method, PetlConfig, PetlModel, ViTConfig};
//! use tch::{Device, Kind, Tensor, nn, nn::OptimizerConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A pretrained backbone comes from `FrozenViT::open("vit.safetensors", device)`.
//! let vit = ViTConfig { image_size: (32, 32), embed_dim: 64, num_heads: 1, depth: 2, ..ViTConfig::default() };
//! let backbone = FrozenViT::random(&vit, 0, Device::Cpu)?;
//! let config = PetlConfig::new(Method::ConvBypass(ConvBypassConfig::default()), 10);
//! let model = PetlModel::new(backbone, &config)?;
//!
//! let images = Tensor::zeros([4, 3, 32, 32], (Kind::Float, Device::Cpu));
//! let labels = Tensor::from_slice(&[0i64, 1, 2, 3]);
//! let mut optimizer = nn::AdamW::default().build(model.var_store(), 1e-3)?;
//! optimizer.backward_step(&model.forward(&images, true)?.cross_entropy_for_logits(&labels));
//! assert_eq!(model.trainable_params().method, 4 * (17 * 64 + 9 * 64 + 16));
//! # Ok(())
//! # }
//! ```
//!
//! | what | where |
//! |---|---|
//! | a backbone of any family from a checkpoint, and its preprocessing | [`AnyBackbone`], [`OpenOptions`], [`Preprocessing`] |
//! | a backbone of one family, its config | [`FrozenViT`], [`ViTConfig`]; [`FrozenSwin`], [`FrozenConvNeXt`] |
//! | a method beside it, a head over it, adapter files | [`PetlModel`], [`PetlConfig`], [`Method`], [`AdapterInfo`] |
//! | the bypass alone, in a network of your own | [`ConvBypass`], [`ConvBypassConfig`], [`TokenLayout`] |
//! | a method of your own | [`petl`]: [`PetlMethod`], [`Seam`], [`PetlModel::load_adapter_with`] |
//! | a backbone of your own | [`mod@backbone`]: [`Backbone`] |
//! | the contract that both have to keep (feature `testing`) | `testing` |
//! | parameter counts without a model | [`audit`](fn@audit) |
//! | adapters of Hugging Face PEFT | [`PetlModel::load_peft`], [`PetlModel::save_peft`] |
//! | adapted models as ONNX (feature `onnx`) or under the names of timm and transformers | [`export`] |
//! | CLIP's text tower and zero-shot classification (tokenizer: feature `clip`) | [`clip`] |
//! | images to batches: file lists, resizing, augmentation (feature `data`) | [`data`] |
//! | evaluation, on other sets of the classes too (feature `data`) | [`eval`] |
//! | a training run that resumes, its schedule and its record (feature `train`) | [`train`] |
//! | a run in several processes, on one or many machines (feature `distributed`) | `distributed` |
//! | checkpoints of the Hugging Face hub by name, `hf:OWNER/NAME` | feature `hub` |
//! | a progress bar; event files for TensorBoard | features `progress`, `tensorboard` |
//! | a small backbone and four small tasks (feature `bundled`) | `data::bundled` |
//!
//! Fallible calls return [`Error`], which names the file, tensor or line, what was expected and what was found.

pub mod backbone;
pub mod checkpoint;
pub mod clip;
#[cfg(any(feature = "data", feature = "clip"))]
mod contain;
#[cfg(feature = "data")]
pub mod data;
#[cfg(feature = "distributed")]
pub mod distributed;
mod error;
#[cfg(feature = "data")]
pub mod eval;
pub mod export;
mod ffi;
mod files;
pub mod model;
mod nn;
pub mod petl;
mod preprocessing;
pub mod seam;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "train")]
pub mod train;

pub use backbone::{
    AnyBackbone, Backbone, ConvNeXtConfig, FrozenConvNeXt, FrozenSwin, FrozenViT, Pooling,
    Precision, Preprocessing, SwinConfig, ViTConfig,
};
pub use checkpoint::OpenOptions;
#[cfg(feature = "data")]
pub use data::{FileList, ImageDataset, Normalization};
pub use error::{Error, Result};
pub use ffi::autocast::Autocast;
pub use ffi::cuda::cuda_load_error;
pub use ffi::malloc::keep_freed_memory;
pub use model::{AdapterInfo, PetlConfig, PetlModel, TrainableParams, audit};
pub use nn::ProductLibrary;
pub use petl::{
    ConvBypass, ConvBypassConfig, ConvInit, LoraConfig, Method, PetlMethod, Placement, SubLayers,
};
pub use seam::{Seam, TokenLayout};
#[cfg(feature = "train")]
pub use train::{TrainConfig, fit};

/// The programs of the README and the pages, compiled with the documentation tests.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/installing.md")]
    struct Installing;
    #[cfg(feature = "data")]
    #[doc = include_str!("../docs/data.md")]
    struct Data;
    #[doc = include_str!("../docs/peft.md")]
    struct Peft;
    #[cfg(feature = "testing")]
    #[doc = include_str!("../docs/extending.md")]
    struct Extending;
}
