//! Adapted models as ONNX files.

mod block;
mod bypass;
mod file;
mod graph;
#[cfg(test)]
mod interpreter;
mod methods;
mod ops;
mod pool;
mod proto;
#[cfg(test)]
mod tests;
mod vit;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use tch::Tensor;

use super::ExportableBackbone;
use crate::backbone::{Backbone, Description, FrozenViT, Preprocessing};
use crate::error::Result;
use crate::model::{FoldedMethod, PetlModel, plain};
use graph::{Graph, GraphValue};
use proto::ValueInfo;
use vit::ViTGraph;

/// The name of the graph's input.
const INPUT: &str = "images";

/// A model as an ONNX graph: backbone, method and head, in f32, for evaluation.
///
/// The input `images` is `[batch, 3, H, W]` with the height and the width of the backbone's images
/// and any batch size. Its pixels are normalized as the metadata says. The output is
/// `logits [batch, K]`, or `features [batch, C]` without a head.
///
/// The metadata of the file (`metadata_props`) are JSON texts: `preprocessing` (a
/// [`Preprocessing`]), `class_names` (a list in the order of the logits),
/// `method` (a [`Method`](crate::Method)), `backbone` (a
/// [`Description`](crate::backbone::Description)) and `backbone_digest`. An entry whose value is
/// unknown is left out.
///
/// Weights in another dtype than f32 are converted to f32, and int8 weights are multiplied by their
/// scales. The logits therefore differ from those of a model that computes in bf16 or f16 by the
/// rounding of that dtype.
///
/// ```no_run
/// use convpass::export::OnnxModel;
/// use convpass::{AnyBackbone, PetlModel};
///
/// fn main() -> convpass::Result<()> {
///     let backbone = AnyBackbone::open("vit.safetensors", tch::Device::Cpu)?;
///     let model = PetlModel::load_adapter(backbone, "adapter.safetensors")?;
///     OnnxModel::new(&model)?.save("model.onnx")?;
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct OnnxModel {
    graph: Graph,
    input: ValueInfo,
    output: ValueInfo,
    metadata: BTreeMap<String, String>,
}

/// The files that [`OnnxModel::save`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OnnxFiles {
    /// The model.
    pub model: PathBuf,
    /// The file with the weights beside the model, if there is one. The model refers to it by its
    /// name, so that both must stay in one folder.
    pub data: Option<PathBuf>,
}

impl OnnxModel {
    /// The version of ONNX's operators that the graph uses.
    ///
    /// It is the first one with an operator for layer norms. The operators for GELU and attention
    /// are in later ones, which fewer runtimes know.
    pub const OPSET: i64 = 17;

    /// Creates the graph of the logits `[B, K]` of a model.
    ///
    /// The methods that fold into weights are folded in. Of the others, Convpass and its variants,
    /// Adapter, AdaptFormer and VPT have a graph, also in compositions and at few bits.
    ///
    /// # Errors
    /// [`Error::NotExportable`](crate::Error::NotExportable) for another family than the ViT and for
    /// other methods.
    pub fn new<B: ExportableBackbone>(model: &PetlModel<B>) -> Result<Self> {
        Self::of_model(model, true)
    }

    /// Creates the graph of the features `[B, C]` of a model, which are the input of its head.
    ///
    /// # Errors
    /// The errors of [`OnnxModel::new`].
    pub fn features<B: ExportableBackbone>(model: &PetlModel<B>) -> Result<Self> {
        Self::of_model(model, false)
    }

    /// Creates the graph of the features `[B, C]` of a backbone.
    ///
    /// # Errors
    /// [`Error::NotExportable`](crate::Error::NotExportable) for another family than the ViT.
    pub fn of_backbone<B: ExportableBackbone>(backbone: &B) -> Result<Self> {
        let mut metadata = BTreeMap::new();
        describe(&mut metadata, backbone.describe(), &backbone.digest()?);
        tch::no_grad(|| {
            Self::of_vit(plain(backbone)?.exportable_vit("ONNX")?, Vec::new(), None, metadata)
        })
    }

    fn of_model<B: ExportableBackbone>(model: &PetlModel<B>, with_head: bool) -> Result<Self> {
        // Refuses a backbone of another family before its weights are converted.
        model.backbone().exportable_vit("ONNX")?;
        let (folded, info) = (model.folded()?, model.adapter_info()?);
        let mut metadata = BTreeMap::new();
        describe(&mut metadata, info.backbone.unwrap_or_default(), &info.backbone_digest);
        insert(&mut metadata, "method", &info.config.method);
        let head = with_head.then_some((folded.head_weight, folded.head_bias));
        if let Some(names) = info.class_names.filter(|_| with_head) {
            insert(&mut metadata, "class_names", &names);
        }
        let vit = folded.backbone.exportable_vit("ONNX")?;
        tch::no_grad(|| Self::of_vit(vit, folded.methods, head, metadata))
    }

    fn of_vit(
        vit: &FrozenViT,
        methods: Vec<FoldedMethod>,
        head: Option<(Tensor, Tensor)>,
        metadata: BTreeMap<String, String>,
    ) -> Result<Self> {
        let (mut graph, features) = ViTGraph::of(vit, methods)?;
        let (output, name, width) = match head {
            None => (features, "features", vit.feature_dim()),
            Some((weight, bias)) => {
                let classes = weight.size()[0];
                graph.enter("head");
                let logits = graph.product(&features, "head", &weight, Some(bias))?;
                (logits, "logits", classes)
            }
        };
        let GraphValue(output) = graph.rename(output, name);
        let (rows, cols) = vit.config().image_size;
        Ok(OnnxModel {
            graph,
            input: ValueInfo::batch(INPUT, &[3, rows, cols]),
            output: ValueInfo::batch(&output, &[width]),
            metadata,
        })
    }

    /// Sets the preprocessing of the metadata, if it is not that of the model.
    pub fn set_preprocessing(&mut self, preprocessing: &Preprocessing) {
        insert(&mut self.metadata, "preprocessing", preprocessing);
    }

    /// Returns the metadata of the file.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Writes the model to `path`. If it is larger than 2 GiB, the most that a file of this format
    /// can hold, the weights are written to `PATH.data` beside it. The same model always gives the
    /// same bytes. Each file is written atomically.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if a file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<OnnxFiles> {
        file::write(self, path.as_ref(), file::MAX_MESSAGE)
    }

    /// Writes the model to `path` and its weights to `PATH.data`, whatever their size.
    ///
    /// # Errors
    /// The errors of [`OnnxModel::save`].
    pub fn save_with_data(&self, path: impl AsRef<Path>) -> Result<OnnxFiles> {
        file::write(self, path.as_ref(), 0)
    }
}

/// Adds what is known of a backbone.
fn describe(metadata: &mut BTreeMap<String, String>, backbone: Description, digest: &str) {
    metadata.insert("backbone_digest".to_owned(), digest.to_owned());
    if let Some(preprocessing) = &backbone.preprocessing {
        insert(metadata, "preprocessing", preprocessing);
    }
    insert(metadata, "backbone", &Description { preprocessing: None, ..backbone });
}

/// Adds a value as JSON. The values are structs and lists, which always have a JSON form.
fn insert(metadata: &mut BTreeMap<String, String>, key: &str, value: &impl Serialize) {
    metadata.insert(key.to_owned(), serde_json::to_string(value).unwrap_or_default());
}
