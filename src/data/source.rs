//! The source of the images of a dataset: memory or files.

use std::borrow::Cow;

use ndarray::{Array3, Array4, ArrayView3};

use super::augment::Augment;
use super::file_list::{FileEntry, FileList};
use super::image::decode_image;
use super::resize::Resize;
use crate::error::{Error, Result};

/// The source of images.
#[derive(Debug)]
pub(super) enum Source {
    /// `[N, H, W, 3]`, in standard layout.
    Memory(Array4<u8>),
    /// Files that are decoded on each access.
    Files { list: FileList, resize: Resize },
}

impl Source {
    /// Returns (rows, columns) of each image.
    pub(super) fn image_size(&self) -> (i64, i64) {
        match self {
            Self::Memory(images) => (images.dim().1 as i64, images.dim().2 as i64),
            Self::Files { resize, .. } => resize.image_size(),
        }
    }

    /// Returns the pixels of one image, row by row.
    pub(super) fn pixels(&self, index: usize) -> Result<Cow<'_, [u8]>> {
        match self {
            Self::Memory(images) => {
                let (_, rows, columns, channels) = images.dim();
                let bytes = rows * columns * channels;
                let all = images.as_slice().unwrap_or_default();
                let pixels = all.get(index.saturating_mul(bytes)..).and_then(|s| s.get(..bytes));
                pixels.map(Cow::Borrowed).ok_or_else(|| beyond(images.dim().0, index))
            }
            Self::Files { list, resize } => {
                let image = decode_entry(list, entry(list, index)?, |image| resize.apply(image))?;
                Ok(Cow::Owned(image.into_raw_vec_and_offset().0))
            }
        }
    }

    /// Returns the pixels of one image, augmented for (seed, epoch).
    fn augmented(
        &self,
        index: usize,
        augment: &Augment,
        (seed, epoch): (i64, i64),
    ) -> Result<Vec<u8>> {
        let change = |image: ArrayView3<u8>, resize: Resize| {
            augment.apply(image, resize, (seed, epoch, index))
        };
        let image = match self {
            Self::Memory(images) if index < images.dim().0 => {
                let image = images.index_axis(ndarray::Axis(0), index);
                change(image, Resize::bicubic(self.image_size())?)?
            }
            Self::Memory(images) => return Err(beyond(images.dim().0, index)),
            Self::Files { list, resize } => {
                decode_entry(list, entry(list, index)?, |image| change(image, *resize))?
            }
        };
        Ok(image.into_raw_vec_and_offset().0)
    }

    /// Returns the pixels of one image, augmented for `pass` = (seed, epoch) if `augment` is given.
    pub(super) fn read(
        &self,
        index: usize,
        augment: Option<&Augment>,
        pass: (i64, i64),
    ) -> Result<Vec<u8>> {
        match augment {
            Some(augment) => self.augmented(index, augment, pass),
            None => self.pixels(index).map(Cow::into_owned),
        }
    }
}

fn entry(list: &FileList, index: usize) -> Result<&FileEntry> {
    list.entries().get(index).ok_or_else(|| beyond(list.entries().len(), index))
}

fn beyond(count: usize, index: usize) -> Error {
    Error::Input { argument: "index", expected: format!("below {count}"), found: index.to_string() }
}

/// Decodes one image and resizes it with `resize`. An error names the list and the line of the
/// image.
pub(super) fn decode_entry(
    list: &FileList,
    entry: &FileEntry,
    resize: impl FnOnce(ArrayView3<u8>) -> Result<Array3<u8>>,
) -> Result<Array3<u8>> {
    let path = list.root().join(&entry.path);
    let reason = match decode_image(&path).and_then(|image| resize(image.view())) {
        Ok(image) => return Ok(image),
        Err(Error::Image { reason, .. }) => reason,
        Err(Error::Io { source, .. }) => source.to_string(),
        // This error is about the augmentation, not about the image.
        Err(error @ Error::Config { .. }) => return Err(error),
        Err(other) => other.to_string(),
    };
    let named_by = (entry.line > 0).then(|| (list.file().to_path_buf(), entry.line));
    Err(Error::Image { path, reason, list: named_by })
}
