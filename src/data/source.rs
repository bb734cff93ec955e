//! The source of the images of a dataset: memory or files.

use std::borrow::Cow;

use ndarray::{Array3, Array4, ArrayView3};

use super::augment::Augment;
use super::file_list::{FileEntry, FileList};
use super::image::with_image;
use super::resize::Resize;
use crate::error::{Error, Result};
use crate::preprocessing::Orientation;

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
                let image = read_entry(list, entry(list, index)?, *resize)?;
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
                let entry = entry(list, index)?;
                decode_entry(list, entry, resize.orientation(), |image| change(image, *resize))?
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

/// Decodes one image and resizes it. An error names the list and the line of the image.
pub(super) fn read_entry(list: &FileList, entry: &FileEntry, resize: Resize) -> Result<Array3<u8>> {
    decode_entry(list, entry, resize.orientation(), |image| resize.apply(image))
}

/// Decodes one image and returns what `change` makes of it. An error names the list and the line
/// of the image.
fn decode_entry(
    list: &FileList,
    entry: &FileEntry,
    orientation: Orientation,
    change: impl FnOnce(ArrayView3<u8>) -> Result<Array3<u8>>,
) -> Result<Array3<u8>> {
    let path = list.root().join(&entry.path);
    with_image(&path, orientation, |image| change(image.view()))
        .map_err(|error| of_entry(error, list, entry))
}

/// Returns the error of an image as [`Error::Image`], with the list and the line that name the
/// image.
pub(super) fn of_entry(error: Error, list: &FileList, entry: &FileEntry) -> Error {
    let path = list.root().join(&entry.path);
    let reason = match error {
        Error::Image { reason, .. } => reason,
        Error::Io { source, .. } => source.to_string(),
        Error::NotAFile { found, .. } => format!("expected a regular file, found {found}"),
        // This error is about the augmentation, not about the image.
        error @ Error::Config { .. } => return error,
        other => other.to_string(),
    };
    let named_by = (entry.line > 0).then(|| (list.file().to_path_buf(), entry.line));
    Error::Image { path, reason, list: named_by }
}
