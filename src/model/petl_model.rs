//! [`PetlModel`]: a frozen backbone with a method and a head.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, nn};

use super::adapted::Adapted;
use super::adapter_file;
use super::adapter_info::AdapterInfo;
use super::head::{head, set_head};
use super::low_bit::LowBit;
use super::trainable_params::TrainableParams;
use crate::backbone::{Backbone, Forward, FrozenViT, Pass, Preprocessing};
use crate::checkpoint::{LoadReport, TensorFile};
use crate::error::{Error, Result};
use crate::nn::{InitRng, Linear, Noise};
use crate::petl::{Bypasses, Method, MethodReader, NewVariables};
use crate::seam::{NoMethod, Seam};

/// The config of a [`PetlModel`]: method, number of classes, drop path and seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PetlConfig {
    /// The method, which trains new weights or weights of the backbone.
    pub method: Method,
    /// Number of classes, which is the number of outputs of the head.
    pub num_classes: i64,
    /// Drop path rate at the last block. The rate grows linearly with depth from 0. In training,
    /// the frozen branches and the branches of the method draw independently.
    pub drop_path: f64,
    /// Seed of the initial values.
    pub seed: i64,
}

impl PetlConfig {
    /// Creates a config with seed 0 and the drop path rate of the paper, 0.1. The rate is 0 for a
    /// linear probe, so that its features stay fixed.
    pub fn new(method: Method, num_classes: i64) -> Self {
        let drop_path = if method == Method::LinearProbe { 0.0 } else { 0.1 };
        PetlConfig { method, num_classes, drop_path, seed: 0 }
    }

    /// Checks every field and the method's own config.
    ///
    /// # Errors
    /// [`Error::Config`] for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("PetlConfig"))
    }

    fn check(&self) -> Result<()> {
        self.method.validate()?;
        if !(1..=1 << 24).contains(&self.num_classes) {
            return Err(Error::config("num_classes", "within 1..=16777216", self.num_classes));
        }
        if !(0.0..1.0).contains(&self.drop_path) {
            return Err(Error::config("drop_path", "within 0..1", self.drop_path));
        }
        Ok(())
    }
}

/// A frozen backbone adapted by a method, with a classification head.
///
/// [`PetlModel::var_store`] holds all trainable weights and nothing else; any tch optimizer can be
/// built on it. Most methods do not change the features before training
/// ([`Method::starts_as_identity`]).
#[derive(Debug)]
pub struct PetlModel<B: Backbone = FrozenViT> {
    backbone: B,
    /// The backbone over trained weights, if the method trains weights of the backbone.
    pub(super) unfrozen: Option<B>,
    /// The method over the variables themselves.
    method: Box<dyn Seam>,
    /// The method over values of the variables, if a pass does not compute with the variables
    /// themselves.
    adapted: Option<Adapted<B>>,
    /// The backbone with the method folded in, if the model is merged.
    merged: Option<B>,
    pub(super) head: Linear,
    var_store: nn::VarStore,
    pub(super) low_bit: LowBit,
    config: PetlConfig,
    pub(super) class_names: Option<Vec<String>>,
    pub(super) preprocessing: Option<Preprocessing>,
}

impl<B: Backbone> PetlModel<B> {
    /// Creates a model from `backbone` with the method of `config` and a new head, on the device of
    /// the backbone.
    ///
    /// # Errors
    /// [`Error::Config`] for the first invalid field; [`Error::Unsupported`] if the method cannot
    /// be applied to the backbone.
    pub fn new(backbone: B, config: &PetlConfig) -> Result<Self> {
        config.validate()?;
        let var_store = nn::VarStore::new(backbone.device());
        let (root, rng) = (var_store.root(), &mut InitRng::from_seed(config.seed));
        let mut variables = NewVariables { vs: &root, rng, low_bit: BTreeMap::new() };
        let method = config.method.build(&mut variables, &backbone.shape())?;
        let low_bit = LowBit::new(variables.low_bit);
        let unfrozen = config.method.unfreeze(&root, &backbone)?;
        let head = head(&root, backbone.feature_dim(), config.num_classes, rng)?;
        drop(root);
        let mut model = PetlModel {
            backbone,
            unfrozen,
            method,
            adapted: None,
            merged: None,
            head,
            var_store,
            low_bit,
            config: config.clone(),
            class_names: None,
            preprocessing: None,
        };
        model.adapted = model.adapted(model.backbone.compute_kind())?;
        Ok(model)
    }

    /// Returns the method for passes in the dtype `kind`; `None` if the passes compute with the
    /// variables themselves.
    fn adapted(&self, kind: Kind) -> Result<Option<Adapted<B>>> {
        if kind == Kind::Float && self.low_bit.is_empty() {
            return Ok(None);
        }
        let variables = self.var_store.variables().into_iter().collect();
        let (method, unfrozen) = (&self.config.method, self.unfrozen.as_ref());
        Adapted::new(method, &variables, &self.backbone, unfrozen, kind).map(Some)
    }

    /// Computes logits `[B, num_classes]` of images `[B, 3, H, W]`. The logits are in f32 for every
    /// dtype of the backbone. `train` turns dropout and drop path on. Gradients are tracked in both
    /// modes; wrap the call in [`tch::no_grad`] to save memory.
    ///
    /// In training, one draw from libtorch's generator (`tch::manual_seed`) determines the seed of
    /// each block. The generator is left at a seed that follows from the draw.
    ///
    /// # Errors
    /// [`Error::Input`] if the images do not fit the backbone, or if `train` is true while the
    /// model is merged.
    pub fn forward(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        self.classify(&self.features(images, train)?)
    }

    /// Computes the input of the head: features `[B, C]`, adapted by the method, in the dtype that
    /// the backbone computes in.
    ///
    /// # Errors
    /// The errors of [`PetlModel::forward`].
    pub fn features(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        match &self.merged {
            Some(merged) if !train => merged.forward(images, &NoMethod, Pass::default()),
            _ => self.run(train, |backbone, method, pass| backbone.forward(images, method, pass)),
        }
    }

    /// Calls `f` with the backbone, the method and the settings of a pass. The weights have the
    /// values that the pass computes with.
    pub(super) fn run<T>(
        &self,
        train: bool,
        f: impl FnOnce(&B, &dyn Seam, Pass) -> Result<T>,
    ) -> Result<T> {
        let pass = if train { self.training_pass()? } else { Pass::default() };
        let result =
            self.with_adapted(self.adapted.as_ref(), |backbone, method| f(backbone, method, pass));
        if train {
            pass.noise.leave();
        }
        result
    }

    /// Returns the backbone with the method folded in, if the model is merged.
    pub(super) fn merged(&self) -> Option<&B> {
        self.merged.as_ref()
    }

    /// Returns a pass with dropout and drop path, seeded by libtorch's generator.
    fn training_pass(&self) -> Result<Pass> {
        match self.merged {
            Some(_) => Err(Error::Input {
                argument: "train",
                expected: "false while the method is merged".to_owned(),
                found: true.to_string(),
            }),
            None => {
                let (drop_path, noise) = (self.config.drop_path, Noise::from_libtorch()?);
                Ok(Pass { train: true, drop_path, noise })
            }
        }
    }

    /// Calls `f` with the backbone and the method: over the values of `adapted` if it is given,
    /// else over the f32 variables.
    fn with_adapted<T>(
        &self,
        adapted: Option<&Adapted<B>>,
        f: impl FnOnce(&B, &dyn Seam) -> Result<T>,
    ) -> Result<T> {
        let backbone = self.unfrozen.as_ref().unwrap_or(&self.backbone);
        let Some(adapted) = adapted else { return f(backbone, &*self.method) };
        adapted.refresh(&self.low_bit)?;
        f(adapted.unfrozen.as_ref().unwrap_or(backbone), &*adapted.method)
    }

    /// Returns a plain backbone with the method folded in. Its features equal those of this model
    /// in evaluation mode up to rounding, and the method adds no cost. It shares the weights that
    /// do not change.
    ///
    /// LoRA, SSF, RepAdapter, FacT and methods that train weights of the backbone can be folded in.
    /// Compositions of these can be folded in too, except those with RepAdapter.
    ///
    /// # Errors
    /// [`Error::Config`] if the method cannot be folded in.
    pub fn merged_backbone(&self) -> Result<B> {
        if !self.method.can_merge() {
            let expected = "one that folds into weights (lora, ssf, rep_adapter, fact)";
            return Err(Error::config("method", expected, self.config.method.name()));
        }
        // Merges in f32, so that the result is rounded once.
        let adapted = self.adapted(Kind::Float)?;
        let merged =
            self.with_adapted(adapted.as_ref(), |backbone, method| backbone.merge(method))?;
        merged.to_kind(self.backbone.kind())
    }

    /// Makes [`PetlModel::forward`] use [`PetlModel::merged_backbone`] with the current trainable
    /// weights. While the model is merged, only evaluation mode is possible.
    ///
    /// # Errors
    /// [`Error::Config`] if the method cannot be folded in.
    pub fn merge(&mut self) -> Result<()> {
        self.merged = Some(self.merged_backbone()?);
        Ok(())
    }

    /// Undoes [`PetlModel::merge`] exactly, because merging does not change the weights of the
    /// model.
    pub fn unmerge(&mut self) {
        self.merged = None;
    }

    /// Computes logits `[B, num_classes]` from features `[B, C]` with the head.
    ///
    /// # Errors
    /// [`Error::Input`] if the features do not have the width of the backbone.
    pub fn classify(&self, features: &Tensor) -> Result<Tensor> {
        let dim = self.backbone.feature_dim();
        if features.size().last() != Some(&dim) {
            return Err(Error::Input {
                argument: "features",
                expected: format!("[.., {dim}]"),
                found: format!("{:?}", features.size()),
            });
        }
        self.head.forward(&features.f_to_kind(Kind::Float)?)
    }

    /// Sets the head to `weight` `[num_classes, C]`, of any floating-point dtype, and `bias`
    /// `[num_classes]`. The bias is zero if `None`.
    ///
    /// With the weight of [`ZeroShot::head`](crate::clip::ZeroShot::head), a model whose method
    /// starts as the identity classifies as CLIP does zero-shot.
    ///
    /// # Errors
    /// [`Error::Input`] if a tensor has another shape or is not floating point. The head is then
    /// unchanged.
    pub fn set_head(&mut self, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
        set_head(&self.head, weight, bias)
    }

    /// Returns whether an image has the same features in every pass. The features can then be
    /// computed once, because nothing before the head is trained or random.
    pub fn has_fixed_features(&self) -> bool {
        self.frozen_blocks() == Some(self.backbone.num_blocks())
    }

    /// Returns the bypasses of a model with [`Method::ConvBypass`] or
    /// [`Method::ConvBypassVariant`], with the weights that a pass computes with now. Use it to
    /// inspect the bypasses.
    ///
    /// # Errors
    /// [`Error::Config`] for any other method.
    pub fn bypasses(&self) -> Result<Bypasses> {
        let Some(config) = self.config.method.bypasses() else {
            let (expected, found) = ("conv_bypass or its variant", self.config.method.name());
            return Err(Error::config("method", expected, found));
        };
        let variables = self.var_store.variables().into_iter().collect();
        Bypasses::of_variables(&variables, &self.backbone, &config)
    }

    /// Returns the backbone that was passed to the constructor. No method changes it.
    pub fn backbone(&self) -> &B {
        &self.backbone
    }

    /// Returns the config of the model.
    pub fn config(&self) -> &PetlConfig {
        &self.config
    }

    /// Returns the variable store with all trainable weights and nothing else. The names are the
    /// published ones (`blocks.3.adapter_attn.adapter_conv.weight`, `head.bias`).
    pub fn var_store(&self) -> &nn::VarStore {
        &self.var_store
    }

    /// Counts the trainable weights.
    pub fn trainable_params(&self) -> TrainableParams {
        let count = |weight: &Tensor| weight.numel();
        let total: usize = self.var_store.trainable_variables().iter().map(count).sum();
        let head = count(&self.head.weight) + self.head.bias.as_ref().map_or(0, count);
        TrainableParams::new(total - head, head, self.backbone.num_params())
    }

    /// Writes the trainable weights as safetensors, with [`AdapterInfo`] as metadata: config,
    /// backbone, preprocessing, class names. The same model always gives the same bytes. The file
    /// is written atomically.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a weight is NaN or infinite; [`Error::Io`] if the file cannot be
    /// written.
    pub fn save_adapter(&self, path: impl AsRef<Path>) -> Result<()> {
        adapter_file::save(path.as_ref(), &self.var_store, &self.low_bit, &self.adapter_info()?)
    }

    /// Loads a model from a file of [`PetlModel::save_adapter`]. `backbone` must be the backbone
    /// that the adapter was trained on.
    ///
    /// # Errors
    /// [`Error::OutsideMethod`] if the file uses a method of another crate (use
    /// [`PetlModel::load_adapter_with`]); [`Error::BackboneMismatch`] for another backbone;
    /// [`Error::UnknownFormat`] for a file without metadata (build the model and use
    /// [`PetlModel::load_weights`]); [`Error::CorruptFile`] if the file does not have as many
    /// weights as its config requires; the errors of `load_weights`.
    pub fn load_adapter(backbone: B, path: impl AsRef<Path>) -> Result<Self> {
        Self::load_adapter_with(backbone, path, &|_, _| {
            Err("load the file with PetlModel::load_adapter_with and a reader that creates it"
                .into())
        })
    }

    /// Loads a file like [`PetlModel::load_adapter`] if it uses methods of other crates. `reader`
    /// creates each method from its name ([`PetlMethod::name`]) and its config
    /// ([`PetlMethod::config`]).
    ///
    /// ```no_run
    /// use std::sync::Arc;
    ///
    /// use convpass::petl::PetlMethod;
    /// # use convpass::petl::LoraConfig as Depthwise;
    /// # use convpass::{FrozenViT, PetlModel};
    /// # fn load(backbone: FrozenViT) -> convpass::Result<PetlModel> {
    /// PetlModel::load_adapter_with(backbone, "adapter.safetensors", &|name, config| {
    ///     let method: Arc<dyn PetlMethod> = match name {
    ///         "depthwise" => Arc::new(serde_json::from_value::<Depthwise>(config.clone())?),
    ///         other => return Err(format!("{other} is not known here").into()),
    ///     };
    ///     Ok(method)
    /// })
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::OutsideMethod`] with the error that `reader` returned; the errors of
    /// [`PetlModel::load_adapter`].
    ///
    /// [`PetlMethod::name`]: crate::petl::PetlMethod::name
    /// [`PetlMethod::config`]: crate::petl::PetlMethod::config
    pub fn load_adapter_with(
        backbone: B,
        path: impl AsRef<Path>,
        reader: &MethodReader,
    ) -> Result<Self> {
        let adapter = TensorFile::open(path)?;
        let mut info = AdapterInfo::of(&adapter)?;
        info.config.method.read_custom(reader).map_err(|(name, reason)| Error::OutsideMethod {
            file: adapter.path().to_path_buf(),
            name,
            reason,
        })?;
        info.check_backbone(&adapter, &backbone)?;
        adapter_file::check_size(&adapter, &info.config, &backbone)?;
        let mut model = PetlModel::new(backbone, &info.config)?;
        adapter_file::load(&adapter, &model.var_store, &mut model.low_bit)?;
        if let Some(names) = info.class_names {
            model.set_class_names(names)?;
        }
        model.preprocessing = info.backbone.and_then(|backbone| backbone.preprocessing);
        Ok(model)
    }

    /// Loads the trainable weights from a `.safetensors` file or a published `.pt` file; the
    /// content determines the format. Metadata is neither needed nor read. Every tensor of the file
    /// must belong to a trainable weight, and every trainable weight must have a tensor; otherwise
    /// nothing changes. A merged model is unmerged.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensors`], [`Error::MissingTensor`], [`Error::ShapeMismatch`] or
    /// [`Error::NotFinite`] with the name of the tensor; the errors of [`TensorFile::open`] and of reading the file.
    pub fn load_weights(&mut self, path: impl AsRef<Path>) -> Result<LoadReport> {
        let file = TensorFile::open(path)?;
        let report = adapter_file::load(&file, &self.var_store, &mut self.low_bit)?;
        self.unmerge();
        Ok(report)
    }
}

impl<B: Backbone> nn::ModuleT for PetlModel<B> {
    /// # Panics
    /// Panics if the images do not fit, as tch's own modules do. [`PetlModel::forward`] returns an
    /// error instead.
    fn forward_t(&self, images: &Tensor, train: bool) -> Tensor {
        self.forward(images, train).expect("images fit the backbone")
    }
}
