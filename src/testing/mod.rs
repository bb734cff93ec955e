//! The contract that every method keeps beside every backbone, as checks (feature `testing`).
//!
//! Hold a method or a backbone of your own to it in a test:
//!
//! ```
//! use convpass::testing::check_method;
//! use convpass::{FrozenViT, LoraConfig, Method, ViTConfig};
//! use tch::{Device, Kind, Tensor};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vit = ViTConfig { image_size: (8, 8), patch_size: 4, embed_dim: 16, ..ViTConfig::default() };
//! let vit = ViTConfig { depth: 2, num_heads: 2, mlp_dim: 32, ..vit };
//! let backbone = FrozenViT::random(&vit, 0, Device::Cpu)?;
//! let images = Tensor::rand([4, 3, 8, 8], (Kind::Float, Device::Cpu));
//! check_method(&Method::Lora(LoraConfig::default()), &backbone, &images)?;
//! # Ok(())
//! # }
//! ```
//!
//! Some checks seed libtorch's generator, of which a process has one. The checks of this module wait
//! for each other; a test that draws from that generator at the same time on another thread makes
//! [`recomputes_the_same_gradients`] fail, and belongs into another test binary.

mod checks;
mod passes;

use std::fmt;

use tch::{Kind, Tensor};

pub use checks::{
    comes_back_from_its_file, every_variable_has_a_gradient, is_audited, keeps_its_prefix,
    recomputes_the_same_gradients, starts_as_promised, trains_its_variables_alone,
};
pub use passes::disturb;

use crate::backbone::Backbone;
use crate::error::Error;
use crate::model::{PetlConfig, PetlModel, audit_shape};
use crate::petl::{Method, MethodReader};

/// Classes of the models that are checked.
const CLASSES: i64 = 5;

/// What a method or a backbone did not keep, in a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure(String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure(format!("an error where none is due: {error}"))
    }
}

impl From<tch::TchError> for Failure {
    fn from(error: tch::TchError) -> Self {
        Error::from(error).into()
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure(format!("a temporary file: {error}"))
    }
}

/// `Ok`, or what was not kept.
pub type Check = Result<(), Failure>;

fn ensure(kept: bool, failure: impl FnOnce() -> String) -> Check {
    if kept { Ok(()) } else { Err(Failure(failure())) }
}

/// The whole contract, with what is right for most methods; a field says what is not so for yours.
pub struct Contract<'a> {
    /// Images `[B, 3, H, W]` in f32 that fit the backbone, at least two, all different.
    pub images: &'a Tensor,
    /// How far gradients of [`PetlModel::backward_recomputed`] may be from those of one pass, over
    /// the largest of each variable: 0 for the same bits. A weight that several blocks share, and
    /// attention within windows, sum up in another order; 1e-6 is right for them in f32.
    pub recompute_gap: f64,
    /// Makes the method from its name and JSON, as [`PetlModel::load_adapter_with`] is given it;
    /// without one, saving and loading are checked with the very method that was saved.
    pub reader: Option<&'a MethodReader<'a>>,
}

impl<'a> Contract<'a> {
    /// The contract over these images.
    pub fn new(images: &'a Tensor) -> Self {
        Contract { images, recompute_gap: 0.0, reader: None }
    }

    /// Runs every check on `method` beside `backbone` as it is and in bf16.
    ///
    /// # Errors
    /// The first [`Failure`].
    pub fn check<B: Backbone>(&self, method: &Method, backbone: &B) -> Check {
        let in_bf16 = backbone.to_kind(Kind::BFloat16)?;
        for (dtype, backbone, gap) in
            [("as given", backbone, 0.0), ("in bf16", &in_bf16, bf16_gap(self.recompute_gap))]
        {
            let gap = self.recompute_gap.max(gap);
            self.check_one(method, backbone, gap).map_err(|Failure(text)| {
                Failure(format!(
                    "{} beside a {}, {dtype}: {text}",
                    method.name(),
                    backbone.shape().family
                ))
            })?;
        }
        Ok(())
    }

    fn check_one<B: Backbone>(&self, method: &Method, backbone: &B, gap: f64) -> Check {
        let config = PetlConfig::new(method.clone(), CLASSES);
        let model = || PetlModel::new(backbone.clone(), &config);
        starts_as_promised(&model()?, self.images)?;
        is_audited(&model()?)?;
        every_variable_has_a_gradient(&model()?, self.images)?;
        trains_its_variables_alone(&model()?, self.images)?;
        recomputes_the_same_gradients(&model()?, self.images, |_| gap)?;
        keeps_its_prefix(&model()?, self.images)?;
        comes_back_from_its_file(&model()?, self.images, self.reader)
    }
}

/// In bf16 what is summed up in another order is rounded far sooner.
fn bf16_gap(gap: f64) -> f64 {
    if gap > 0.0 { 2e-2 } else { 0.0 }
}

/// [`Contract::check`] with the same bits everywhere.
///
/// # Errors
/// The first [`Failure`].
pub fn check_method<B: Backbone>(method: &Method, backbone: &B, images: &Tensor) -> Check {
    Contract::new(images).check(method, backbone)
}

/// [`Contract::check`] of the built-in methods that `backbone` has a place for, in their default
/// configs, and of a list of two: what a backbone of your own is held to.
///
/// # Errors
/// The first [`Failure`].
pub fn check_backbone<B: Backbone>(backbone: &B, contract: &Contract) -> Check {
    let (shape, lora) = (backbone.shape(), Method::Lora(Default::default()));
    let bypass = Method::ConvBypass(Default::default());
    let methods = [
        Method::LinearProbe,
        Method::Full,
        Method::BitFit,
        Method::LayerNorm,
        Method::Adapter(Default::default()),
        Method::AdaptFormer(Default::default()),
        Method::Vpt(Default::default()),
        Method::Ssf(Default::default()),
        Method::RepAdapter(Default::default()),
        Method::Compose { methods: vec![bypass.clone(), lora.clone()] },
        bypass,
        lora,
    ];
    for method in methods {
        match audit_shape(&shape, &method) {
            Err(Error::Unsupported { .. }) => {}
            _ => contract.check(&method, backbone)?,
        }
    }
    Ok(())
}
