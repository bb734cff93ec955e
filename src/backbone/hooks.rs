//! The interface between a backbone and a method: [`Hooks`] around layers, [`BlockPass`] in a
//! block.

use tch::Tensor;

use super::Stream;
use crate::error::Result;
use crate::ffi::untouched;
use crate::nn::{Branch, DropPath, Linear, Norm, PatchEmbed};
use crate::seam::{Beside, Layer, NormOf, Seam, Site, SubLayer, TokenLayout};

/// The places of a method around the layers of a backbone, in one pass.
///
/// Run every layer that the backbone's shape lists with one of these functions, so that a method
/// can act after it.
#[derive(Clone, Copy, Debug)]
pub struct Hooks<'a> {
    method: &'a dyn Seam,
    train: bool,
}

impl<'a> Hooks<'a> {
    /// Creates the places of `method`. `train` turns dropout and drop path on.
    pub fn new(method: &'a dyn Seam, train: bool) -> Self {
        Hooks { method, train }
    }

    /// Returns the method.
    pub fn method(&self) -> &'a dyn Seam {
        self.method
    }

    /// Returns whether dropout and drop path are on.
    pub fn train(&self) -> bool {
        self.train
    }

    /// Passes a layer's `input` and `output` to the method and returns the output that the method
    /// makes of it. Use it for a layer type of your own; [`Hooks::linear`], [`Hooks::norm`] and
    /// [`Hooks::patch_embed`] call it.
    ///
    /// # Errors
    /// The errors of the method.
    pub fn after(&self, layer: Layer, input: &Tensor, output: Tensor) -> Result<Tensor> {
        self.method.after_layer(layer, input, output, self.train)
    }

    /// Runs a linear layer and then the method: `[.., in] -> [.., out]`.
    ///
    /// # Errors
    /// The errors of [`Linear::forward`] and of the method.
    pub fn linear(&self, layer: Layer, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        self.after(layer, x, linear.forward(x)?)
    }

    /// Runs a norm and then the method: `[.., C] -> [.., C]`.
    ///
    /// # Errors
    /// The errors of [`Norm::forward`] and of the method.
    pub fn norm(&self, layer: Layer, norm: &Norm, x: &Tensor) -> Result<Tensor> {
        self.after(layer, x, norm.forward(x)?)
    }

    /// Runs the patch embedding and then the method: `[B, 3, H, W] -> [B, N, C]`.
    ///
    /// # Errors
    /// The errors of [`PatchEmbed::forward`] and of the method.
    pub fn patch_embed(&self, embed: &PatchEmbed, images: &Tensor) -> Result<Tensor> {
        self.after(Layer::PatchEmbed, images, embed.forward(images)?)
    }

    /// Does the same as [`Hooks::norm`] for a norm whose dtype already fits `x`. It also returns
    /// the norm if it is a layer norm and the method did not change its output.
    fn norm_of<'n>(
        &self,
        layer: Layer,
        norm: &'n Norm,
        x: &Tensor,
    ) -> Result<(Tensor, Option<NormOf<'n>>)> {
        let output = norm.apply(x)?;
        let normed = self.after(layer, x, output.shallow_clone())?;
        // Nothing recomputes the output of an RMS norm or of a norm without a bias.
        let of = norm.bias.as_ref().filter(|_| !norm.rms && untouched(&normed, &output));
        let of = of.map(|bias| NormOf { weight: &norm.weight, bias, eps: norm.eps });
        Ok((normed, of))
    }
}

/// The settings of one block in a pass.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct BlockPass<'a> {
    /// Number of the block, counted from 0 through the whole backbone.
    pub block: usize,
    /// The places of the method around layers.
    pub hooks: Hooks<'a>,
    /// Drop path of this block. [`BlockPass::sub_layer`] draws it for each branch.
    pub drop_path: DropPath,
    /// Whether only [`Backbone::pool`](super::Backbone::pool) reads the output of the block. The
    /// block may then return only the tokens that pooling reads. A block that always returns all
    /// tokens is also correct.
    pub pooled_only: bool,
}

impl BlockPass<'_> {
    /// Runs the method's place before the block, where prompts join the prefix tokens. The block
    /// then uses the layout of the result.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) if the tokens do not match their layout; the errors of
    /// the method.
    pub fn enter(&self, stream: Stream) -> Result<Stream> {
        let Stream { tokens, layout } = stream;
        let entered = self.hooks.method.entering(self.block, tokens, layout, self.hooks.train);
        let (tokens, layout) = entered?;
        // A map `[B, C, H, W]` has no layout.
        if let [_, _, c] = tokens.size()[..] {
            layout.check(&tokens, c)?;
        }
        Ok(Stream { tokens, layout })
    }

    /// Runs a pre-norm sub-layer: adds `f` of the normed tokens to the residual stream. The method
    /// acts at its places before, beside and after the sub-layer.
    ///
    /// The norm is [`Layer::Norm1`] for [`SubLayer::Attention`] and [`Layer::Norm2`] for
    /// [`SubLayer::Mlp`]. `f` maps `[B', T, C]` to `[B', T, C]`, including layer scale. B' is
    /// smaller than B if drop path drops samples, and `f` is not called if it drops all of them.
    /// The method's branch beside the sub-layer has its own draw of drop path.
    ///
    /// # Errors
    /// The errors of `f` and of the method.
    pub fn sub_layer(
        &self,
        sub_layer: SubLayer,
        norm: &Norm,
        stream: Stream,
        f: impl FnOnce(Tensor) -> Result<Tensor>,
    ) -> Result<Stream> {
        let Stream { tokens, layout } = stream;
        let norm = norm.beside(&tokens)?;
        let (normed, of) = self.norm_of(sub_layer, &norm, &tokens)?;
        let tokens = self.join(sub_layer, tokens, (&normed, of), &layout, |branch| {
            f(self.before(sub_layer, branch.select(&normed)?)?)
        })?;
        Ok(Stream { tokens, layout })
    }

    /// Runs the norm before a sub-layer. Also returns the norm itself if it is a layer norm whose output
    /// the method did not change.
    pub(super) fn norm_of<'n>(
        &self,
        sub_layer: SubLayer,
        norm: &'n Norm,
        tokens: &Tensor,
    ) -> Result<(Tensor, Option<NormOf<'n>>)> {
        let layer = match sub_layer {
            SubLayer::Attention => Layer::Norm1(self.block),
            SubLayer::Mlp => Layer::Norm2(self.block),
        };
        self.hooks.norm_of(layer, norm, tokens)
    }

    /// Runs the method's place before a sub-layer on its `input`.
    pub(super) fn before(&self, sub_layer: SubLayer, input: Tensor) -> Result<Tensor> {
        let site = Site { block: self.block, sub_layer };
        self.hooks.method.before_sub_layer(site, input, self.hooks.train)
    }

    /// Adds the sub-layer `f` and the method's branch beside it to the residual stream. Each has
    /// its own draw of drop path.
    pub(super) fn join(
        &self,
        sub_layer: SubLayer,
        tokens: Tensor,
        (normed, norm): (&Tensor, Option<NormOf>),
        layout: &TokenLayout,
        f: impl FnOnce(&Branch) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let Hooks { method, train } = self.hooks;
        let site = Site { block: self.block, sub_layer };
        // The raw tokens are kept only for a method that may read them.
        let raw = method.is_beside(site).then(|| tokens.shallow_clone());
        let branch = self.drop_path.draw(&tokens, train)?;
        let mut sum = tokens;
        if !branch.is_empty() {
            let _rows = branch.enter();
            let output = method.after_sub_layer(site, f(&branch)?, layout, train)?;
            sum = branch.add(&sum, &output)?;
        }
        if let Some(raw) = &raw {
            let branch = &self.drop_path.draw(&sum, train)?;
            if !branch.is_empty() {
                let _rows = branch.enter();
                let at = Beside { site, raw, normed, norm, layout, branch, train };
                sum = method.beside(&at, sum)?;
            }
        }
        Ok(sum)
    }
}
