//! From image files to batches: decoding, resizing, file lists, the VTAB-1k table, batches on a
//! device.
//!
//! [`vtab::VtabFolder`] or [`FileList`] says which images there are, [`ImageDataset`] decodes and
//! resizes them once and keeps them as u8, [`Batches`] hands them out as normalized tensors.
//! [`bundled`] writes small tasks in the same layout, so that a program has something to run on.

mod batches;
pub mod bundled;
mod dataset;
mod file_list;
mod image;
mod resize;
mod transform;
pub mod vtab;

pub use batches::{BatchConfig, Batches, Order, PartialBatch};
pub use dataset::ImageDataset;
pub use file_list::{FileEntry, FileList};
pub use image::decode_image;
pub use resize::Resize;
pub use transform::Normalization;
