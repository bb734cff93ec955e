//! A forward and a backward pass that keep one block's activations at a time.

use tch::{Kind, Tensor};

use super::petl_model::PetlModel;
use crate::backbone::{Backbone, Pass, Stream};
use crate::error::Result;
use crate::seam::Seam;

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
        let (pass, kind) = (self.training_pass()?, self.backbone().kind());
        let result = self.with_adapted(kind, |backbone, method| {
            let parts = Parts { backbone, method, pass };
            let entered = parts.forward(images)?;
            let Some((top, below)) = entered.split_last() else {
                // No block: nothing to compute again.
                let logits = self.classify(&parts.pool(parts.embed(images)?)?)?;
                return finish(&logits, loss);
            };
            let (block, leaf) = (below.len(), parts.leaf(top));
            let tokens = leaf.tokens.shallow_clone();
            let features = parts.pool(parts.run(block, leaf)?)?;
            let result = finish(&self.classify(&features)?, loss)?;
            parts.backward(images, below, tokens)?;
            Ok(result)
        });
        pass.noise.leave();
        result
    }
}

fn finish(
    logits: &Tensor,
    loss: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<(Tensor, Tensor)> {
    let loss = loss(logits)?;
    loss.f_backward()?;
    Ok((logits.f_detach()?, loss.f_detach()?))
}

/// What enters a block, without what led to it.
struct Entered {
    stream: Stream,
    /// Whether anything before the block is trained.
    trained: bool,
}

/// The parts of one pass.
struct Parts<'a, B> {
    backbone: &'a B,
    method: &'a dyn Seam,
    pass: Pass,
}

impl<B: Backbone> Parts<'_, B> {
    fn embed(&self, images: &Tensor) -> Result<Stream> {
        self.backbone.embed(images, self.method, self.pass)
    }

    fn run(&self, block: usize, stream: Stream) -> Result<Stream> {
        self.backbone.run_block(block, stream, self.method, self.pass)
    }

    fn pool(&self, stream: Stream) -> Result<Tensor> {
        self.backbone.pool(stream, self.method, self.pass)
    }

    /// What enters each block. Gradients are tracked and dropped again: libtorch picks other
    /// kernels where they are off.
    fn forward(&self, images: &Tensor) -> Result<Vec<Entered>> {
        let mut entered: Vec<Entered> = Vec::with_capacity(self.backbone.num_blocks());
        for block in 0..self.backbone.num_blocks() {
            let stream = match entered.last() {
                None => self.embed(images)?,
                Some(before) => self.run(block - 1, self.leaf(before))?,
            };
            let trained = stream.tokens.requires_grad();
            let stream = Stream { tokens: stream.tokens.f_detach()?, layout: stream.layout };
            entered.push(Entered { stream, trained });
        }
        Ok(entered)
    }

    /// The start of a graph of its own, which takes a gradient if anything before is trained.
    fn leaf(&self, entered: &Entered) -> Stream {
        let tokens = entered.stream.tokens.detach().set_requires_grad(entered.trained);
        Stream { tokens, layout: entered.stream.layout }
    }

    /// Hands the gradient of what left the last of the blocks that were `entered` down through
    /// them.
    fn backward(&self, images: &Tensor, entered: &[Entered], mut left: Tensor) -> Result<()> {
        for (block, entered) in entered.iter().enumerate().rev() {
            if !left.requires_grad() {
                return Ok(());
            }
            let leaf = self.leaf(entered);
            let tokens = leaf.tokens.shallow_clone();
            hand_down(&self.run(block, leaf)?, &left.f_grad()?)?;
            left = tokens;
        }
        match left.requires_grad() {
            true => hand_down(&self.embed(images)?, &left.f_grad()?),
            false => Ok(()),
        }
    }
}

/// Runs backward from `stream` with this gradient.
fn hand_down(stream: &Stream, gradient: &Tensor) -> Result<()> {
    let product = stream.tokens.f_mul(gradient)?;
    Ok(product.f_sum(None::<Kind>)?.f_backward()?)
}
