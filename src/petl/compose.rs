//! Several methods at once: their places are called in order.

use tch::Tensor;

use crate::error::Result;
use crate::seam::{Beside, Layer, LayerWeights, Seam, Site, TokenLayout};

/// A list of methods is a method. What one makes of a place's tokens, the next reads; branches
/// beside one sub-layer share a draw of drop path.
#[derive(Debug)]
pub(super) struct Composed {
    pub(super) methods: Vec<Box<dyn Seam>>,
    pub(super) can_merge: bool,
}

impl Seam for Composed {
    fn entering(
        &self,
        block: usize,
        tokens: Tensor,
        layout: TokenLayout,
        train: bool,
    ) -> Result<(Tensor, TokenLayout)> {
        self.methods.iter().try_fold((tokens, layout), |(tokens, layout), method| {
            method.entering(block, tokens, layout, train)
        })
    }

    fn after_layer(
        &self,
        layer: Layer,
        input: &Tensor,
        output: Tensor,
        train: bool,
    ) -> Result<Tensor> {
        self.methods
            .iter()
            .try_fold(output, |output, method| method.after_layer(layer, input, output, train))
    }

    fn before_sub_layer(&self, site: Site, input: Tensor, train: bool) -> Result<Tensor> {
        self.methods
            .iter()
            .try_fold(input, |input, method| method.before_sub_layer(site, input, train))
    }

    fn beside(&self, at: &Beside, residual: Tensor) -> Result<Tensor> {
        self.methods.iter().try_fold(residual, |residual, method| method.beside(at, residual))
    }

    fn is_beside(&self, site: Site) -> bool {
        self.methods.iter().any(|method| method.is_beside(site))
    }

    fn after_sub_layer(
        &self,
        site: Site,
        output: Tensor,
        layout: &TokenLayout,
        train: bool,
    ) -> Result<Tensor> {
        self.methods
            .iter()
            .try_fold(output, |output, method| method.after_sub_layer(site, output, layout, train))
    }

    fn can_merge(&self) -> bool {
        self.can_merge
    }

    fn merge(&self, layer: Layer, weights: LayerWeights) -> Result<LayerWeights> {
        self.methods.iter().try_fold(weights, |weights, method| method.merge(layer, weights))
    }
}
