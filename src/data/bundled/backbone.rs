//! The bundled ViT, which is compiled into the crate.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};
use crate::files::write_atomically;

/// 1.0 M weights in f16 with timm's names. `assets/README.md` describes how they were trained.
const WEIGHTS: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/vit_fashion_mnist.safetensors"));

/// Writes the bundled ViT to `file`. An existing file is replaced, unless it has the same content.
/// The file is written atomically.
///
/// The network has 1.0 M weights: 32x32 images, 4x4 patches, C = 128, 5 blocks, 2 heads. It was
/// pretrained on Fashion-MNIST, with pixels normalized by a mean and a standard deviation of 0.5
/// ([`Normalization::Half`](crate::data::Normalization::Half)).
///
/// # Errors
/// [`Error::Io`] if the file or its folder cannot be written.
pub fn write_backbone(file: impl AsRef<Path>) -> Result<()> {
    let file = file.as_ref();
    if fs::read(file).is_ok_and(|found| found == WEIGHTS) {
        return Ok(());
    }
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    write_atomically(file, WEIGHTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_where_it_is_not_there_already() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("new/vit.safetensors");
        write_backbone(&file).unwrap();
        assert!(fs::read(&file).unwrap() == WEIGHTS);
        let written = fs::metadata(&file).unwrap().modified().unwrap();
        write_backbone(&file).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().modified().unwrap(), written);
        fs::write(&file, "an older one").unwrap();
        write_backbone(&file).unwrap();
        assert!(fs::read(&file).unwrap() == WEIGHTS);
        assert_eq!(fs::read_dir(root.path().join("new")).unwrap().count(), 1);
    }
}
