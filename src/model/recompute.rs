//! A forward and a backward pass that keep one block's activations at a time.

use tch::{Kind, Tensor};

use super::petl_model::PetlModel;
use crate::backbone::{Backbone, Forward, Pass, Stream};
use crate::error::Result;
use crate::seam::{Seam, TokenLayout};

impl<B: Backbone> PetlModel<B> {
    /// What `loss(&self.forward(images, true)?)?.backward()` does in a part of the memory: only
    /// the tokens between the blocks are kept, and each block is computed again when its gradients
    /// are due, which costs one more forward pass of every block but the last. Returns logits
    /// `[B, num_classes]` and loss, both detached.
    ///
    /// libtorch's generator seeds dropout and drop path as in [`PetlModel::forward`], and a block
    /// computed again draws the same. On a ViT the gradients are the same bits; on Swin, and of
    /// weights that blocks share (FacT's factors), they are summed up in another order.
    ///
    /// # Errors
    /// As [`PetlModel::forward`], and what `loss` returns; gradients may be there in part then.
    pub fn backward_recomputed(
        &self,
        images: &Tensor,
        loss: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        self.recompute(Start::Images(images), loss)
    }

    /// The same for what [`PetlModel::frozen_prefix`] gave of the images.
    ///
    /// # Errors
    /// As [`PetlModel::forward_from`], and what `loss` returns.
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
            // The last block goes backward at once.
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

/// Where a pass starts.
enum Start<'a> {
    Images(&'a Tensor),
    /// In front of this block.
    Block(usize, Stream),
}

/// What enters a block, cut off from what led to it.
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

    /// The start of a graph of its own, which takes a gradient if anything before is trained.
    fn leaf(&self) -> Result<Stream> {
        let tokens = self.tokens.f_detach()?.f_set_requires_grad(self.trained)?;
        Ok(Stream { tokens, layout: self.layout })
    }
}

/// The parts of one pass. Gradients are tracked in the first run of a block too, and dropped with
/// its graph: libtorch picks other kernels where they are off.
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

    /// Hands the gradient of what left the last of the blocks that were `entered`, from the
    /// `first` on, down through them; returns the tokens with the gradient of what entered them.
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

/// Runs backward from `stream` with this gradient.
fn hand_down(stream: &Stream, gradient: &Tensor) -> Result<()> {
    let product = stream.tokens.f_mul(gradient)?;
    Ok(product.f_sum(None::<Kind>)?.f_backward()?)
}
