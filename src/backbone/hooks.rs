//! The seam, as the code of a backbone calls it: [`Hooks`] around layers, [`BlockPass`] in a block.

use tch::Tensor;

use super::Stream;
use crate::error::Result;
use crate::ffi::untouched;
use crate::nn::{Branch, DropPath, LayerNorm, Linear, PatchEmbed};
use crate::seam::{Beside, Layer, NormOf, Seam, Site, SubLayer, TokenLayout};

/// The method's places around the layers of a backbone, in one pass.
///
/// Every layer that the backbone's shape lists is run through one of these functions, so that a
/// method can act after it.
#[derive(Clone, Copy, Debug)]
pub struct Hooks<'a> {
    method: &'a dyn Seam,
    train: bool,
}

impl<'a> Hooks<'a> {
    /// The places of `method`; `train` turns dropout and drop path on.
    pub fn new(method: &'a dyn Seam, train: bool) -> Self {
        Hooks { method, train }
    }

    /// The method itself.
    pub fn method(&self) -> &'a dyn Seam {
        self.method
    }

    /// Whether dropout and drop path are on.
    pub fn train(&self) -> bool {
        self.train
    }

    /// Hands a layer's `input` and `output` to the method and returns what it makes of the output.
    /// It is for a layer of the caller's own; [`Hooks::linear`], [`Hooks::norm`] and
    /// [`Hooks::patch_embed`] call it.
    ///
    /// # Errors
    /// What the method returns.
    pub fn after(&self, layer: Layer, input: &Tensor, output: Tensor) -> Result<Tensor> {
        self.method.after_layer(layer, input, output, self.train)
    }

    /// Runs a linear layer, and the method after it: `[.., in] -> [.., out]`.
    ///
    /// # Errors
    /// As [`Linear::forward`], and what the method returns.
    pub fn linear(&self, layer: Layer, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        self.after(layer, x, linear.forward(x)?)
    }

    /// Runs a layer norm, and the method after it: `[.., C] -> [.., C]`.
    ///
    /// # Errors
    /// As [`LayerNorm::forward`], and what the method returns.
    pub fn norm(&self, layer: Layer, norm: &LayerNorm, x: &Tensor) -> Result<Tensor> {
        self.after(layer, x, norm.forward(x)?)
    }

    /// Cuts images into patches, and runs the method after that:
    /// `[B, 3, H, W] -> [B, N, C]`.
    ///
    /// # Errors
    /// As [`PatchEmbed::forward`], and what the method returns.
    pub fn patch_embed(&self, embed: &PatchEmbed, images: &Tensor) -> Result<Tensor> {
        self.after(Layer::PatchEmbed, images, embed.forward(images)?)
    }

    /// As [`Hooks::norm`] of a norm in the dtype that goes with `x`, and that norm itself where
    /// the method left its output alone.
    fn norm_of<'n>(
        &self,
        layer: Layer,
        norm: &'n LayerNorm,
        x: &Tensor,
    ) -> Result<(Tensor, Option<NormOf<'n>>)> {
        let output = norm.apply(x)?;
        let normed = self.after(layer, x, output.shallow_clone())?;
        let LayerNorm { weight, bias, eps } = norm;
        let of = untouched(&normed, &output).then_some(NormOf { weight, bias, eps: *eps });
        Ok((normed, of))
    }
}

/// One block's part in a pass.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct BlockPass<'a> {
    /// The block's number, from 0 through the whole backbone.
    pub block: usize,
    /// The method's places around layers.
    pub hooks: Hooks<'a>,
    /// The drop path of this block; [`BlockPass::sub_layer`] draws it for each branch.
    pub drop_path: DropPath,
    /// Whether nothing but [`Backbone::pool`](super::Backbone::pool) reads what the block returns.
    /// It may then return those tokens alone that pooling reads. A block that always returns all
    /// tokens is right too.
    pub pooled_only: bool,
}

impl BlockPass<'_> {
    /// The method's place in front of the block, where prompts join the prefix tokens. The layout
    /// of the result is the block's.
    ///
    /// # Errors
    /// What the method returns.
    pub fn enter(&self, stream: Stream) -> Result<Stream> {
        let Stream { tokens, layout } = stream;
        let entered = self.hooks.method.entering(self.block, tokens, layout, self.hooks.train);
        let (tokens, layout) = entered?;
        Ok(Stream { tokens, layout })
    }

    /// A pre-norm sub-layer: adds `f` of the normed tokens into the residual stream, and what the
    /// method has at its places in front of it, beside it and after it.
    ///
    /// The norm is [`Layer::Norm1`] in front of [`SubLayer::Attention`] and [`Layer::Norm2`] in
    /// front of [`SubLayer::Mlp`]. `f` maps `[B', T, C]` to `[B', T, C]`, layer scale included. Its
    /// batch is smaller where drop path leaves samples out, and it is not called where no sample is
    /// kept. What is beside the sub-layer draws drop path for itself.
    ///
    /// # Errors
    /// What `f` and the method return.
    pub fn sub_layer(
        &self,
        sub_layer: SubLayer,
        norm: &LayerNorm,
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

    /// The norm in front of a sub-layer, with the norm itself where the method left it alone.
    pub(super) fn norm_of<'n>(
        &self,
        sub_layer: SubLayer,
        norm: &'n LayerNorm,
        tokens: &Tensor,
    ) -> Result<(Tensor, Option<NormOf<'n>>)> {
        let layer = match sub_layer {
            SubLayer::Attention => Layer::Norm1(self.block),
            SubLayer::Mlp => Layer::Norm2(self.block),
        };
        self.hooks.norm_of(layer, norm, tokens)
    }

    /// What a sub-layer reads of the `input` for it.
    pub(super) fn before(&self, sub_layer: SubLayer, input: Tensor) -> Result<Tensor> {
        let site = Site { block: self.block, sub_layer };
        self.hooks.method.before_sub_layer(site, input, self.hooks.train)
    }

    /// Adds the sub-layer `f` and what the method has beside it into the residual stream; each
    /// draws drop path for itself.
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
        // Held only for a method that may read it.
        let raw = method.is_beside(site).then(|| tokens.shallow_clone());
        let branch = self.drop_path.draw(&tokens, train)?;
        let mut sum = tokens;
        if !branch.is_empty() {
            let output = method.after_sub_layer(site, f(&branch)?, layout, train)?;
            sum = branch.add(&sum, &output)?;
        }
        if let Some(raw) = &raw {
            let branch = &self.drop_path.draw(&sum, train)?;
            if !branch.is_empty() {
                let at = Beside { site, raw, normed, norm, layout, branch, train };
                sum = method.beside(&at, sum)?;
            }
        }
        Ok(sum)
    }
}
