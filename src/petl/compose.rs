//! Several methods as one: each place calls them in order.

use serde_json::Value;
use tch::Tensor;

use super::Method;
use super::params::Params;
use super::petl_method::{ActsFrom, PetlMethod, json};
use super::unfreeze::Unfrozen;
use crate::error::{Error, Result};
use crate::seam::{BackboneShape, Beside, Layer, LayerWeights, Place, Seam, Site, TokenLayout};

/// The largest permitted nesting of lists of methods. A much deeper config could be written to a
/// file but not be read again.
const MAX_NESTING: usize = 16;

/// Returns how many lists of methods are nested within each other, including this one.
pub(super) fn nesting(methods: &[Method]) -> usize {
    1 + methods.iter().map(Method::nesting).max().unwrap_or_default()
}

/// A list of methods is a method.
impl PetlMethod for Vec<Method> {
    fn name(&self) -> &'static str {
        "compose"
    }

    fn config(&self) -> Value {
        Value::Object([("methods".to_owned(), json(self))].into_iter().collect())
    }

    fn validate(&self) -> Result<()> {
        if self.is_empty() {
            return Err(Error::config("methods", "at least one", 0).in_config("Method::Compose"));
        }
        let nesting = nesting(self);
        if nesting > MAX_NESTING {
            let expected = format!("at most {MAX_NESTING} nested lists");
            return Err(Error::config("methods", expected, nesting).in_config("Method::Compose"));
        }
        let prompts = self.iter().map(Method::prompts).sum::<usize>();
        if prompts > 1 {
            return Err(Error::config("methods", "at most one with prompts", prompts)
                .in_config("Method::Compose"));
        }
        self.iter().try_for_each(Method::validate)
    }

    /// `build` checks the needs of each method.
    fn needs(&self) -> &[Place] {
        &[]
    }

    fn starts_as_identity(&self) -> bool {
        self.iter().all(Method::starts_as_identity)
    }

    fn acts_from(&self, shape: &BackboneShape) -> ActsFrom {
        let parts = self.iter().map(|method| method.inner().acts_from(shape));
        parts.min().unwrap_or(ActsFrom::Head)
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        let built = self.iter().map(|method| method.build_over(params, shape));
        let methods = built.collect::<Result<Vec<_>>>()?;
        // A method that merges into the layer after its place would lose the change that another
        // method makes between the place and the layer.
        let together = self.len() == 1 || self.folds_beside_others();
        let can_merge = together && methods.iter().all(|method| method.can_merge());
        Ok(Box::new(Composed { methods, can_merge }))
    }

    fn unfreezes(&self) -> Vec<Unfrozen> {
        self.iter().flat_map(|method| method.inner().unfreezes()).collect()
    }

    fn can_be_low_bit(&self) -> bool {
        self.iter().all(|method| method.inner().can_be_low_bit())
    }

    fn folds_beside_others(&self) -> bool {
        self.iter().all(|method| method.inner().folds_beside_others())
    }
}

/// Passes the tokens that one method returns at a place to the next method. Branches parallel to
/// one sub-layer share one draw of drop path.
#[derive(Debug)]
struct Composed {
    methods: Vec<Box<dyn Seam>>,
    can_merge: bool,
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
