//! The contract between methods and backbones, as checks (feature `testing`).
//!
//! Every built-in method keeps this contract with every backbone that it supports. Check a method
//! or a backbone of your own in a test:
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
//! Some checks seed libtorch's generator, which the whole process shares. The checks of this module
//! wait for each other. A test that draws from that generator on another thread at the same time
//! makes [`recomputes_the_same_gradients`] fail; put such a test into another test binary.

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
use crate::petl::{LinearTarget, LoraConfig, Method, MethodReader};
use crate::seam::BackboneShape;

/// The number of classes of the checked models.
const CLASSES: i64 = 5;

/// A sentence that says which part of the contract a method or a backbone breaks.
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
        let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
        Failure(format!("unexpected error: {error}{}", source.unwrap_or_default()))
    }
}

impl From<tch::TchError> for Failure {
    fn from(error: tch::TchError) -> Self {
        Error::from(error).into()
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure(format!("cannot use a temporary file: {error}"))
    }
}

/// `Ok`, or the broken part of the contract.
pub type Check = Result<(), Failure>;

fn ensure(kept: bool, failure: impl FnOnce() -> String) -> Check {
    if kept { Ok(()) } else { Err(Failure(failure())) }
}

/// The whole contract. [`Contract::new`] sets defaults that suit most methods; a field states an
/// exception.
pub struct Contract<'a> {
    /// Images `[B, 3, H, W]` in f32 that fit the backbone. B is at least 2, and all images differ.
    pub images: &'a Tensor,
    /// The largest permitted difference between the gradients of [`PetlModel::backward_recomputed`]
    /// and those of one pass, relative to the largest gradient entry of each variable. 0 requires
    /// the same bits. A weight that several blocks share, and attention within windows, sum in
    /// another order; 1e-6 suits them in f32.
    pub recompute_gap: f64,
    /// Creates the method from its name and JSON, as in [`PetlModel::load_adapter_with`]. If this
    /// is `None`, the check of saving and loading uses the saved method itself.
    pub reader: Option<&'a MethodReader<'a>>,
}

impl<'a> Contract<'a> {
    /// Creates the contract with these images and the default of every other field.
    pub fn new(images: &'a Tensor) -> Self {
        Contract { images, recompute_gap: 0.0, reader: None }
    }

    /// Runs every check on `method` with `backbone`, first as given and then in bf16.
    ///
    /// # Errors
    /// Returns the first [`Failure`].
    pub fn check<B: Backbone>(&self, method: &Method, backbone: &B) -> Check {
        let in_bf16 = backbone.to_kind(Kind::BFloat16)?;
        for (dtype, backbone, gap) in
            [("as given", backbone, 0.0), ("in bf16", &in_bf16, bf16_gap(self.recompute_gap))]
        {
            let gap = self.recompute_gap.max(gap);
            self.check_one(method, backbone, gap).map_err(|Failure(text)| {
                Failure(format!(
                    "{} with a {} backbone, {dtype}: {text}",
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

/// Returns the gap to permit in bf16, where a sum in another order rounds far more coarsely.
fn bf16_gap(gap: f64) -> f64 {
    if gap > 0.0 { 2e-2 } else { 0.0 }
}

/// Runs [`Contract::check`] and requires the same bits everywhere.
///
/// # Errors
/// Returns the first [`Failure`].
pub fn check_method<B: Backbone>(method: &Method, backbone: &B, images: &Tensor) -> Check {
    Contract::new(images).check(method, backbone)
}

/// Runs [`Contract::check`] on the built-in methods in their default configs and on a
/// [`Method::Compose`] of two of them. It skips the methods that `backbone` does not support.
///
/// Use it to test a backbone of your own.
///
/// # Errors
/// Returns the first [`Failure`].
pub fn check_backbone<B: Backbone>(backbone: &B, contract: &Contract) -> Check {
    let (shape, bypass) = (backbone.shape(), Method::ConvBypass(Default::default()));
    let lora = lora_for(&shape);
    let mut composed = vec![bypass.clone()];
    composed.extend(lora.clone());
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
        Method::Compose { methods: composed },
        bypass,
    ];
    for method in methods.into_iter().chain(lora) {
        match audit_shape(&shape, &method) {
            Err(Error::Unsupported { .. }) => {}
            _ => contract.check(&method, backbone)?,
        }
    }
    Ok(())
}

/// Returns LoRA with its default targets or, on a backbone without a query projection, with all
/// linear layers of a block; `None` if the shape lists none.
fn lora_for(shape: &BackboneShape) -> Option<Method> {
    use LinearTarget::{Fc1, Fc2, Proj, Q};
    let has = |target: &LinearTarget| target.size(shape, 0).is_ok();
    if has(&Q) {
        return Some(Method::Lora(LoraConfig::default()));
    }
    let targets: Vec<_> = [Proj, Fc1, Fc2].into_iter().filter(has).collect();
    let lora = LoraConfig { targets, ..LoraConfig::default() };
    (!lora.targets.is_empty()).then_some(Method::Lora(lora))
}
