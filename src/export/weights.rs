//! Merged weights under the names of timm and transformers.

use std::collections::BTreeMap;
use std::path::Path;

use super::ExportableBackbone;
use crate::backbone::Backbone;
use crate::checkpoint::{NamedWeights, WeightNames};
use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::model::{Bytes, PetlModel, encode, plain};

/// A model without an adapter: a backbone with the method folded in, and a classifier, under the
/// names of a class of timm or transformers, in f32.
///
/// The class computes the same logits in evaluation if its settings are those of the backbone (image
/// size, heads, epsilon, activation, pooling), which a file of weights does not hold.
///
/// | names | class | ViTs |
/// |---|---|---|
/// | timm | `VisionTransformer` | without rotary positions; every pooling but the class token beside the mean |
/// | timm | `VisionTransformerDistilled` | read by the class token and the distillation token |
/// | timm | `Eva` | DINOv3, read by the class token or the mean |
/// | Hugging Face | `ViTForImageClassification`, `ViTModel` | ViT, read by the class token |
/// | Hugging Face | `Dinov2ForImageClassification`, `Dinov2Model`, both also `WithRegisters` | DINOv2, read by the class token, the mean or both |
/// | Hugging Face | `SiglipForImageClassification`, `SiglipVisionModel` | SigLIP; the classifier for the mean alone |
/// | Hugging Face | `CLIPVisionModel`, `DINOv3ViTModel` | CLIP's image tower and DINOv3, without a head |
///
/// ```no_run
/// use convpass::export::{MergedWeights, WeightNames};
/// use convpass::{AnyBackbone, PetlModel};
///
/// fn main() -> convpass::Result<()> {
///     let backbone = AnyBackbone::open("vit.safetensors", tch::Device::Cpu)?;
///     let model = PetlModel::load_adapter(backbone, "lora.safetensors")?;
///     let merged = MergedWeights::new(&model, WeightNames::Timm)?;
///     println!("for {}", merged.class());
///     merged.save("merged.safetensors")
/// }
/// ```
#[derive(Debug)]
pub struct MergedWeights(NamedWeights);

impl MergedWeights {
    /// Folds the method of a model into its backbone, and names the weights of both backbone and
    /// head.
    ///
    /// # Errors
    /// [`Error::NotExportable`] if a method does not fold into weights, if the backbone is not a
    /// ViT, or if the library has no class that computes the same.
    pub fn new<B: ExportableBackbone>(model: &PetlModel<B>, names: WeightNames) -> Result<Self> {
        Self::of_model(model, names, true)
    }

    /// Does the same as [`MergedWeights::new`] without the head.
    ///
    /// # Errors
    /// The errors of [`MergedWeights::new`].
    pub fn features<B: ExportableBackbone>(
        model: &PetlModel<B>,
        names: WeightNames,
    ) -> Result<Self> {
        Self::of_model(model, names, false)
    }

    /// Names the weights of a backbone.
    ///
    /// # Errors
    /// The errors of [`MergedWeights::new`].
    pub fn of_backbone<B: ExportableBackbone>(backbone: &B, names: WeightNames) -> Result<Self> {
        backbone.exportable_vit(names.form())?;
        tch::no_grad(|| Self::named(&plain(backbone)?, names, None))
    }

    fn of_model<B: ExportableBackbone>(
        model: &PetlModel<B>,
        names: WeightNames,
        with_head: bool,
    ) -> Result<Self> {
        model.backbone().exportable_vit(names.form())?;
        let folded = model.folded()?;
        if let Some(other) = folded.methods.first() {
            return Err(Error::NotExportable {
                model: format!("the method {}", other.method.name()),
                form: names.form(),
                reason: "it does not fold into the weights of the backbone; ONNX may have a place \
                         for it"
                    .to_owned(),
            });
        }
        let head = with_head.then_some((folded.head_weight, folded.head_bias));
        tch::no_grad(|| Self::named(&folded.backbone, names, head))
    }

    fn named<B: ExportableBackbone>(
        backbone: &B,
        names: WeightNames,
        head: Option<(tch::Tensor, tch::Tensor)>,
    ) -> Result<Self> {
        let vit = backbone.exportable_vit(names.form())?;
        let is_read = |name: &str| vit.is_read(name);
        NamedWeights::new(names, vit.config(), vit.named_weights(), is_read, head).map(Self)
    }

    /// Returns the class of the library that has these weights, such as
    /// `ViTForImageClassification`.
    pub fn class(&self) -> &'static str {
        self.0.class
    }

    /// Returns the names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.tensors.keys().map(String::as_str)
    }

    /// Writes the weights as safetensors. The same model always gives the same bytes, and the file
    /// is written atomically.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        if path.is_dir() {
            return Err(Error::io(path)(std::io::ErrorKind::IsADirectory.into()));
        }
        let bytes =
            self.0.tensors.iter().map(|(name, tensor)| Ok((name.clone(), Bytes::of(tensor)?)));
        let tensors = bytes.collect::<Result<BTreeMap<_, _>>>()?;
        // transformers reads only files that say this.
        write_atomically(path, &encode(path, &tensors, ("format", "pt"))?)
    }
}
