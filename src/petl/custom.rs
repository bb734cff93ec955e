//! A method of another crate.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::params::Params;
use super::petl_method::{ActsFrom, PetlMethod, check_places};
use super::unfreeze::Unfrozen;
use crate::error::{Error, Result};
use crate::seam::{BackboneShape, Place, Seam};

/// A method from another crate, for [`Method::Custom`](super::Method::Custom).
///
/// It is compared and serialized by its name and config. A method that serde deserialized does not
/// have code until a [`MethodReader`] creates it. It can be shown and compared before that, but
/// creating a model with it returns an error.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CustomMethod {
    method: String,
    config: Value,
    #[serde(skip)]
    code: Option<Arc<dyn PetlMethod>>,
}

/// Creates a method from the name and the config that a file holds.
///
/// Return an error for an unknown name. For a known name, the usual result is
/// `Arc::new(serde_json::from_value::<Yours>(config.clone())?)`.
pub type MethodReader<'a> = dyn Fn(&str, &Value) -> Result<Arc<dyn PetlMethod>, Box<dyn std::error::Error + Send + Sync>>
    + 'a;

impl CustomMethod {
    /// Wraps a method of your own.
    pub fn new(method: Arc<dyn PetlMethod>) -> Self {
        let (name, config) = (method.name().to_owned(), method.config());
        CustomMethod { method: name, config, code: Some(method) }
    }

    /// Returns [`PetlMethod::name`].
    pub fn name(&self) -> &str {
        &self.method
    }

    /// Returns [`PetlMethod::config`].
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Returns the method itself, or `None` if serde deserialized it and no reader has created it
    /// yet.
    pub fn code(&self) -> Option<&Arc<dyn PetlMethod>> {
        self.code.as_ref()
    }

    /// Creates the method if this is not done yet. The error is the reason of a failure.
    pub(super) fn read(&mut self, reader: &MethodReader) -> Result<(), String> {
        if self.code.is_some() {
            return Ok(());
        }
        let made = reader(&self.method, &self.config).map_err(|error| error.to_string())?;
        if made.name() != self.method {
            return Err(format!("the reader returned the method {}", made.name()));
        }
        *self = CustomMethod::new(made);
        Ok(())
    }

    fn made(&self) -> Result<&dyn PetlMethod> {
        self.code.as_deref().ok_or_else(|| {
            let expected =
                "created by a reader (PetlModel::load_adapter_with), because it is not built in";
            Error::config("method", expected, &self.method)
        })
    }
}

impl PartialEq for CustomMethod {
    fn eq(&self, other: &Self) -> bool {
        (&self.method, &self.config) == (&other.method, &other.config)
    }
}

impl PetlMethod for CustomMethod {
    fn name(&self) -> &'static str {
        self.code.as_ref().map_or("custom", |code| code.name())
    }

    fn config(&self) -> Value {
        self.config.clone()
    }

    fn validate(&self) -> Result<()> {
        self.made()?.validate()
    }

    fn needs(&self) -> &[Place] {
        self.code.as_ref().map_or(&[], |code| code.needs())
    }

    fn starts_as_identity(&self) -> bool {
        self.code.as_ref().is_some_and(|code| code.starts_as_identity())
    }

    fn acts_from(&self, shape: &BackboneShape) -> ActsFrom {
        self.code.as_ref().map_or(ActsFrom::Embedding, |code| code.acts_from(shape))
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        let method = self.made()?;
        check_places(method, shape)?;
        method.build(params, shape)
    }

    fn unfreezes(&self) -> Vec<Unfrozen> {
        self.code.as_ref().map_or(Vec::new(), |code| code.unfreezes())
    }

    fn can_be_low_bit(&self) -> bool {
        self.code.as_ref().is_some_and(|code| code.can_be_low_bit())
    }

    fn folds_beside_others(&self) -> bool {
        self.code.as_ref().is_some_and(|code| code.folds_beside_others())
    }
}
