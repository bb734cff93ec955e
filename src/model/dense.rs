//! Dense features and intermediate tokens of an adapted model.

use tch::Tensor;

use super::petl_model::PetlModel;
use crate::backbone::{Backbone, Forward, Pass, Stream};
use crate::error::Result;
use crate::seam::NoMethod;

impl<B: Backbone> PetlModel<B> {
    /// Computes dense features `[B, C, rows, cols]` of images `[B, 3, H, W]` in evaluation mode,
    /// adapted by the method. The features are the patch tokens after the last block and the final
    /// norm. Class, register and prompt tokens are not included.
    ///
    /// # Errors
    /// The errors of [`PetlModel::forward`].
    pub fn patch_features(&self, images: &Tensor) -> Result<Tensor> {
        self.patch_features_t(images, false)
    }

    /// Computes the same as [`PetlModel::patch_features`]. `train` turns dropout and drop path on,
    /// so that a dense head of the caller can be trained together with the method. They draw from
    /// libtorch's generator as in [`PetlModel::forward`].
    ///
    /// # Errors
    /// The errors of [`PetlModel::forward`].
    pub fn patch_features_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        match self.merged() {
            Some(merged) if !train => merged.patch_features(images),
            _ => self.run(train, |backbone, method, pass| {
                backbone.forward_patches(images, method, pass)
            }),
        }
    }

    /// Returns the outputs of the blocks `blocks` for images `[B, 3, H, W]` in evaluation mode,
    /// adapted by the method. Blocks count from 0. Each output has all tokens, before the final
    /// norm; the outputs are in the order of `blocks`. The layout of an output counts VPT's prompts
    /// among the prefix tokens. [`Stream::patches`] makes a map of the patches alone.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) if there is no block with one of these numbers; the
    /// errors of [`PetlModel::forward`].
    pub fn intermediate(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Stream>> {
        match self.merged() {
            Some(merged) => merged.forward_intermediate(images, blocks, &NoMethod, Pass::default()),
            None => self.run(false, |backbone, method, pass| {
                backbone.forward_intermediate(images, blocks, method, pass)
            }),
        }
    }
}
