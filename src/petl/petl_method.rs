//! [`PetlMethod`]: the trait that every method implements, also a method of another crate.

use std::fmt::Debug;

use serde::Serialize;
use serde_json::Value;

use super::params::Params;
use super::unfreeze::Unfrozen;
use crate::error::{Error, Result};
use crate::seam::{BackboneShape, Place, Seam};

/// The first part of a backbone that a method changes. The parts before it compute the same as in
/// the frozen backbone, so a training run may compute them once for each image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ActsFrom {
    /// The embedding before the blocks, or a weight of the backbone itself.
    Embedding,
    /// This block, counted from 0.
    Block(usize),
    /// Only the head. The features are those of the frozen backbone.
    Head,
}

/// A method of parameter-efficient transfer learning: its name and config, the places that it needs
/// of a backbone, its weights, and its changes to the forward pass as a [`Seam`].
///
/// The config of every built-in method implements this trait. Implement it for a config of your own
/// and pass it to [`Method::custom`](super::Method::custom). The resulting
/// [`Method`](super::Method) trains, saves, is counted by [`audit`](fn@crate::audit), and composes
/// with other methods like a built-in one. `examples/own_method.rs` is a complete program.
/// `convpass::testing` (feature `testing`) checks what an implementation has to promise.
///
/// ```
/// use convpass::petl::{ActsFrom, Init, Params, PetlMethod};
/// use convpass::seam::{BackboneShape, Layer, Place, Seam};
/// use convpass::{Error, Method, PetlConfig, Result};
/// use serde::{Deserialize, Serialize};
/// use tch::Tensor;
///
/// /// A trained bias after the second linear layer of each MLP.
/// #[derive(Clone, Debug, Serialize, Deserialize)]
/// struct MlpBias {
///     start: f64,
/// }
///
/// impl PetlMethod for MlpBias {
///     fn name(&self) -> &'static str {
///         "mlp_bias"
///     }
///     fn config(&self) -> serde_json::Value {
///         serde_json::json!({ "start": self.start })
///     }
///     fn validate(&self) -> Result<()> {
///         if self.start.is_finite() {
///             return Ok(());
///         }
///         let (field, found) = ("start".to_owned(), self.start.to_string());
///         Err(Error::config(field, "finite", found))
///     }
///     fn needs(&self) -> &[Place] {
///         &[Place::Blocks]
///     }
///     fn starts_as_identity(&self) -> bool {
///         self.start == 0.0
///     }
///     fn acts_from(&self, _: &BackboneShape) -> ActsFrom {
///         ActsFrom::Block(0)
///     }
///     fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
///         let mut bias = |(block, c): (usize, &i64)| {
///             let init = Init::Constant(self.start);
///             params.get(format_args!("blocks.{block}.mlp_bias"), &[*c], init)
///         };
///         let biases = shape.block_dims.iter().enumerate().map(&mut bias);
///         Ok(Box::new(Biases(biases.collect::<Result<_>>()?)))
///     }
/// }
///
/// #[derive(Debug)]
/// struct Biases(Vec<Tensor>);
///
/// impl Seam for Biases {
///     fn after_layer(&self, layer: Layer, _: &Tensor, output: Tensor, _: bool) -> Result<Tensor> {
///         match layer {
///             Layer::Fc2(block) => Ok(output.f_add(&self.0[block])?),
///             _ => Ok(output),
///         }
///     }
/// }
///
/// let config = PetlConfig::new(Method::custom(MlpBias { start: 0.0 }), 10);
/// assert_eq!(config.method.name(), "mlp_bias");
/// ```
pub trait PetlMethod: Debug + Send + Sync {
    /// Returns the name in configs, files, tables and errors, in `snake_case`.
    fn name(&self) -> &'static str;

    /// Returns the config as a JSON object. Two methods are equal if their names and configs are.
    /// An adapter file stores both, and a reader creates the method from them.
    fn config(&self) -> Value;

    /// Checks the config. It does not need a backbone.
    ///
    /// # Errors
    /// Returns [`Error::Config`] for the first invalid field.
    fn validate(&self) -> Result<()>;

    /// Returns the places that the method needs and that some backbones do not have. A backbone
    /// without one of them is rejected with [`Error::Unsupported`]. Return `&[]` for a method that
    /// acts only on layers that it finds in [`BackboneShape::layers`].
    fn needs(&self) -> &[Place];

    /// Returns whether the untrained model computes exactly the features of the frozen backbone in
    /// evaluation.
    fn starts_as_identity(&self) -> bool;

    /// Returns the first part of the backbone whose computation the method may change.
    fn acts_from(&self, shape: &BackboneShape) -> ActsFrom;

    /// Declares every weight of the method through `params`, in a fixed order, and returns the seam
    /// that uses these weights on a backbone of shape `shape`.
    ///
    /// It is also called to count the weights. It must therefore not compute anything from them,
    /// and its cost should not grow with their size.
    ///
    /// # Errors
    /// Returns the errors of `params`, and [`Error::Config`] if the config does not fit the
    /// backbone.
    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>>;

    /// Returns the weights of the backbone itself that the method trains as copies. The default is
    /// none, for a method that declares all its weights in [`PetlMethod::build`].
    fn unfreezes(&self) -> Vec<Unfrozen> {
        Vec::new()
    }

    /// Returns whether [`Method::LowBit`](super::Method::LowBit) may store the weights at few bits.
    fn can_be_low_bit(&self) -> bool {
        self.unfreezes().is_empty()
    }

    /// Returns whether the method can still be merged into the backbone's weights
    /// ([`Seam::can_merge`]) while other methods act on the same backbone. This holds if the merged
    /// weights of each layer do not depend on changes before that layer.
    fn folds_beside_others(&self) -> bool {
        false
    }
}

/// Converts a config of this crate to JSON. This cannot fail, because a config holds only numbers,
/// strings and lists of them.
pub(super) fn json(config: &impl Serialize) -> Value {
    serde_json::to_value(config).unwrap_or_default()
}

/// Returns an error if the backbone does not have a place that the method needs.
pub(super) fn check_places(method: &dyn PetlMethod, shape: &BackboneShape) -> Result<()> {
    let lack = shape.lacks.iter().find(|(place, _)| method.needs().contains(place));
    match lack {
        None => Ok(()),
        Some((_, reason)) => {
            let (method, backbone) = (method.name(), shape.family);
            Err(Error::Unsupported { method, backbone, reason })
        }
    }
}
