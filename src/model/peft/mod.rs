//! LoRA adapters in the format of Hugging Face PEFT: a folder with `adapter_model.safetensors` and
//! `adapter_config.json`.

mod config;
mod load;
mod names;
mod products;
mod save;

use std::path::{Path, PathBuf};

use super::petl_model::PetlModel;
use crate::backbone::{Backbone, Network, ViTConfig};
use crate::error::{Error, Result};

const TENSORS: &str = "adapter_model.safetensors";
/// The file of tensors that older versions of PEFT wrote.
const OLD_TENSORS: &str = "adapter_model.bin";

/// The origin of the head of a model if PEFT did not save one with the adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PeftHead {
    /// No other origin: the adapter must contain the head (`modules_to_save`).
    Saved,
    /// The checkpoint of the base model. The adapter left its head unchanged or adds a LoRA product
    /// to it.
    Base(PathBuf),
    /// A new head for this number of classes, with seed 0.
    New(i64),
}

/// The naming scheme of the base model for which an adapter is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PeftNames {
    /// `ViTModel` and `BeitModel` of transformers 5: `layers.N.attention.q_proj`.
    Vit,
    /// `ViTModel` and `BeitModel` of transformers 4: `encoder.layer.N.attention.attention.query`.
    Vit4,
    /// `Dinov2Model` of transformers 5: `encoder.layer.N.attention.q_proj`.
    Dinov2,
    /// `Dinov2Model` of transformers 4: `encoder.layer.N.attention.attention.query`.
    Dinov2V4,
    /// `DINOv3ViTModel` of transformers 4: `layer.N.attention.q_proj`. In transformers 5 the prefix
    /// ends with `model.`.
    Dinov3,
    /// `CLIPVisionModel` and `SiglipVisionModel` of transformers 4 and 5:
    /// `encoder.layers.N.self_attn.q_proj`.
    Clip,
    /// `Aimv2VisionModel` of transformers 5: `encoder.layers.N.attention.q_proj`.
    Aimv2,
    /// `VisionTransformer` of timm: `blocks.N.attn.qkv` and `blocks.N.mlp.fc1`.
    Timm,
    /// `VisionTransformer` of timm with separate layers for gate and value of the MLP, such as
    /// AIMv2: `blocks.N.mlp.fc1_g` and `blocks.N.mlp.fc1_x`.
    TimmGated,
}

/// The base model for which [`PetlModel::save_peft`] writes an adapter.
///
/// The default is `ViTForImageClassification` of transformers 5.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeftOptions {
    /// Naming scheme of the blocks of the base model.
    pub names: PeftNames,
    /// Prefix of these names: `"vit."` if the tower is an attribute `vit`, `""` if the base model
    /// is the tower itself.
    pub prefix: String,
    /// Module of the base model's head (`"classifier"` in transformers, `"head"` in timm), which
    /// this model's head replaces. `None` leaves the head out.
    pub head: Option<String>,
}

impl Default for PeftOptions {
    fn default() -> Self {
        let (prefix, head) = ("vit.".to_owned(), Some("classifier".to_owned()));
        PeftOptions { names: PeftNames::Vit, prefix, head }
    }
}

impl<B: Backbone> PetlModel<B> {
    /// Loads a model from the folder of a LoRA adapter that Hugging Face PEFT saved for the same
    /// ViT, with the head in that folder. In evaluation mode, the logits equal those of PEFT.
    ///
    /// The names may be those of ViT, DINOv2 or CLIP in transformers 4 and 5, or those of timm,
    /// with any wrapper around the tower. The tensors determine which layers are adapted. The
    /// config determines the factors, including `rank_pattern`, `alpha_pattern` and `use_rslora`.
    ///
    /// - A product beside a fused query, key and value projection becomes three products with the
    ///   same A. Further training may make their A differ.
    /// - If the factors differ among layers, they are folded into B.
    /// - If the ranks differ within a block, or a layer of the block has no product, B is filled up
    ///   with columns of zeros.
    /// - A product beside a pooler or in CLIP's text tower is left out, because no feature depends
    ///   on it.
    /// - `lora_dropout` is not kept, and the drop path rate is zero as in PEFT.
    ///
    /// # Errors
    /// [`Error::FileField`](crate::Error::FileField) if the config needs more than LoRA's products
    /// (DoRA, trained biases, ..) or if there is no head;
    /// [`Error::UnexpectedTensors`](crate::Error::UnexpectedTensors),
    /// [`Error::MissingTensor`](crate::Error::MissingTensor) or
    /// [`Error::ShapeMismatch`](crate::Error::ShapeMismatch) with the name of the tensor; the
    /// errors of [`TensorFile::open`](crate::checkpoint::TensorFile::open); [`Error::Unsupported`]
    /// if the backbone is not a ViT.
    pub fn load_peft(backbone: B, folder: impl AsRef<Path>) -> Result<Self> {
        Self::load_peft_with(backbone, folder, &PeftHead::Saved)
    }

    /// Does the same as [`PetlModel::load_peft`], with a head of another origin if the adapter
    /// contains none. Use it for a base model without a head, or with a head that was not trained.
    ///
    /// # Errors
    /// The errors of [`PetlModel::load_peft`]; [`Error::Config`](crate::Error::Config) if the
    /// adapter contains a head for another number of classes than [`PeftHead::New`].
    pub fn load_peft_with(backbone: B, folder: impl AsRef<Path>, head: &PeftHead) -> Result<Self> {
        check(&backbone)?;
        load::load(backbone, folder.as_ref(), head)
    }

    /// Writes a model with [`Method::Lora`](crate::Method::Lora) into `folder`, which is created if
    /// it does not exist. PEFT can load the adapter for the base model that `options` describes
    /// (`PeftModel.from_pretrained(base, folder)`). The function writes `adapter_model.safetensors`
    /// and then `adapter_config.json`, each atomically. The same model always gives the same bytes.
    ///
    /// The logits are the same if the base model has a head for as many classes. Under timm's names
    /// the products of queries, keys and values become one product beside their fused projection.
    /// Its rank is the same if their A are equal, and the sum of their ranks otherwise.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) if the method is not LoRA or a name in `options` is
    /// invalid; [`Error::Unsupported`] if the backbone is not a ViT; [`Error::Io`] if a file cannot
    /// be written.
    pub fn save_peft(&self, folder: impl AsRef<Path>, options: &PeftOptions) -> Result<()> {
        check(self.backbone())?;
        save::save(self, folder.as_ref(), options)
    }
}

/// Checks that the backbone is a ViT. The tables of names cover only ViTs; a block in a stage has
/// two numbers.
fn check<B: Backbone>(backbone: &B) -> Result<()> {
    let (found, reason) = (backbone.shape().family, "layer names are known only for a ViT");
    if found == ViTConfig::FAMILY {
        Ok(())
    } else {
        Err(Error::Unsupported { method: "an adapter of PEFT", backbone: found, reason })
    }
}
