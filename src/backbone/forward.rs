//! [`Forward`]: the forward pass over any backbone. It implements what the functions of a
//! [`Backbone`] do not deal with: seeds, drop path rates by depth, and checks.

use tch::Tensor;

use super::hooks::{BlockPass, Hooks};
use super::{Backbone, Pass, Stream};
use crate::error::{Error, Result};
use crate::nn::DropPath;
use crate::seam::Seam;

/// The forward pass of a backbone with a method, as a whole and in parts.
///
/// Every [`Backbone`] has it, and no implementation can change it. It checks the images and the
/// pass. In training it seeds libtorch's generator again for each block, so that a block that is
/// computed a second time draws the same dropout and drop path. The drop path rate grows linearly
/// with depth. The parts are `run_embed`, `run_block` for each block, and `run_pool`; together they
/// give the same result as the whole.
pub trait Forward: Backbone {
    /// Computes features `[B, feature_dim]` of images `[B, 3, H, W]` with `method`.
    ///
    /// # Errors
    /// [`Error::Input`] if the images do not fit; [`Error::Config`] if `pass` is invalid; the
    /// errors of the layers and of the method.
    fn forward(&self, images: &Tensor, method: &dyn Seam, pass: Pass) -> Result<Tensor> {
        self.forward_from(0, self.run_embed(images, method, pass)?, method, pass)
    }

    /// Computes the rest of [`Forward::forward`] from `stream`, the input of block `block`. If
    /// `block` is the number of blocks, only pooling is left.
    ///
    /// # Errors
    /// [`Error::Config`] if `block` is larger than the number of blocks; the errors of
    /// [`Forward::run_block`].
    fn forward_from(
        &self,
        block: usize,
        stream: Stream,
        method: &dyn Seam,
        pass: Pass,
    ) -> Result<Tensor> {
        let count = self.num_blocks();
        if block > count {
            return Err(Error::config("block", format!("within 0..={count}"), block));
        }
        let stream = (block..count)
            .try_fold(stream, |stream, block| self.run_block(block, stream, method, pass))?;
        self.run_pool(stream, method, pass)
    }

    /// Computes dense features `[B, C, rows, cols]` of images `[B, 3, H, W]` with `method`: the
    /// patch tokens after the last block and the final norm, without prefix tokens.
    ///
    /// # Errors
    /// The errors of [`Forward::forward`].
    fn forward_patches(&self, images: &Tensor, method: &dyn Seam, pass: Pass) -> Result<Tensor> {
        let stream = self.run_embed(images, method, pass)?;
        let stream = (0..self.num_blocks())
            .try_fold(stream, |stream, block| step(self, block, stream, method, pass, false))?;
        self.patch_map(stream, &Hooks::new(method, pass.train))
    }

    /// Returns the outputs of the blocks `blocks` for images `[B, 3, H, W]`: all tokens, before the
    /// final norm, in the order of `blocks`. [`Stream::patches`] makes a map of them.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no block with one of these numbers; the errors of
    /// [`Forward::forward`].
    fn forward_intermediate(
        &self,
        images: &Tensor,
        blocks: &[usize],
        method: &dyn Seam,
        pass: Pass,
    ) -> Result<Vec<Stream>> {
        for &block in blocks {
            check_block(self, block)?;
        }
        let mut stream = self.run_embed(images, method, pass)?;
        let mut taken = Vec::new();
        for block in 0..blocks.iter().max().map_or(0, |last| last + 1) {
            stream = step(self, block, stream, method, pass, false)?;
            let wanted = blocks.iter().enumerate().filter(|(_, wanted)| **wanted == block);
            taken.extend(wanted.map(|(place, _)| (place, stream.shallow_clone())));
        }
        taken.sort_by_key(|(place, _)| *place);
        Ok(taken.into_iter().map(|(_, stream)| stream).collect())
    }

    /// Runs the first part of [`Forward::forward`]: computes the input of block 0 from images, in
    /// the dtype that the backbone computes in.
    ///
    /// # Errors
    /// [`Error::Input`] if the images do not fit; [`Error::Config`] if `pass` is invalid; the
    /// errors of the layers and of the method.
    fn run_embed(&self, images: &Tensor, method: &dyn Seam, pass: Pass) -> Result<Stream> {
        pass.validate()?;
        self.check_images(images)?;
        let images = images.f_to_kind(self.compute_kind())?;
        self.embed(&images, &Hooks::new(method, pass.train))
    }

    /// Runs one block of [`Forward::forward`]. In training it first seeds libtorch's generator from
    /// `pass.noise` and the number of the block.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no block with this number or `pass` is invalid; the errors of
    /// the layers and of the method.
    fn run_block(
        &self,
        block: usize,
        stream: Stream,
        method: &dyn Seam,
        pass: Pass,
    ) -> Result<Stream> {
        step(self, block, stream, method, pass, true)
    }

    /// Runs the last part of [`Forward::forward`]: computes features from the output of the last
    /// block.
    ///
    /// # Errors
    /// The errors of the layers and of the method.
    fn run_pool(&self, stream: Stream, method: &dyn Seam, pass: Pass) -> Result<Tensor> {
        self.pool(stream, &Hooks::new(method, pass.train))
    }
}

impl<B: Backbone> Forward for B {}

/// Runs one block. `pooled` says that only pooling reads the output of the last block, so that it
/// may compute fewer tokens.
fn step<B: Backbone>(
    backbone: &B,
    block: usize,
    stream: Stream,
    method: &dyn Seam,
    pass: Pass,
    pooled: bool,
) -> Result<Stream> {
    pass.validate()?;
    check_block(backbone, block)?;
    if pass.train {
        pass.noise.enter(block);
    }
    let count = backbone.num_blocks();
    let hooks = Hooks::new(method, pass.train);
    let drop_path = DropPath::linear(pass.drop_path, block, count);
    let pooled_only = pooled && block + 1 == count;
    backbone.block(stream, &BlockPass { block, hooks, drop_path, pooled_only })
}

fn check_block<B: Backbone>(backbone: &B, block: usize) -> Result<()> {
    let count = backbone.num_blocks();
    if block < count {
        return Ok(());
    }
    Err(Error::config("block", format!("below {count}"), block))
}
