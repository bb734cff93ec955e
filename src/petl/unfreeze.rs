//! Methods that train weights of the backbone itself: all weights, the biases (BitFit, Ben Zaken et
//! al., arXiv 2106.10199), or the layer norms.

use serde_json::Value;
use tch::{Kind, nn};

use super::params::Params;
use super::petl_method::{ActsFrom, PetlMethod};
use crate::backbone::Backbone;
use crate::error::{Error, Result};
use crate::nn::variable;
use crate::seam::{BackboneShape, NoMethod, Place, Seam};

/// The weights of the backbone itself that a method trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unfrozen {
    /// Every weight.
    All,
    /// Every bias.
    Biases,
    /// Weight and bias of every norm.
    Norms,
}

impl PetlMethod for Unfrozen {
    fn name(&self) -> &'static str {
        match self {
            Unfrozen::All => "full",
            Unfrozen::Biases => "bit_fit",
            Unfrozen::Norms => "layer_norm",
        }
    }

    fn config(&self) -> Value {
        Value::Object(Default::default())
    }

    fn validate(&self) -> Result<()> {
        Ok(())
    }

    fn needs(&self) -> &[Place] {
        match self {
            Unfrozen::All => &[],
            Unfrozen::Biases | Unfrozen::Norms => &[Place::Blocks],
        }
    }

    fn starts_as_identity(&self) -> bool {
        true
    }

    fn acts_from(&self, _: &BackboneShape) -> ActsFrom {
        ActsFrom::Embedding
    }

    fn build(&self, _: &mut Params, _: &BackboneShape) -> Result<Box<dyn Seam>> {
        Ok(Box::new(NoMethod))
    }

    fn unfreezes(&self) -> Vec<Unfrozen> {
        vec![*self]
    }

    fn folds_beside_others(&self) -> bool {
        true
    }
}

impl Unfrozen {
    /// Returns whether the method trains the weight `name`.
    fn takes(self, name: &str) -> bool {
        let mut segments = name.rsplit('.');
        let (leaf, layer) = (segments.next(), segments.next().unwrap_or_default());
        match self {
            Unfrozen::All => true,
            Unfrozen::Biases => leaf == Some("bias"),
            Unfrozen::Norms => layer.contains("norm"),
        }
    }

    /// Returns a copy of `backbone` in which variables under `vs`, with the names of the weights,
    /// replace the trained weights. `backbone` itself does not change, and the copy shares the
    /// other weights with it.
    ///
    /// The backbone must have as many of these weights as its shape says, because counts and audits
    /// come from the shape.
    pub(super) fn apply<B: Backbone>(self, vs: &nn::Path, backbone: &B) -> Result<B> {
        let mut trained = 0;
        let unfrozen = backbone.map_weights(&mut |name, weight| {
            if !(self.takes(name) && backbone.is_read(name)) {
                return Ok(weight.shallow_clone());
            }
            if weight.kind() == Kind::Int8 {
                let expected = "a trainable dtype: f32, bf16, f16 or f64";
                return Err(Error::config(format!("dtype of {name}"), expected, "int8"));
            }
            trained += weight.numel() as i64;
            variable(vs, name, weight)
        })?;
        let listed = self.num_params(&backbone.shape());
        if trained == listed {
            return Ok(unfrozen);
        }
        let expected = format!("every layer, so that {} trains {trained} weights", self.name());
        Err(Error::config("layers", expected, format!("layers with {listed} of them"))
            .in_config("BackboneShape"))
    }

    /// Returns the number of trained weights.
    pub(super) fn num_params(self, shape: &BackboneShape) -> i64 {
        let layers = shape.layers.iter();
        match self {
            Unfrozen::All => shape.num_feature_params,
            Unfrozen::Biases => {
                let listed: i64 = layers.filter(|l| l.bias).map(|layer| layer.outputs).sum();
                listed + shape.other_biases
            }
            Unfrozen::Norms => {
                let norms = layers.filter(|l| l.layer.is_norm());
                norms.map(|layer| layer.num_params()).sum::<i64>() + shape.other_norms
            }
        }
    }
}
