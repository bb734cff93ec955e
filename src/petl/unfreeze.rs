//! Methods that train weights of the backbone itself: all, the biases (BitFit, Ben Zaken et al.,
//! arXiv 2106.10199), or the layer norms.

use tch::{Kind, nn};

use crate::backbone::Backbone;
use crate::error::{Error, Result};
use crate::nn::variable;
use crate::seam::BackboneShape;

/// Which weights are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfrozen {
    All,
    Biases,
    Norms,
}

impl Unfrozen {
    /// Whether the weight of that name is trained.
    fn takes(self, name: &str) -> bool {
        let mut segments = name.rsplit('.');
        let (leaf, layer) = (segments.next(), segments.next().unwrap_or_default());
        match self {
            Unfrozen::All => true,
            Unfrozen::Biases => leaf == Some("bias"),
            Unfrozen::Norms => layer.contains("norm"),
        }
    }

    /// A backbone over variables under `vs`, of the weights' own names, in place of those weights;
    /// `backbone` keeps its own and shares the rest.
    pub(super) fn apply<B: Backbone>(self, vs: &nn::Path, backbone: &B) -> Result<B> {
        backbone.map_weights(&mut |name, weight| match self.takes(name) && backbone.is_read(name) {
            true if weight.kind() == Kind::Int8 => {
                let expected = "one that can be trained: f32, bf16, f16 or f64";
                Err(Error::config(format!("kind of {name}"), expected, "int8"))
            }
            true => variable(vs, name, weight),
            false => Ok(weight.shallow_clone()),
        })
    }

    /// Number of weights that are trained.
    pub(super) fn num_params(self, shape: &BackboneShape) -> i64 {
        let layers = shape.layers.iter();
        match self {
            Unfrozen::All => shape.num_feature_params,
            Unfrozen::Biases => layers.filter(|layer| layer.bias).map(|layer| layer.outputs).sum(),
            Unfrozen::Norms => {
                layers.filter(|l| l.layer.is_norm()).map(|layer| 2 * layer.outputs).sum()
            }
        }
    }
}
