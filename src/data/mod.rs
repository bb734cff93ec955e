//! From image files to batches: decoding, resizing, file lists, the VTAB-1k table, batches on a
//! device.
//!
//! [`vtab::VtabFolder`] or [`FileList`] says which images there are, [`ImageDataset`] decodes and
//! resizes them, once or at each pass, [`Batches`] hands them out as normalized tensors, changed by
//! an [`Augment`] if asked for.
//! The module `bundled` (feature `bundled`) writes small tasks in the same layout, and a small
//! backbone, so that a program has something to run on.

mod ahead;
mod augment;
mod batches;
#[cfg(feature = "bundled")]
pub mod bundled;
mod dataset;
mod few_shot;
mod file_list;
mod folders;
mod image;
mod resize;
mod source;
mod transform;
pub mod vtab;

pub use augment::{Augment, ColorJitter, ImageOp, Interpolation, RandAugment, RandomResizedCrop};
pub use batches::{BatchConfig, Batches, Order, PartialBatch};
pub use dataset::ImageDataset;
pub use file_list::{FileEntry, FileList};
pub use image::decode_image;
pub use resize::Resize;
pub use transform::Normalization;
