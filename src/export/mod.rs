//! Adapted models for other programs: ONNX files, and weights under the names of other libraries.
//!
//! | form | what is written | which methods |
//! |---|---|---|
//! | `OnnxModel` (feature `onnx`) | backbone, method and head as one graph | those that fold into weights, Convpass, Adapter, AdaptFormer, VPT |
//! | [`MergedWeights`] | backbone and head under the names of timm or transformers | those that fold into weights |
//!
//! Both are for ViTs ([`FrozenViT`]); every other family is an [`Error::NotExportable`].

#[cfg(feature = "onnx")]
mod onnx;
mod weights;

pub use crate::checkpoint::WeightNames;
#[cfg(feature = "onnx")]
pub use onnx::{OnnxFiles, OnnxModel};
pub use weights::MergedWeights;

use crate::backbone::{AnyBackbone, Backbone, FrozenViT};
use crate::error::{Error, Result};

/// A backbone that may be exported: a [`FrozenViT`], or an [`AnyBackbone`] that holds one.
pub trait ExportableBackbone: Backbone {
    /// Returns the backbone as a ViT. `form` names the form of the export in the error.
    ///
    /// # Errors
    /// [`Error::NotExportable`] if the backbone is of another family.
    fn exportable_vit(&self, form: &'static str) -> Result<&FrozenViT>;
}

impl ExportableBackbone for FrozenViT {
    fn exportable_vit(&self, _form: &'static str) -> Result<&FrozenViT> {
        Ok(self)
    }
}

impl ExportableBackbone for AnyBackbone {
    fn exportable_vit(&self, form: &'static str) -> Result<&FrozenViT> {
        self.as_vit().ok_or_else(|| Error::NotExportable {
            model: format!("a {}", self.family()),
            form,
            reason: "only ViTs can be exported".to_owned(),
        })
    }
}
