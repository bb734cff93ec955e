//! [`PetlModel`]: a frozen backbone, a method beside it and a head over it.

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

/// What is trained, for how many classes, and from which seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PetlConfig {
    /// What is trained beside, or of, the backbone.
    pub method: Method,
    /// Outputs of the head.
    pub num_classes: i64,
    /// Drop path rate at the last block, linear over depth from 0; in training the frozen
    /// branches and the method's draw it independently.
    pub drop_path: f64,
    /// Seed of the initial values.
    pub seed: i64,
}

impl PetlConfig {
    /// The paper's drop path (0.1; none for a linear probe, whose features stay fixed), seed 0.
    pub fn new(method: Method, num_classes: i64) -> Self {
        let drop_path = if method == Method::LinearProbe { 0.0 } else { 0.1 };
        PetlConfig { method, num_classes, drop_path, seed: 0 }
    }

    /// Checks every field and the method's own config.
    ///
    /// # Errors
    /// [`Error::Config`] with the first field that is wrong.
    pub fn validate(&self) -> Result<()> {
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
/// The trainables, and nothing else, are in [`PetlModel::var_store`]: any tch optimizer builds on
/// it. At the start most methods leave the features as they are
/// ([`Method::starts_as_identity`]).
#[derive(Debug)]
pub struct PetlModel<B: Backbone = FrozenViT> {
    backbone: B,
    /// The backbone over trained weights, where the method trains them.
    unfrozen: Option<B>,
    /// Over the variables themselves.
    method: Box<dyn Seam>,
    /// Over values of them, where a pass does not compute with the variables themselves.
    adapted: Option<Adapted<B>>,
    /// The backbone with the method folded in, while it is.
    merged: Option<B>,
    head: Linear,
    var_store: nn::VarStore,
    low_bit: LowBit,
    config: PetlConfig,
    pub(super) class_names: Option<Vec<String>>,
    pub(super) preprocessing: Option<Preprocessing>,
}

impl<B: Backbone> PetlModel<B> {
    /// Puts `config`'s method beside `backbone` and a new head over it, on the backbone's device.
    ///
    /// # Errors
    /// [`Error::Config`] with the first field that is wrong; [`Error::Unsupported`] if the backbone
    /// has no place for the method.
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

    /// The method for passes in `kind`, if they do not compute with the variables themselves.
    fn adapted(&self, kind: Kind) -> Result<Option<Adapted<B>>> {
        if kind == Kind::Float && self.low_bit.is_empty() {
            return Ok(None);
        }
        let variables = self.var_store.variables().into_iter().collect();
        let (method, unfrozen) = (&self.config.method, self.unfrozen.as_ref());
        Adapted::new(method, &variables, &self.backbone, unfrozen, kind).map(Some)
    }

    /// Images `[B, 3, H, W]` to logits `[B, num_classes]`, in f32 whatever the backbone's kind;
    /// `train` turns dropout and drop path on. Gradients are tracked either way; wrap the call in
    /// [`tch::no_grad`] to save memory.
    ///
    /// In training a draw from libtorch's generator (`tch::manual_seed`) seeds each block, and the
    /// generator is left at a seed that follows from it.
    ///
    /// # Errors
    /// [`Error::Input`] if the images do not fit the backbone.
    pub fn forward(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        self.classify(&self.features(images, train)?)
    }

    /// What the head reads: `[B, C]`, adapted by the method, in the kind that the backbone
    /// computes in.
    ///
    /// # Errors
    /// As [`PetlModel::forward`].
    pub fn features(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        match &self.merged {
            Some(merged) if !train => merged.forward(images, &NoMethod, Pass::default()),
            _ => self.run(train, |backbone, method, pass| backbone.forward(images, method, pass)),
        }
    }

    /// Calls `f` with the backbone that the method acts on, the method and a pass, as a pass
    /// computes with them.
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

    /// The backbone with the method folded in, while it is.
    pub(super) fn merged(&self) -> Option<&B> {
        self.merged.as_ref()
    }

    /// A pass with dropout and drop path, seeded by libtorch's generator.
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

    /// Calls `f` with the backbone that the method acts on and the method, over the values of
    /// `adapted` if there is one and over the f32 variables if not.
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

    /// A plain backbone with the same features, for [`PetlModel::forward`] in evaluation up to
    /// rounding: no cost is left of the method. It shares the weights that do not change.
    ///
    /// LoRA, SSF, RepAdapter and FacT can be folded in, what trains the backbone itself, and
    /// compositions of these (a RepAdapter alone).
    ///
    /// # Errors
    /// [`Error::Config`] if the method can not.
    pub fn merged_backbone(&self) -> Result<B> {
        if !self.method.can_merge() {
            let expected = "one that folds into weights (lora, ssf, rep_adapter, fact)";
            return Err(Error::config("method", expected, self.config.method.name()));
        }
        // In f32, and rounded once.
        let adapted = self.adapted(Kind::Float)?;
        let merged =
            self.with_adapted(adapted.as_ref(), |backbone, method| backbone.merge(method))?;
        merged.to_kind(self.backbone.kind())
    }

    /// Runs [`PetlModel::forward`] on [`PetlModel::merged_backbone`] from here on, with the
    /// trainables as they are now and in evaluation alone.
    ///
    /// # Errors
    /// [`Error::Config`] if the method can not be folded in.
    pub fn merge(&mut self) -> Result<()> {
        self.merged = Some(self.merged_backbone()?);
        Ok(())
    }

    /// Takes [`PetlModel::merge`] back, exactly: merging changes no weight of the model itself.
    pub fn unmerge(&mut self) {
        self.merged = None;
    }

    /// The head alone: features `[B, C]` to logits `[B, num_classes]`.
    ///
    /// # Errors
    /// [`Error::Input`] if the features are not of the backbone's width.
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

    /// Starts the head from `weight` `[num_classes, C]`, of any floating-point kind, and `bias`
    /// `[num_classes]`, zero if none. What [`ZeroShot::head`](crate::clip::ZeroShot::head) gives makes a
    /// model whose method starts as the identity classify as CLIP does zero-shot.
    ///
    /// # Errors
    /// [`Error::Input`] if either is of another shape or holds no floating-point numbers; the head is
    /// then as it was.
    pub fn set_head(&mut self, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
        set_head(&self.head, weight, bias)
    }

    /// Whether an image has the same features in every pass, so that they may be computed once:
    /// nothing in front of the head is trained or drawn at random.
    pub fn has_fixed_features(&self) -> bool {
        self.frozen_blocks() == Some(self.backbone.num_blocks())
    }

    /// The bypasses of a model whose method is [`Method::ConvBypass`] or
    /// [`Method::ConvBypassVariant`], as a pass computes with them now: to look at what each does.
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

    /// The backbone as it was given; no method changes it.
    pub fn backbone(&self) -> &B {
        &self.backbone
    }

    /// The config the model was built with.
    pub fn config(&self) -> &PetlConfig {
        &self.config
    }

    /// The trainables and nothing else, under the published names
    /// (`blocks.3.adapter_attn.adapter_conv.weight`, `head.bias`).
    pub fn var_store(&self) -> &nn::VarStore {
        &self.var_store
    }

    /// How many weights are trained.
    pub fn trainable_params(&self) -> TrainableParams {
        let count = |weight: &Tensor| weight.numel();
        let total: usize = self.var_store.trainable_variables().iter().map(count).sum();
        let head = count(&self.head.weight) + self.head.bias.as_ref().map_or(0, count);
        TrainableParams::new(total - head, head, self.backbone.num_params())
    }

    /// Writes the trainables as safetensors, with [`AdapterInfo`] as metadata: config, backbone,
    /// preprocessing, class names. The same model gives the same bytes; the file appears whole or
    /// not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn save_adapter(&self, path: impl AsRef<Path>) -> Result<()> {
        adapter_file::save(path.as_ref(), &self.var_store, &self.low_bit, &self.adapter_info()?)
    }

    /// A model from a file that [`PetlModel::save_adapter`] wrote, beside the same backbone.
    ///
    /// # Errors
    /// [`Error::OutsideMethod`] if a method of another crate is in it (use
    /// [`PetlModel::load_adapter_with`]); [`Error::BackboneMismatch`] beside another backbone; [`Error::UnknownFormat`] for a file
    /// without the metadata (build the model and use [`PetlModel::load_weights`]);
    /// [`Error::CorruptFile`] if it does not hold as many weights as its config asks for; the
    /// errors of `load_weights` otherwise.
    pub fn load_adapter(backbone: B, path: impl AsRef<Path>) -> Result<Self> {
        Self::load_adapter_with(backbone, path, &|_, _| {
            Err("load the file with PetlModel::load_adapter_with, which is told how to make it"
                .into())
        })
    }

    /// [`PetlModel::load_adapter`] for a file in which methods of other crates are: `reader` makes
    /// each from its name ([`PetlMethod::name`]) and its config ([`PetlMethod::config`]).
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
    /// [`Error::OutsideMethod`] with what `reader` returned; as [`PetlModel::load_adapter`]
    /// otherwise.
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

    /// Takes the trainables from a `.safetensors` file or a published `.pt` file, by content;
    /// metadata is neither needed nor read. Every tensor of the file must have its place and
    /// every trainable its tensor, or nothing is changed. A merged model is unmerged.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensors`], [`Error::MissingTensor`] or [`Error::ShapeMismatch`] with
    /// the tensor's name; [`Error::CorruptFile`] and its like for the file itself.
    pub fn load_weights(&mut self, path: impl AsRef<Path>) -> Result<LoadReport> {
        let file = TensorFile::open(path)?;
        let report = adapter_file::load(&file, &self.var_store, &mut self.low_bit)?;
        self.unmerge();
        Ok(report)
    }
}

impl<B: Backbone> nn::ModuleT for PetlModel<B> {
    /// # Panics
    /// As tch's own modules do, on images that do not fit; [`PetlModel::forward`] returns an
    /// error instead.
    fn forward_t(&self, images: &Tensor, train: bool) -> Tensor {
        self.forward(images, train).expect("images fit the backbone")
    }
}
