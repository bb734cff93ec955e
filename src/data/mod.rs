//! Loads image files and returns them as batches of tensors: file lists, decoding, resizing,
//! augmentation, normalization, and the table of the VTAB-1k tasks.
//!
//! [`Splits`] opens a person's own dataset, a folder or a list, and [`Survey`] says which of its
//! images cannot be read. [`vtab::VtabFolder`] or [`FileList`] lists the images. [`ImageDataset`] decodes and resizes
//! them, either once or in each pass. [`Batches`] returns them as normalized tensors and applies an
//! [`Augment`] if one is given.
//!
//! The module `bundled` (feature `bundled`) writes a small backbone and small tasks in the VTAB-1k
//! layout, so that a program can run without a download.

mod ahead;
mod augment;
mod batches;
#[cfg(feature = "bundled")]
pub mod bundled;
mod dataset;
mod few_shot;
mod file_list;
mod folders;
mod folds;
mod image;
mod list_format;
mod resize;
mod source;
mod splits;
mod survey;
mod transform;
pub mod vtab;

pub use augment::{Augment, ColorJitter, ImageOp, Interpolation, RandAugment, RandomResizedCrop};
pub use batches::{BatchConfig, Batches, Order, PartialBatch};
pub use dataset::ImageDataset;
pub use file_list::{FileEntry, FileList, LeftOut};
pub use folders::is_image_file;
pub use folds::Fold;
pub use image::{decode_image, decode_image_with};
pub use resize::Resize;
pub use splits::{SplitFractions, Splits};
pub use survey::{Overlap, Survey, SurveyDepth, Unreadable, overlap};
pub use transform::Normalization;

pub use crate::preprocessing::Orientation;
