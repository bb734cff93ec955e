//! [`Forward`]: the forward pass over any backbone. It keeps the promises that a [`Backbone`]'s own
//! functions know nothing of: seeds, drop path by depth, checks.

use tch::Tensor;

use super::hooks::{BlockPass, Hooks};
use super::{Backbone, Pass, Stream};
use crate::error::{Error, Result};
use crate::nn::DropPath;
use crate::seam::Seam;

/// The forward pass of a backbone with a method at its places, whole and in parts.
///
/// Every [`Backbone`] has it, and no implementation can change it. It checks images and pass, starts
/// libtorch's generator anew for each block in training, so that a block that is computed a second
/// time draws the same dropout and drop path, and gives each block its drop path, linear over depth.
/// The parts, `run_embed`, `run_block` for each block and `run_pool`, give what the whole gives.
pub trait Forward: Backbone {
    /// Images `[B, 3, H, W]` to features `[B, feature_dim]`, with `method` at its places.
    ///
    /// # Errors
    /// [`Error::Input`] if the images do not fit; [`Error::Config`] if `pass` is none; what the
    /// layers and the method return.
    fn forward(&self, images: &Tensor, method: &dyn Seam, pass: Pass) -> Result<Tensor> {
        self.forward_from(0, self.run_embed(images, method, pass)?, method, pass)
    }

    /// The rest of [`Forward::forward`], from what enters `block` on. It is pooling alone where
    /// `block` is the number of blocks.
    ///
    /// # Errors
    /// [`Error::Config`] for a block beyond that; otherwise as [`Forward::run_block`].
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

    /// Images `[B, 3, H, W]` to dense features `[B, C, rows, cols]`, with `method` at its places:
    /// the patch tokens after the last block and the final norm, without prefix tokens.
    ///
    /// # Errors
    /// As [`Forward::forward`].
    fn forward_patches(&self, images: &Tensor, method: &dyn Seam, pass: Pass) -> Result<Tensor> {
        let stream = self.run_embed(images, method, pass)?;
        let stream = (0..self.num_blocks())
            .try_fold(stream, |stream, block| step(self, block, stream, method, pass, false))?;
        self.patch_map(stream, &Hooks::new(method, pass.train))
    }

    /// What leaves each of the chosen blocks for images `[B, 3, H, W]`: all tokens, before the
    /// final norm, in the order of `blocks`. [`Stream::patches`] makes a map of them.
    ///
    /// # Errors
    /// [`Error::Config`] for a number that no block has; otherwise as [`Forward::forward`].
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

    /// The first part of [`Forward::forward`]: images to what enters block 0, in the kind that the
    /// backbone computes in.
    ///
    /// # Errors
    /// [`Error::Input`] if the images do not fit; [`Error::Config`] if `pass` is none; what the
    /// layers and the method return.
    fn run_embed(&self, images: &Tensor, method: &dyn Seam, pass: Pass) -> Result<Stream> {
        pass.validate()?;
        self.check_images(images)?;
        let images = images.f_to_kind(self.compute_kind())?;
        self.embed(&images, &Hooks::new(method, pass.train))
    }

    /// One block of it. In training it starts libtorch's generator anew, from `pass.noise` and the
    /// block's number.
    ///
    /// # Errors
    /// [`Error::Config`] for a number that no block has, or if `pass` is none; what the layers and
    /// the method return.
    fn run_block(
        &self,
        block: usize,
        stream: Stream,
        method: &dyn Seam,
        pass: Pass,
    ) -> Result<Stream> {
        step(self, block, stream, method, pass, true)
    }

    /// The last part of it: what leaves the last block to features.
    ///
    /// # Errors
    /// What the layers and the method return.
    fn run_pool(&self, stream: Stream, method: &dyn Seam, pass: Pass) -> Result<Tensor> {
        self.pool(stream, &Hooks::new(method, pass.train))
    }
}

impl<B: Backbone> Forward for B {}

/// A block of a pass whose last block is `pooled`, and nothing else, or read for all of its tokens.
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
