//! The linear probe, which trains only the head.

use serde_json::Value;

use super::params::Params;
use super::petl_method::{ActsFrom, PetlMethod};
use crate::error::Result;
use crate::seam::{BackboneShape, NoMethod, Place, Seam};

/// The implementation of [`Method::LinearProbe`](super::Method::LinearProbe).
#[derive(Debug)]
pub(super) struct LinearProbe;

impl PetlMethod for LinearProbe {
    fn name(&self) -> &'static str {
        "linear_probe"
    }

    fn config(&self) -> Value {
        Value::Object(Default::default())
    }

    fn validate(&self) -> Result<()> {
        Ok(())
    }

    fn needs(&self) -> &[Place] {
        &[]
    }

    fn starts_as_identity(&self) -> bool {
        true
    }

    fn acts_from(&self, _: &BackboneShape) -> ActsFrom {
        ActsFrom::Head
    }

    fn build(&self, _: &mut Params, _: &BackboneShape) -> Result<Box<dyn Seam>> {
        Ok(Box::new(NoMethod))
    }

    fn folds_beside_others(&self) -> bool {
        true
    }
}
