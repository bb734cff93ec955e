//! CLIP's text tower (Radford et al., arXiv 2103.00020), which encodes token ids as a text
//! embedding.
//!
//! It does not implement [`Backbone`](super::Backbone): methods act on the image tower, and the
//! text tower is dropped after the class names are encoded.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::block::{Block, BlockShape, Queries};
use super::weights::{WeightSource, Weights, random};
use super::{BlockPass, Hooks, Stream};
use crate::error::{Error, Result};
use crate::nn::{DropPath, Linear, MlpActivation, Norm, NormKind, NormPlacement, Weight};
use crate::seam::{NoMethod, TokenLayout};

/// The shape and the settings of a [`ClipText`]. The default is the text tower of CLIP ViT-B/16.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClipTextConfig {
    /// Number of rows of the token table.
    pub vocab_size: i64,
    /// Maximum number of tokens of a text, including the start and end tokens.
    pub context_length: i64,
    /// C, the width of a token.
    pub embed_dim: i64,
    /// Number of blocks.
    pub depth: i64,
    /// Number of attention heads, which divides `embed_dim`.
    pub num_heads: i64,
    /// Width between the two linear layers of the MLP.
    pub mlp_dim: i64,
    /// The activation of the MLP.
    pub activation: MlpActivation,
    /// Whether each sub-layer is followed by a learned factor for each channel.
    pub layer_scale: bool,
    /// The epsilon of every layer norm.
    pub norm_eps: f64,
    /// D, the common width of images and texts. Without a projection it is `embed_dim`.
    pub projection: Option<i64>,
    /// Whether there is a learned factor for the cosines.
    pub logit_scale: bool,
    /// The id of the end token, Hugging Face's `eos_token_id`. The tower reads the first token with
    /// this id. `None` stands for the highest id of the text, as in OpenAI's CLIP and in open_clip.
    /// Hugging Face does the same if `eos_token_id` is 2, a wrong value in its first CLIP configs.
    pub end_token: Option<i64>,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        ClipTextConfig {
            vocab_size: 49_408,
            context_length: 77,
            embed_dim: 512,
            depth: 12,
            num_heads: 8,
            mlp_dim: 2048,
            activation: MlpActivation::QuickGelu,
            layer_scale: false,
            norm_eps: 1e-5,
            projection: Some(512),
            logit_scale: true,
            end_token: None,
        }
    }
}

/// The maximum of every dimension. It keeps products of dimensions within `i64`.
const MAX_DIM: i64 = 1 << 20;

impl ClipTextConfig {
    /// Name of the family in error messages.
    pub(crate) const FAMILY: &'static str = "CLIP text tower";

    /// Checks that the config is valid.
    ///
    /// # Errors
    /// [`Error::Config`] for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("ClipTextConfig"))
    }

    fn check(&self) -> Result<()> {
        for (field, value) in [
            ("vocab_size", self.vocab_size),
            ("context_length", self.context_length),
            ("embed_dim", self.embed_dim),
            ("depth", self.depth),
            ("num_heads", self.num_heads),
            ("mlp_dim", self.mlp_dim),
            ("projection", self.projection.unwrap_or(1)),
        ] {
            if !(1..=MAX_DIM).contains(&value) {
                return Err(Error::config(field, format!("within 1..={MAX_DIM}"), value));
            }
        }
        if self.embed_dim % self.num_heads != 0 {
            let expected = format!("a divisor of embed_dim {}", self.embed_dim);
            return Err(Error::config("num_heads", expected, self.num_heads));
        }
        if let Some(end) = self.end_token.filter(|end| !(0..self.vocab_size).contains(end)) {
            let expected = format!("within 0..{} (vocab_size)", self.vocab_size);
            return Err(Error::config("end_token", expected, end));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return Err(Error::config("norm_eps", "a positive number", self.norm_eps));
        }
        Ok(())
    }

    /// Returns D, the width of the features.
    pub fn feature_dim(&self) -> i64 {
        self.projection.unwrap_or(self.embed_dim)
    }
}

/// The frozen text tower of CLIP.
#[derive(Debug)]
pub struct ClipText {
    config: ClipTextConfig,
    /// `[V, C]`.
    token_embed: Weight,
    /// `[T, C]`.
    pos_embed: Weight,
    blocks: Vec<Block>,
    norm: Norm,
    projection: Option<Linear>,
    logit_scale: Option<f64>,
}

impl ClipText {
    /// Creates a tower with random weights for tests. They are those of
    /// [`FrozenViT::random`](crate::FrozenViT::random); the logit scale is CLIP's initial value, 1
    /// / 0.07.
    ///
    /// # Errors
    /// [`Error::Config`] if `config` is invalid.
    pub fn random(config: &ClipTextConfig, seed: i64, device: Device) -> Result<Self> {
        let mut random = random(seed, device);
        Self::from_source(config, &mut |name, shape| match name {
            "logit_scale" => {
                Ok(Tensor::f_full(shape, -(0.07f64.ln()), (Kind::Float, Device::Cpu))?)
            }
            _ => random(name, shape),
        })
    }

    /// Builds the layers from the weights that `source` returns.
    pub(crate) fn from_source(config: &ClipTextConfig, source: &mut WeightSource) -> Result<Self> {
        config.validate()?;
        let mut weights = Weights::new(source, false);
        let (c, eps) = (config.embed_dim, config.norm_eps);
        let block = |index| BlockShape {
            name: format!("blocks.{index}"),
            dim: c,
            hidden: config.mlp_dim,
            num_heads: config.num_heads,
            activation: config.activation,
            causal: true,
            qkv_bias: true,
            norm_placement: NormPlacement::Before,
            layer_scale: config.layer_scale,
            norms: NormKind::layer_norm(eps),
            proj_bias: true,
            attention_norm: false,
            mlp_norm: false,
            rotary: None,
            grid_pairs: None,
        };
        Ok(ClipText {
            config: config.clone(),
            token_embed: weights.get("token_embed", &[config.vocab_size, c])?,
            pos_embed: weights.get("pos_embed", &[config.context_length, c])?,
            blocks: (0..config.depth)
                .map(|index| Block::build(&block(index), None, &mut weights))
                .collect::<Result<_>>()?,
            norm: weights.norm("norm", c, eps)?,
            projection: match config.projection {
                Some(dim) => Some(weights.linear("projection", c, dim, false)?),
                None => None,
            },
            logit_scale: match weights.get_if(config.logit_scale, "logit_scale", &[])? {
                Some(log) => Some(log.f_double_value(&[])?.exp()),
                None => None,
            },
        })
    }

    /// Returns the config of this tower.
    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// Returns the learned factor for the cosines of images and texts, if the file has it. It is
    /// 100 at the end of CLIP's training.
    pub fn logit_scale(&self) -> Option<f64> {
        self.logit_scale
    }

    /// Returns the device of the weights.
    pub fn device(&self) -> Device {
        self.token_embed.device()
    }

    /// Computes features `[B, D]` of texts, given as token ids `[B, T]` in i64. The feature of a
    /// text is its end token after the last norm, projected and not normalized.
    ///
    /// Tokens after the end token are never read, so the padding of a text does not matter.
    /// Positions after the last end token of the batch are not computed.
    ///
    /// # Errors
    /// [`Error::Input`] if the ids have another dtype or rank, if there are more than
    /// `context_length` ids in a text, if a text lacks the end token, or if an id is not in the
    /// token table.
    pub fn features(&self, ids: &Tensor) -> Result<Tensor> {
        let (count, ids) = self.check_ids(ids)?;
        let ends = self.ends(count, &ids)?;
        let length = 1 + ends.iter().max().copied().unwrap_or_default();
        let trimmed: Vec<i64> =
            ids.chunks(ids.len() / count).flat_map(|text| &text[..length]).copied().collect();
        let places: Vec<i64> =
            ends.iter().enumerate().map(|(text, end)| (text * length + end) as i64).collect();
        let index =
            |ids: &[i64]| Ok::<_, Error>(Tensor::f_from_slice(ids)?.f_to_device(self.device())?);

        // [B * T, C] -> [B, T, C]
        let tokens = self.token_embed.f_index_select(0, &index(&trimmed)?)?;
        let tokens = tokens.f_unflatten(0, [count as i64, length as i64])?;
        let tokens = tokens.f_add(&self.pos_embed.f_narrow(0, 0, length as i64)?)?;
        let tokens = self.run_blocks(tokens)?.f_flatten(0, 1)?;
        let ends = self.norm.forward(&tokens.f_index_select(0, &index(&places)?)?)?;
        match &self.projection {
            Some(projection) => projection.forward(&ends),
            None => Ok(ends),
        }
    }

    /// `[B, T, C] -> [B, T, C]`.
    fn run_blocks(&self, tokens: Tensor) -> Result<Tensor> {
        let layout = TokenLayout { prefix: tokens.size()[1], grid: (0, 0) };
        let hooks = Hooks::new(&NoMethod, false);
        self.blocks.iter().enumerate().try_fold(tokens, |tokens, (index, block)| {
            let drop_path = DropPath::linear(0.0, index, self.blocks.len());
            let pass = BlockPass { block: index, hooks, drop_path, pooled_only: false };
            block.forward(Stream { tokens, layout }, Queries::All, &pass)
        })
    }

    /// Returns the number of texts and the ids of all texts in order. The check matters on a GPU,
    /// where an id outside the table would end the process.
    fn check_ids(&self, ids: &Tensor) -> Result<(usize, Vec<i64>)> {
        let (longest, vocab) = (self.config.context_length, self.config.vocab_size);
        let refuse = |found: String| Error::Input {
            argument: "ids",
            expected: format!("Int64 [B, 1..={longest}] within 0..{vocab}"),
            found,
        };
        if !ids.defined() {
            return Err(refuse("no tensor".to_owned()));
        }
        let fits = matches!(ids.size()[..], [b, t] if b > 0 && (1..=longest).contains(&t));
        if !fits || ids.kind() != Kind::Int64 {
            return Err(refuse(format!("{:?} {:?}", ids.kind(), ids.size())));
        }
        let mut flat = vec![0i64; ids.numel()];
        let on_cpu = ids.f_to_device(Device::Cpu)?.f_contiguous()?;
        on_cpu.f_copy_data(&mut flat, on_cpu.numel())?;
        match flat.iter().find(|id| !(0..vocab).contains(id)) {
            Some(id) => Err(refuse(format!("the id {id}"))),
            None => Ok((ids.size()[0] as usize, flat)),
        }
    }

    /// Returns the position of the end token in each of `count` texts.
    fn ends(&self, count: usize, ids: &[i64]) -> Result<Vec<usize>> {
        let end = |text: &[i64]| {
            let id = self.config.end_token.or(text.iter().max().copied())?;
            text.iter().position(|&other| other == id)
        };
        let ends = ids.chunks(ids.len() / count).map(end).collect::<Option<_>>();
        ends.ok_or_else(|| Error::Input {
            argument: "ids",
            expected: format!("the end token {:?} in each text", self.config.end_token),
            found: "a text without it".to_owned(),
        })
    }
}
