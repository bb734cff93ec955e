//! Dense features of an adapted model, and its tokens between blocks.

use tch::Tensor;

use super::petl_model::PetlModel;
use crate::backbone::{Backbone, Forward, Pass, Stream};
use crate::error::Result;
use crate::seam::NoMethod;

impl<B: Backbone> PetlModel<B> {
    /// Images `[B, 3, H, W]` to dense features `[B, C, rows, cols]` in evaluation, adapted by the
    /// method: the patch tokens after the last block and the final norm. Class, register and prompt
    /// tokens are not in the map.
    ///
    /// # Errors
    /// As [`PetlModel::forward`].
    pub fn patch_features(&self, images: &Tensor) -> Result<Tensor> {
        self.patch_features_t(images, false)
    }

    /// As [`PetlModel::patch_features`]; `train` turns dropout and drop path on, for a dense head of
    /// the caller's that is trained together with the method. They draw from libtorch's generator as
    /// in [`PetlModel::forward`].
    ///
    /// # Errors
    /// As [`PetlModel::forward`].
    pub fn patch_features_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        match self.merged() {
            Some(merged) if !train => merged.patch_features(images),
            _ => self.run(train, |backbone, method, pass| {
                backbone.forward_patches(images, method, pass)
            }),
        }
    }

    /// What leaves each of the chosen blocks, which count from 0, for images `[B, 3, H, W]` in
    /// evaluation, adapted by the method: all tokens, before the final norm, in the order of
    /// `blocks`. The layout of each counts VPT's prompts among the prefix tokens;
    /// [`Stream::patches`] makes a map of the patches alone.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a number that no block has; otherwise as
    /// [`PetlModel::forward`].
    pub fn intermediate(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Stream>> {
        match self.merged() {
            Some(merged) => merged.forward_intermediate(images, blocks, &NoMethod, Pass::default()),
            None => self.run(false, |backbone, method, pass| {
                backbone.forward_intermediate(images, blocks, method, pass)
            }),
        }
    }
}
