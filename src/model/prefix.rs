//! The part of a pass that is the same for an image every time.

use tch::Tensor;

use super::petl_model::PetlModel;
use crate::backbone::{Backbone, Forward, Pass, Stream};
use crate::error::{Error, Result};
use crate::petl::ActsFrom;
use crate::seam::NoMethod;

impl<B: Backbone> PetlModel<B> {
    /// Number of blocks, the embedding before them included, that an image's tokens leave the same
    /// in every pass, so that they may be computed once: nothing in them is trained or drawn at
    /// random. `None` if not even the embedding is such.
    ///
    /// Drop path is drawn from the second block on, unless its rate is zero.
    pub fn frozen_blocks(&self) -> Option<usize> {
        let count = self.backbone().num_blocks();
        let steady = if self.config().drop_path == 0.0 { count } else { count.min(1) };
        match self.config().method.inner().acts_from(&self.backbone().shape()) {
            ActsFrom::Embedding => None,
            ActsFrom::Block(block) => Some(steady.min(block)),
            ActsFrom::Head => Some(steady),
        }
    }

    /// What leaves those blocks of images `[B, 3, H, W]`, in the kind that the backbone
    /// computes in.
    ///
    /// # Errors
    /// [`Error::Input`] if the images do not fit the backbone; [`Error::Config`] if there is
    /// nothing frozen ([`PetlModel::frozen_blocks`]).
    pub fn frozen_prefix(&self, images: &Tensor) -> Result<Stream> {
        let Some(count) = self.frozen_blocks() else {
            let found = self.config().method.name();
            return Err(Error::config("method", "one that leaves the embedding as it is", found));
        };
        tch::no_grad(|| {
            let (backbone, pass) = (self.backbone(), Pass::default());
            let start = backbone.run_embed(images, &NoMethod, pass)?;
            (0..count)
                .try_fold(start, |stream, block| backbone.run_block(block, stream, &NoMethod, pass))
        })
    }

    /// [`PetlModel::forward`] from what [`PetlModel::frozen_prefix`] gave on, for the same logits
    /// and the same draws.
    ///
    /// # Errors
    /// [`Error::Input`] for tokens that are not as their layout says; what libtorch says of a
    /// stream of another backbone.
    pub fn forward_from(&self, stream: Stream, train: bool) -> Result<Tensor> {
        let first = self.frozen_blocks().unwrap_or_default();
        self.check(first, &stream)?;
        let features = self.run(train, |backbone, method, pass| {
            backbone.forward_from(first, stream, method, pass)
        });
        self.classify(&features?)
    }
    /// Refuses tokens `[B, P + N, C]` in front of block `first` whose layout does not say P + N. A
    /// map `[B, C, H, W]` has no such layout, and the last block may leave the pooled token alone.
    pub(super) fn check(&self, first: usize, stream: &Stream) -> Result<()> {
        match stream.tokens.size()[..] {
            [_, _, c] if first < self.backbone().num_blocks() => {
                stream.layout.check(&stream.tokens, c)
            }
            _ => Ok(()),
        }
    }
}
