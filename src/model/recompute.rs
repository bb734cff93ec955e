//! Forward and backward passes that keep the activations of one block at a time.

use tch::{Kind, Tensor};

use super::petl_model::PetlModel;
use crate::backbone::{Backbone, Forward, Pass, Stream};
use crate::error::Result;
use crate::seam::{Seam, TokenLayout};

impl<B: Backbone> PetlModel<B> {
    /// Computes the same gradients as `loss(&self.forward(images, true)?)?.backward()` with less
    /// memory. Only the tokens between the blocks are kept, and backward computes each block again.
    /// This costs one more forward pass of every block but the last. Returns the logits `[B,
    /// num_classes]` and the loss, both detached.
    ///
    /// libtorch's generator seeds dropout and drop path as in [`PetlModel::forward`], and a block
    /// draws the same numbers when it is computed again. On a ViT the gradients are bit-identical.
    /// On Swin, and for weights that blocks share (FacT's factors), the gradients are summed in
    /// another order.
    ///
    /// # Errors
    /// The errors of [`PetlModel::forward`] and of `loss`. Some gradients may exist after an error.
    pub fn backward_recomputed(
        &self,
        images: &Tensor,
        loss: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        self.recompute(Start::Images(images), loss)
    }

    /// Does the same as [`PetlModel::backward_recomputed`], starting from the output of
    /// [`PetlModel::frozen_prefix`].
    ///
    /// # Errors
    /// The errors of [`PetlModel::forward_from`] and of `loss`.
    pub fn backward_recomputed_from(
        &self,
        stream: Stream,
        loss: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let first = self.frozen_blocks().unwrap_or_default();
        self.check(first, &stream)?;
        self.recompute(Start::Block(first, stream), loss)
    }

    fn recompute(
        &self,
        start: Start,
        loss: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        self.run(true, |backbone, method, pass| {
            let parts = Parts { backbone, method, pass };
            let count = backbone.num_blocks();
            let (images, first, mut stream) = match start {
                Start::Images(images) => (Some(images), 0, parts.embed(images)?),
                Start::Block(first, stream) => (None, first, stream),
            };
            let mut entered = Vec::with_capacity(count);
            for block in first..count.saturating_sub(1) {
                let cut = Cut::new(&stream)?;
                stream = parts.run(block, cut.leaf()?)?;
                entered.push(cut);
            }
            // The last block runs backward at once, so it is not computed again.
            let top = Cut::new(&stream)?.leaf()?;
            let tokens = top.tokens.shallow_clone();
            let last = if first < count { parts.run(count - 1, top)? } else { top };
            let logits = self.classify(&parts.pool(last)?)?;
            let loss = loss(&logits)?;
            loss.f_backward()?;
            let left = parts.backward(first, &entered, tokens)?;
            if let Some(images) = images.filter(|_| left.requires_grad()) {
                hand_down(&parts.embed(images)?, &left.f_grad()?)?;
            }
            Ok((logits.f_detach()?, loss.f_detach()?))
        })
    }
}

/// The start of a pass.
enum Start<'a> {
    Images(&'a Tensor),
    /// Before this block, with its input.
    Block(usize, Stream),
}

/// The input of a block, detached from the graph that computed it.
struct Cut {
    tokens: Tensor,
    layout: TokenLayout,
    /// Whether anything before the block is trained.
    trained: bool,
}

impl Cut {
    fn new(stream: &Stream) -> Result<Self> {
        let trained = stream.tokens.requires_grad();
        Ok(Cut { tokens: stream.tokens.f_detach()?, layout: stream.layout, trained })
    }

    /// Returns the input as the leaf of a new graph. It requires a gradient if anything before is
    /// trained.
    fn leaf(&self) -> Result<Stream> {
        let tokens = self.tokens.f_detach()?.f_set_requires_grad(self.trained)?;
        Ok(Stream { tokens, layout: self.layout })
    }
}

/// The parts of one pass. The first run of a block also tracks gradients and then drops its graph,
/// because libtorch uses other kernels without gradient tracking.
struct Parts<'a, B> {
    backbone: &'a B,
    method: &'a dyn Seam,
    pass: Pass,
}

impl<B: Backbone> Parts<'_, B> {
    fn embed(&self, images: &Tensor) -> Result<Stream> {
        self.backbone.run_embed(images, self.method, self.pass)
    }

    fn run(&self, block: usize, stream: Stream) -> Result<Stream> {
        self.backbone.run_block(block, stream, self.method, self.pass)
    }

    fn pool(&self, stream: Stream) -> Result<Tensor> {
        self.backbone.run_pool(stream, self.method, self.pass)
    }

    /// Runs the blocks of `entered`, which start at block `first`, backward from the last one.
    /// `left` holds the gradient of the output of the last one. Returns the tokens with the
    /// gradient of the input of the first one.
    fn backward(&self, first: usize, entered: &[Cut], mut left: Tensor) -> Result<Tensor> {
        for (index, cut) in entered.iter().enumerate().rev() {
            if !left.requires_grad() {
                break;
            }
            let leaf = cut.leaf()?;
            let tokens = leaf.tokens.shallow_clone();
            hand_down(&self.run(first + index, leaf)?, &left.f_grad()?)?;
            left = tokens;
        }
        Ok(left)
    }
}

/// Runs backward from `stream` with `gradient` as the gradient of its tokens.
fn hand_down(stream: &Stream, gradient: &Tensor) -> Result<()> {
    let product = stream.tokens.f_mul(gradient)?;
    Ok(product.f_sum(None::<Kind>)?.f_backward()?)
}
