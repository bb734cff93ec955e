//! LoRA adapters as Hugging Face PEFT keeps them: a folder with `adapter_model.safetensors` and
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
/// What PEFT wrote before.
const OLD_TENSORS: &str = "adapter_model.bin";

/// Where the head of a model comes from if PEFT did not save one with the adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PeftHead {
    /// Nowhere: the adapter has to bring it (`modules_to_save`).
    Saved,
    /// From the checkpoint of the base model, whose head the adapter left as it was, or changed
    /// by a product of its own.
    Base(PathBuf),
    /// A new one for this many classes, from seed 0.
    New(i64),
}

/// The names of the base model that an adapter is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PeftNames {
    /// `ViTModel` of transformers 5: `layers.N.attention.q_proj`.
    Vit,
    /// `ViTModel` of transformers 4: `encoder.layer.N.attention.attention.query`.
    Vit4,
    /// `Dinov2Model` of transformers 5: `encoder.layer.N.attention.q_proj`.
    Dinov2,
    /// `Dinov2Model` of transformers 4: `encoder.layer.N.attention.attention.query`.
    Dinov2V4,
    /// `CLIPVisionModel` of either: `encoder.layers.N.self_attn.q_proj`.
    Clip,
    /// `VisionTransformer` of timm: `blocks.N.attn.qkv`.
    Timm,
}

/// For which base model [`PetlModel::save_peft`] writes.
///
/// The default is `ViTForImageClassification` of transformers 5.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeftOptions {
    /// How the base model names its blocks.
    pub names: PeftNames,
    /// What it has in front of these names: `"vit."` where the tower is an attribute `vit`, `""`
    /// where the base model is the tower itself.
    pub prefix: String,
    /// The module that is its head (`"classifier"` in transformers, `"head"` in timm), which
    /// takes this model's; `None` leaves the head out.
    pub head: Option<String>,
}

impl Default for PeftOptions {
    fn default() -> Self {
        let (prefix, head) = ("vit.".to_owned(), Some("classifier".to_owned()));
        PeftOptions { names: PeftNames::Vit, prefix, head }
    }
}

impl<B: Backbone> PetlModel<B> {
    /// A model from the folder of a LoRA adapter that Hugging Face PEFT saved for the same ViT,
    /// with the head it saved. The logits in evaluation are PEFT's.
    ///
    /// The names may be those of ViT, DINOv2 or CLIP in transformers 4 and 5, or of timm, whatever
    /// wraps the tower. What is adapted is read off the tensors, the factors
    /// off the config (`rank_pattern`, `alpha_pattern` and `use_rslora` too). A product beside a
    /// fused query, key and value projection becomes three with the same A, which part in further
    /// training. Where factors differ among layers they are folded into B; where ranks differ
    /// within a block, or a layer has no product there, columns of zeros fill B up. A
    /// product beside a pooler or in CLIP's text tower is left out: no feature depends on it.
    /// `lora_dropout` is not kept, and drop path is zero, as in PEFT.
    ///
    /// # Errors
    /// [`Error::FileField`](crate::Error::FileField) for a config that asks for more than LoRA's
    /// products (DoRA, trained biases, ..), and where there is no head;
    /// [`Error::UnexpectedTensors`](crate::Error::UnexpectedTensors),
    /// [`Error::MissingTensor`](crate::Error::MissingTensor) or
    /// [`Error::ShapeMismatch`](crate::Error::ShapeMismatch) with the tensor's name, and the
    /// errors of [`TensorFile::open`](crate::checkpoint::TensorFile::open) for the file itself;
    /// [`Error::Unsupported`] beside another backbone than a ViT.
    pub fn load_peft(backbone: B, folder: impl AsRef<Path>) -> Result<Self> {
        Self::load_peft_with(backbone, folder, &PeftHead::Saved)
    }

    /// The same with a head from elsewhere, where the adapter brings none: for a base model
    /// without a head, or with one that was not trained.
    ///
    /// # Errors
    /// As [`PetlModel::load_peft`]; [`Error::Config`](crate::Error::Config) if the adapter brings
    /// a head of another number of classes than [`PeftHead::New`] says.
    pub fn load_peft_with(backbone: B, folder: impl AsRef<Path>, head: &PeftHead) -> Result<Self> {
        check(&backbone)?;
        load::load(backbone, folder.as_ref(), head)
    }

    /// Writes a model with [`Method::Lora`](crate::Method::Lora) into `folder`, which is created
    /// if need be, so that PEFT loads it beside the base model that `options` describes
    /// (`PeftModel.from_pretrained(base, folder)`): `adapter_model.safetensors` and then
    /// `adapter_config.json`. Each file appears whole or not at all, and the same model gives the
    /// same bytes.
    ///
    /// The logits are the same, if the base model has a head for as many classes. Under timm's
    /// names the products of queries, keys and values become one beside their fused projection:
    /// of the same rank where their A are equal, else of their ranks' sum.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) if the method is another, or a name in `options`
    /// is none; [`Error::Unsupported`] if the backbone is no ViT; [`Error::Io`] if a file cannot be
    /// written.
    pub fn save_peft(&self, folder: impl AsRef<Path>, options: &PeftOptions) -> Result<()> {
        check(self.backbone())?;
        save::save(self, folder.as_ref(), options)
    }
}

/// The tables of names are of ViTs; blocks of stages have two numbers.
fn check<B: Backbone>(backbone: &B) -> Result<()> {
    let (found, reason) = (backbone.shape().family, "names of layers are known for a ViT alone");
    if found == ViTConfig::FAMILY {
        Ok(())
    } else {
        Err(Error::Unsupported { method: "an adapter of PEFT", backbone: found, reason })
    }
}
