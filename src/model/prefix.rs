//! The first part of a pass, whose result is the same for an image every time.

use tch::Tensor;

use super::petl_model::PetlModel;
use crate::backbone::{Backbone, Forward, Pass, Stream};
use crate::error::{Error, Result};
use crate::petl::ActsFrom;
use crate::seam::NoMethod;

impl<B: Backbone> PetlModel<B> {
    /// Returns the number of leading blocks whose output for an image is the same in every pass.
    /// The embedding before them is the same too. Their output can be computed once, because
    /// nothing in them is trained or random. Returns `None` if not even the embedding stays the
    /// same.
    ///
    /// Drop path is random from the second block on, unless its rate is zero.
    pub fn frozen_blocks(&self) -> Option<usize> {
        let count = self.backbone().num_blocks();
        let steady = if self.config().drop_path == 0.0 { count } else { count.min(1) };
        match self.config().method.inner().acts_from(&self.backbone().shape()) {
            ActsFrom::Embedding => None,
            ActsFrom::Block(block) => Some(steady.min(block)),
            ActsFrom::Head => Some(steady),
        }
    }

    /// Computes the output of those blocks for images `[B, 3, H, W]`, in the dtype that the
    /// backbone computes in.
    ///
    /// # Errors
    /// [`Error::Input`] if the images do not fit the backbone; [`Error::Config`] if the embedding
    /// does not stay the same ([`PetlModel::frozen_blocks`]).
    pub fn frozen_prefix(&self, images: &Tensor) -> Result<Stream> {
        let Some(count) = self.frozen_blocks() else {
            let found = self.config().method.name();
            return Err(Error::config("method", "one that does not change the embedding", found));
        };
        tch::no_grad(|| {
            let (backbone, pass) = (self.backbone(), Pass::default());
            let start = backbone.run_embed(images, &NoMethod, pass)?;
            (0..count)
                .try_fold(start, |stream, block| backbone.run_block(block, stream, &NoMethod, pass))
        })
    }

    /// Continues [`PetlModel::forward`] from the output of [`PetlModel::frozen_prefix`]. The logits
    /// and the random draws are the same as those of the whole pass.
    ///
    /// # Errors
    /// [`Error::Input`] if the tokens do not match their layout; an error of libtorch if the stream
    /// is from another backbone.
    pub fn forward_from(&self, stream: Stream, train: bool) -> Result<Tensor> {
        let first = self.frozen_blocks().unwrap_or_default();
        self.check(first, &stream)?;
        let features = self.run(train, |backbone, method, pass| {
            backbone.forward_from(first, stream, method, pass)
        });
        self.classify(&features?)
    }
    /// Checks that the layout of tokens `[B, P + N, C]` before block `first` gives P + N. A map
    /// `[B, C, H, W]` has no such layout. The last block may return only the pooled token, so its
    /// output is not checked.
    pub(super) fn check(&self, first: usize, stream: &Stream) -> Result<()> {
        match stream.tokens.size()[..] {
            [_, _, c] if first < self.backbone().num_blocks() => {
                stream.layout.check(&stream.tokens, c)
            }
            _ => Ok(()),
        }
    }
}
