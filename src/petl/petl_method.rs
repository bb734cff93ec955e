//! [`PetlMethod`]: what a method tells of itself, whichever crate it is from.

use std::fmt::Debug;

use serde::Serialize;
use serde_json::Value;

use super::params::Params;
use super::unfreeze::Unfrozen;
use crate::error::{Error, Result};
use crate::seam::{BackboneShape, Place, Seam};

/// The first part of a backbone that a method acts on. Everything in front of it computes what the
/// frozen backbone computes, so that a training run may compute it once for each image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ActsFrom {
    /// The embedding in front of the blocks, or a weight of the backbone itself.
    Embedding,
    /// This block, counted from 0.
    Block(usize),
    /// The head alone: the features are those of the frozen backbone.
    Head,
}

/// A method of parameter-efficient transfer learning: what it is called, what it needs of a
/// backbone, which weights it trains, and what it does with them at the places of a [`Seam`].
///
/// Every built-in method implements it on its config. Implement it on a config of your own, and
/// [`Method::custom`](super::Method::custom) makes a [`Method`](super::Method) of it, which trains,
/// saves, is counted by [`audit`](fn@crate::audit), and composes with others like a built-in one.
/// `examples/own_method.rs` is a complete program; `convpass::testing` (feature `testing`) checks
/// what this trait promises.
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
    /// The name in configs, files, tables and errors, in `snake_case`.
    fn name(&self) -> &'static str;

    /// The config as JSON, an object. Two methods are equal if name and config are; an adapter
    /// file keeps both, and whoever loads it makes the method from them.
    fn config(&self) -> Value;

    /// Checks the config, without a backbone at hand.
    ///
    /// # Errors
    /// [`Error::Config`] with the first field that is wrong.
    fn validate(&self) -> Result<()>;

    /// What it acts on that not every backbone has; a backbone that lacks one of these is refused
    /// with [`Error::Unsupported`]. `&[]` for a method that acts on nothing but layers that it
    /// finds in [`BackboneShape::layers`].
    fn needs(&self) -> &[Place];

    /// Whether the untrained model has exactly the frozen backbone's features, in evaluation.
    fn starts_as_identity(&self) -> bool;

    /// The first part of the backbone whose computation the method changes or may change.
    fn acts_from(&self, shape: &BackboneShape) -> ActsFrom;

    /// Declares every weight of the method through `params`, in an order of its own that never
    /// changes, and returns what acts on a backbone of this shape over these weights.
    ///
    /// It is called to count the weights as well: it must not compute anything from them, and its
    /// cost should not grow with their size.
    ///
    /// # Errors
    /// What `params` returns, and [`Error::Config`] if the config does not fit the backbone.
    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>>;

    /// The weights of the backbone itself that it trains, in copies; none for a method that is all
    /// in [`PetlMethod::build`].
    fn unfreezes(&self) -> Vec<Unfrozen> {
        Vec::new()
    }

    /// Whether [`Method::LowBit`](super::Method::LowBit) may keep its weights at few bits.
    fn can_be_low_bit(&self) -> bool {
        self.unfreezes().is_empty()
    }

    /// Whether it still folds into the backbone's weights ([`Seam::can_merge`]) while other methods
    /// act on the same backbone: no layer's folded weights take into account what is in front of
    /// that layer.
    fn folds_beside_others(&self) -> bool {
        false
    }
}

/// A config of this crate as JSON: numbers, words and lists of them, which JSON always has.
pub(super) fn json(config: &impl Serialize) -> Value {
    serde_json::to_value(config).unwrap_or_default()
}

/// Refuses a backbone that lacks what the method needs.
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
