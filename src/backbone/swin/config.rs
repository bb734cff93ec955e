//! The config of Swin and Swin V2.

use serde::{Deserialize, Serialize};

use crate::backbone::{BackboneConfig, Network, hidden, total};
use crate::error::{Error, Result};
use crate::nn::{NormPlacement, Windows};
use crate::seam::{BackboneShape, Layer, LayerShape, Place};

/// The shape and the settings of a [`FrozenSwin`](crate::FrozenSwin).
///
/// The default is Swin-T at 224x224. A Swin V2 (Liu et al., arXiv 2111.09883) has its norms after
/// the layers, cosine attention and a continuous position bias; [`SwinConfig::preset`] has its
/// configs. From stage to stage the width doubles, and the grid is halved
/// and rounded up. Each side of a window is limited to that side of the stage's grid. A block is
/// shifted along a side only if there is more than one window along it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SwinConfig {
    /// Height and width of the images in pixels. Pixels at the right and lower edges that do not
    /// fill a patch are not read.
    pub image_size: (i64, i64),
    /// Side of a square patch in pixels.
    pub patch_size: i64,
    /// C of the first stage.
    pub embed_dim: i64,
    /// Number of blocks of each stage.
    pub depths: Vec<i64>,
    /// Number of attention heads of each stage, which divides the stage's C.
    pub num_heads: Vec<i64>,
    /// Rows and columns of the windows of each stage.
    pub window_sizes: Vec<(i64, i64)>,
    /// Width between the two linear layers of the MLP divided by C. The width is rounded down.
    pub mlp_ratio: f64,
    /// Whether the query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the reduction of a patch merging has a bias. No published model has one.
    pub merge_bias: bool,
    /// Whether there is a layer norm between the patch embedding and the first block.
    pub patch_norm: bool,
    /// Where the layer norms are: before or after the sub-layers of a block, and before or after the
    /// reduction of a patch merging.
    #[serde(skip_serializing_if = "NormPlacement::is_before")]
    pub norm_placement: NormPlacement,
    /// Whether the scores of attention are cosines times a learned factor of the head, at most 100,
    /// instead of scaled dot products.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub cosine_attention: bool,
    /// The MLP that computes the relative position bias. The bias is a learned table if `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub continuous_bias: Option<ContinuousBiasConfig>,
    /// The value added to the scores between tokens that are in one window only because the windows
    /// are shifted. It is -100, and -200 in the Swin V2 of Hugging Face.
    #[serde(skip_serializing_if = "is_usual_mask")]
    pub mask_score: f64,
    /// Whether a grid that windows do not divide is padded before it is shifted, as in Hugging Face
    /// and torchvision, instead of after it, as in timm.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub pad_before_shift: bool,
    /// The epsilon of every layer norm.
    pub norm_eps: f64,
}

/// The MLP of a [`SwinConfig`] that computes the bias between two tokens of a window from their
/// offset on a logarithmic scale.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContinuousBiasConfig {
    /// Width between the two linear layers of the MLP.
    pub hidden_dim: i64,
    /// Rows and columns of the windows of each stage in the pretraining, by which offsets are
    /// divided. A zero stands for the side of the window itself.
    pub pretrained_window_sizes: Vec<(i64, i64)>,
}

/// The usual value of [`SwinConfig::mask_score`], that of Swin's own code.
pub(crate) const MASK_SCORE: f64 = -100.0;

fn is_usual_mask(score: &f64) -> bool {
    *score == MASK_SCORE
}

impl Default for SwinConfig {
    fn default() -> Self {
        SwinConfig {
            image_size: (224, 224),
            patch_size: 4,
            embed_dim: 96,
            depths: vec![2, 2, 6, 2],
            num_heads: vec![3, 6, 12, 24],
            window_sizes: vec![(7, 7); 4],
            mlp_ratio: 4.0,
            qkv_bias: true,
            merge_bias: false,
            patch_norm: true,
            norm_placement: NormPlacement::Before,
            cosine_attention: false,
            continuous_bias: None,
            mask_score: MASK_SCORE,
            pad_before_shift: false,
            norm_eps: 1e-5,
        }
    }
}

/// The maximum of every dimension. It keeps products of dimensions within `i64`.
const MAX_DIM: i64 = 1 << 16;

impl SwinConfig {
    /// Returns the width of the tokens of a stage.
    pub(crate) fn dim(&self, stage: usize) -> i64 {
        self.embed_dim.saturating_mul(1 << stage.min(62))
    }

    /// Returns the width between the layers of the MLP of a stage.
    pub(super) fn hidden(&self, stage: usize) -> i64 {
        hidden(self.dim(stage), self.mlp_ratio)
    }

    /// Returns the width of the features.
    pub(super) fn last_dim(&self) -> i64 {
        self.dim(self.depths.len().saturating_sub(1))
    }

    /// Returns the rows and columns of the grid of a stage.
    pub fn grid(&self, stage: usize) -> (i64, i64) {
        let side = |pixels: i64| {
            let patches = pixels.checked_div(self.patch_size).unwrap_or_default();
            // A side is at its final value after 64 halvings.
            (0..stage.min(64)).fold(patches, |side, _| side / 2 + side % 2)
        };
        (side(self.image_size.0), side(self.image_size.1))
    }

    /// Returns the windows of a stage's blocks. Every second block uses shifted windows.
    pub(crate) fn windows(&self, stage: usize, shifted: bool) -> Windows {
        let windows = Windows::new(self.grid(stage), self.window_sizes[stage], shifted);
        windows.padding_first(self.pad_before_shift)
    }

    /// Returns whether a grid of the config is both padded and shifted.
    pub(crate) fn is_padded_and_shifted(&self) -> bool {
        let stages = 0..self.window_sizes.len();
        stages.into_iter().any(|stage| self.windows(stage, true).is_padded_and_rolled())
    }

    /// Returns the stage of each block and its number within the stage.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (usize, i64)> {
        let depths = self.depths.iter().enumerate();
        depths.flat_map(|(stage, &depth)| (0..depth).map(move |block| (stage, block)))
    }

    /// Checks that the config is valid.
    ///
    /// # Errors
    /// [`Error::Config`] for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("SwinConfig"))
    }

    fn check(&self) -> Result<()> {
        let within = |field: String, value: i64, least: i64| match value {
            _ if (least..=MAX_DIM).contains(&value) => Ok(()),
            _ => Err(Error::config(field, format!("within {least}..={MAX_DIM}"), value)),
        };
        within("patch_size".to_owned(), self.patch_size, 1)?;
        within("image_size.0".to_owned(), self.image_size.0, self.patch_size)?;
        within("image_size.1".to_owned(), self.image_size.1, self.patch_size)?;
        let stages = self.depths.len();
        if !(1..=16).contains(&stages) {
            return Err(Error::config("depths", "of 1..=16 stages", stages));
        }
        for (field, len) in
            [("num_heads", self.num_heads.len()), ("window_sizes", self.window_sizes.len())]
        {
            if len != stages {
                return Err(Error::config(field, format!("of {stages} stages"), len));
            }
        }
        let blocks = i64::try_from(total(&self.depths)).unwrap_or(i64::MAX);
        within("number of blocks".to_owned(), blocks, 1)?;
        within("embed_dim".to_owned(), self.embed_dim, 1)?;
        within("embed_dim of the last stage".to_owned(), self.last_dim(), 1)?;
        for (stage, (&heads, window)) in self.num_heads.iter().zip(&self.window_sizes).enumerate() {
            within(format!("depths.{stage}"), self.depths[stage], 1)?;
            within(format!("num_heads.{stage}"), heads, 1)?;
            within(format!("window_sizes.{stage}.0"), window.0, 1)?;
            within(format!("window_sizes.{stage}.1"), window.1, 1)?;
            if self.dim(stage) % heads != 0 {
                let expected = format!("a divisor of C = {}", self.dim(stage));
                return Err(Error::config(format!("num_heads.{stage}"), expected, heads));
            }
        }
        let least = hidden(self.embed_dim, self.mlp_ratio);
        if !(least >= 1 && hidden(self.last_dim(), self.mlp_ratio) <= MAX_DIM) {
            let expected = format!("such that widths are within 1..={MAX_DIM}");
            return Err(Error::config("mlp_ratio", expected, self.mlp_ratio));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return Err(Error::config("norm_eps", "a positive number", self.norm_eps));
        }
        if !(self.mask_score.is_finite() && self.mask_score < 0.0) {
            return Err(Error::config("mask_score", "a negative number", self.mask_score));
        }
        self.continuous_bias.as_ref().map_or(Ok(()), |bias| bias.check(stages))
    }

    /// Returns the width of the norm of the patch merging into a stage.
    pub(super) fn merge_norm_dim(&self, stage: usize) -> i64 {
        match self.norm_placement {
            NormPlacement::Before => 4 * self.dim(stage - 1),
            NormPlacement::After => self.dim(stage),
        }
    }

    /// Returns the layers of the patch merging into a stage in the order of the forward pass.
    fn merging(&self, stage: usize) -> [LayerShape; 2] {
        let (inputs, outputs) = (4 * self.dim(stage - 1), self.dim(stage));
        let norm = LayerShape::norm(Layer::MergeNorm(stage), self.merge_norm_dim(stage));
        let reduction = LayerShape::linear(Layer::Merge(stage), inputs, outputs, self.merge_bias);
        match self.norm_placement {
            NormPlacement::Before => [norm, reduction],
            NormPlacement::After => [reduction, norm],
        }
    }

    /// Returns the number of weights of the position bias and the scores of one block of a stage,
    /// and how many of them are biases of layers.
    fn position_params(&self, stage: usize) -> (i64, i64) {
        let heads = self.num_heads[stage];
        let factors = if self.cosine_attention { heads } else { 0 };
        let (bias, biases) = match &self.continuous_bias {
            Some(ContinuousBiasConfig { hidden_dim, .. }) => {
                (hidden_dim * (3 + heads), *hidden_dim)
            }
            None => (self.windows(stage, false).table_rows().saturating_mul(heads), 0),
        };
        (bias.saturating_add(factors), biases)
    }

    /// Returns the layers of the block with number `index` in the whole backbone, in the order of
    /// the forward pass.
    fn block(&self, stage: usize, index: usize) -> [LayerShape; 6] {
        let (c, hidden) = (self.dim(stage), self.hidden(stage));
        let shape = |layer, inputs, outputs, bias| LayerShape { layer, inputs, outputs, bias };
        let mut layers = [
            shape(Layer::Norm1(index), c, c, true),
            shape(Layer::Qkv(index), c, 3 * c, self.qkv_bias),
            shape(Layer::Proj(index), c, c, true),
            shape(Layer::Norm2(index), c, c, true),
            shape(Layer::Fc1(index), c, hidden, true),
            shape(Layer::Fc2(index), hidden, c, true),
        ];
        self.norm_placement.order(&mut layers);
        layers
    }

    /// Returns the name before `.weight` and `.bias` of a layer that the shape lists.
    pub(super) fn name_of(&self, layer: Layer) -> String {
        let block = |index: usize, part: &str| {
            let (stage, block) = self.blocks().nth(index).unwrap_or_default();
            format!("layers.{stage}.blocks.{block}.{part}")
        };
        match layer {
            Layer::PatchEmbed => "patch_embed.proj".to_owned(),
            Layer::PreNorm => "patch_embed.norm".to_owned(),
            Layer::MergeNorm(stage) => format!("layers.{stage}.downsample.norm"),
            Layer::Merge(stage) => format!("layers.{stage}.downsample.reduction"),
            Layer::Norm1(i) => block(i, "norm1"),
            Layer::Qkv(i) | Layer::Q(i) | Layer::Kv(i) => block(i, "attn.qkv"),
            Layer::Proj(i) => block(i, "attn.proj"),
            Layer::Norm2(i) => block(i, "norm2"),
            Layer::Fc1(i) => block(i, "mlp.fc1"),
            Layer::Fc2(i) => block(i, "mlp.fc2"),
            Layer::FinalNorm => "norm".to_owned(),
        }
    }
}

impl ContinuousBiasConfig {
    /// The width of the MLP in every published model.
    pub(crate) const HIDDEN_DIM: i64 = 512;

    fn check(&self, stages: usize) -> Result<()> {
        let windows = &self.pretrained_window_sizes;
        if windows.len() != stages {
            let (field, expected) = ("pretrained_window_sizes", format!("of {stages} stages"));
            return Err(Error::config(field, expected, windows.len()));
        }
        let sides = windows.iter().flat_map(|window| [window.0, window.1]);
        for (field, value, least) in sides
            .map(|side| ("pretrained_window_sizes", side, 0))
            .chain([("continuous_bias.hidden_dim", self.hidden_dim, 1)])
        {
            if !(least..=MAX_DIM).contains(&value) {
                return Err(Error::config(field, format!("within {least}..={MAX_DIM}"), value));
            }
        }
        Ok(())
    }
}

impl BackboneConfig for SwinConfig {
    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn shape(&self) -> Result<BackboneShape> {
        self.validate()?;
        let c = self.embed_dim;
        let norm = |layer, c| LayerShape { layer, inputs: c, outputs: c, bias: true };
        let inputs = 3 * self.patch_size * self.patch_size;
        let mut layers =
            vec![LayerShape { layer: Layer::PatchEmbed, inputs, outputs: c, bias: true }];
        layers.extend(self.patch_norm.then(|| norm(Layer::PreNorm, c)));
        let (mut others, mut other_biases) = (0i64, 0i64);
        for (index, (stage, block)) in self.blocks().enumerate() {
            if stage > 0 && block == 0 {
                layers.extend(self.merging(stage));
            }
            layers.extend(self.block(stage, index));
            let (params, biases) = self.position_params(stage);
            others = others.saturating_add(params);
            other_biases = other_biases.saturating_add(biases);
        }
        layers.push(norm(Layer::FinalNorm, self.last_dim()));
        let matrices = layers.iter().map(LayerShape::num_params);
        let num_params = matrices.fold(others, i64::saturating_add);
        Ok(BackboneShape {
            family: Self::FAMILY,
            lacks: &[(Place::Prefix, "attention is within windows of patches and reads no others")],
            block_dims: self.blocks().map(|(stage, _)| self.dim(stage)).collect(),
            other_biases,
            other_norms: 0,
            num_params,
            num_feature_params: num_params,
            layers,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_is_halved_and_rounded_up() {
        let grid = |image_size, patch_size, stage| {
            SwinConfig { image_size, patch_size, ..SwinConfig::default() }.grid(stage)
        };
        assert_eq!((0..4).map(|s| grid((36, 23), 4, s).0).collect::<Vec<_>>(), [9, 5, 3, 2]);
        assert_eq!(grid((36, 23), 4, 1), (5, 3));
        // The function also accepts invalid configs.
        assert_eq!(grid((i64::MAX, 8), 1, 1), (1 << 62, 4));
        assert_eq!(grid((9, i64::MAX), 1, usize::MAX), (1, 1));
        assert_eq!(grid((i64::MIN, 8), -1, 0), (0, -8));
        assert_eq!(grid((8, 8), 0, 3), (0, 0));
    }
}
