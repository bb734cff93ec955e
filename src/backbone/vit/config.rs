//! The config of the plain ViT family, which covers ViT, CLIP's image tower, DINOv2, DINOv3, SigLIP
//! and their relatives.

use serde::{Deserialize, Serialize};

use super::pooling::{AttentionPooling, Pooling};
use crate::error::{Error, Result};
use crate::nn::{GridPairs, MlpActivation, NormPlacement, Rotary};
use crate::seam::TokenLayout;

/// The shape and the settings of a [`FrozenViT`](crate::FrozenViT).
///
/// The default is ViT-B/16 at 224x224. Every number that changes results is a field; the forward
/// pass has no hidden ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ViTConfig {
    /// Height and width of the images in pixels. Rows and columns of pixels behind the last whole
    /// patch are not read.
    pub image_size: (i64, i64),
    /// Side of a square patch in pixels.
    pub patch_size: i64,
    /// C, the width of a token.
    pub embed_dim: i64,
    /// Number of blocks.
    pub depth: i64,
    /// Number of attention heads, which divides `embed_dim`.
    pub num_heads: i64,
    /// Width between the two linear layers of the MLP; for SwiGLU, the width of each half.
    pub mlp_dim: i64,
    /// The activation of the MLP.
    pub activation: MlpActivation,
    /// Whether there is a class token before the patches.
    pub class_token: bool,
    /// Number of register tokens, which are between the class token and the patches. A distillation
    /// token (DeiT) is the first of them.
    pub num_registers: i64,
    /// Whether a learned position table is added to the tokens.
    pub pos_embed: bool,
    /// Number of prefix tokens that the first rows of the position table cover: none, the class
    /// token, or all.
    pub pos_embed_prefix: i64,
    /// The rotary position embedding of queries and keys, if there is one (DINOv3, EVA-02).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rotary: Option<Rotary>,
    /// Whether queries and keys of patches are rotated by angles whose frequencies are weights, for
    /// each block, head and side of the grid (RoPE-ViT's mixed models). `rotary` is then `None`.
    #[serde(skip_serializing_if = "is_false")]
    pub mixed_rotary: bool,
    /// Whether attention adds a learned bias for each offset between two tokens (BEiT). There must
    /// be a class token and no registers.
    #[serde(skip_serializing_if = "is_false")]
    pub relative_bias: bool,
    /// Whether the patch convolution has a bias. In CLIP it has none.
    pub patch_bias: bool,
    /// Whether there is a norm after the patch convolution, before the position table (AIMv2).
    #[serde(skip_serializing_if = "is_false")]
    pub patch_norm: bool,
    /// Whether the query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the projection after attention and the layers of the MLP have a bias. In AIMv2 they
    /// have none.
    #[serde(skip_serializing_if = "is_true")]
    pub proj_bias: bool,
    /// Whether every norm is an RMS norm, which does not subtract the mean, instead of a layer norm
    /// (AIMv2). Attention pooling has a layer norm in any case.
    #[serde(skip_serializing_if = "is_false")]
    pub rms_norm: bool,
    /// Whether these norms have a bias.
    #[serde(skip_serializing_if = "is_true")]
    pub norm_bias: bool,
    /// Whether there is a layer norm between the embedding and the first block (CLIP).
    pub pre_norm: bool,
    /// Whether each sub-layer is followed by a learned factor for each channel (DINOv2, DeiT III).
    pub layer_scale: bool,
    /// Whether the layer norms of a block are before or after its sub-layers. After them, there is
    /// no layer scale.
    #[serde(skip_serializing_if = "NormPlacement::is_before")]
    pub norm_placement: NormPlacement,
    /// Whether there is a layer norm between attention and its projection (EVA-02's CLIP models).
    #[serde(skip_serializing_if = "is_false")]
    pub attention_norm: bool,
    /// Whether there is a layer norm between the activation and the second layer of the MLP
    /// (EVA-02).
    #[serde(skip_serializing_if = "is_false")]
    pub mlp_norm: bool,
    /// Whether there is a layer norm behind the blocks or the pooling. Perception Encoder's towers
    /// for dense features have none.
    #[serde(skip_serializing_if = "is_true")]
    pub final_norm: bool,
    /// How the tokens become the features.
    pub pooling: Pooling,
    /// The attention pooling of the checkpoint, if it has one (SigLIP). The features depend on it
    /// only with [`Pooling::Attention`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_pool: Option<AttentionPooling>,
    /// The epsilon of every norm.
    pub norm_eps: f64,
    /// Output width of the projection that CLIP applies to the features, if there is one.
    pub projection: Option<i64>,
}

impl Default for ViTConfig {
    fn default() -> Self {
        ViTConfig {
            image_size: (224, 224),
            patch_size: 16,
            embed_dim: 768,
            depth: 12,
            num_heads: 12,
            mlp_dim: 3072,
            activation: MlpActivation::Gelu,
            class_token: true,
            num_registers: 0,
            pos_embed: true,
            pos_embed_prefix: 1,
            rotary: None,
            mixed_rotary: false,
            relative_bias: false,
            patch_bias: true,
            patch_norm: false,
            qkv_bias: true,
            proj_bias: true,
            rms_norm: false,
            norm_bias: true,
            pre_norm: false,
            layer_scale: false,
            norm_placement: NormPlacement::Before,
            attention_norm: false,
            mlp_norm: false,
            final_norm: true,
            pooling: Pooling::ClassToken,
            attention_pool: None,
            norm_eps: 1e-6,
            projection: None,
        }
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

fn is_true(value: &bool) -> bool {
    *value
}

/// The maximum of every dimension. It keeps products of dimensions within `i64`.
const MAX_DIM: i64 = 1 << 16;

impl ViTConfig {
    /// Returns P, the number of class and register tokens.
    pub fn num_prefix_tokens(&self) -> i64 {
        self.num_registers.saturating_add(i64::from(self.class_token))
    }

    /// Returns the rows and columns of the patch grid.
    pub fn grid(&self) -> (i64, i64) {
        let patches = |side: i64| side.checked_div(self.patch_size).unwrap_or_default();
        (patches(self.image_size.0), patches(self.image_size.1))
    }

    /// Returns the layout of the token sequence.
    pub fn layout(&self) -> TokenLayout {
        TokenLayout { prefix: self.num_prefix_tokens(), grid: self.grid() }
    }

    /// Returns the number of rows of the position table.
    pub(super) fn positions(&self) -> i64 {
        self.pos_embed_prefix.saturating_add(self.layout().num_patches())
    }

    /// Returns the number of weights, including those of the projection if there is one.
    pub fn num_params(&self) -> i64 {
        let (c, hidden, patch) = (self.embed_dim, self.mlp_dim, self.patch_size);
        let present = i64::from;
        let halves = self.activation.halves();
        let positions = present(self.pos_embed).saturating_mul(self.positions());
        let offsets = GridPairs::table_rows(self.grid());
        let (proj, norm) = (present(self.proj_bias), 1 + present(self.norm_bias));
        let products: [&[i64]; 18] = [
            &[self.num_prefix_tokens(), c],
            &[positions, c],
            &[3, patch, patch, c],
            &[present(self.patch_bias), c],
            &[self.depth, 4, c, c],
            &[self.depth, proj + 3 * present(self.qkv_bias), c],
            &[self.depth, halves + 1, c, hidden],
            &[self.depth, proj * halves, hidden],
            &[self.depth, 2 * norm + proj, c],
            &[self.depth, 2 * present(self.layer_scale), c],
            &[self.depth, norm * present(self.attention_norm), c],
            &[self.depth, norm * present(self.mlp_norm), hidden],
            &[norm * present(self.final_norm), c],
            &[norm * present(self.pre_norm), c],
            &[norm * present(self.patch_norm), c],
            &[present(self.mixed_rotary), self.depth, c],
            &[present(self.relative_bias), self.depth, self.num_heads, offsets],
            &[self.projection.unwrap_or(0), c],
        ];
        let product = |factors: &[i64]| factors.iter().fold(1, |p: i64, &f| p.saturating_mul(f));
        let pool = self.attention_pool.map_or(0, |pool| pool.num_params(c, self.qkv_bias));
        products.into_iter().map(product).fold(pool, i64::saturating_add)
    }

    /// Checks that the config is valid.
    ///
    /// # Errors
    /// [`Error::Config`] for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("ViTConfig"))
    }

    fn check(&self) -> Result<()> {
        let sizes = [
            ("patch_size", self.patch_size, 1),
            ("image_size.0", self.image_size.0, 1),
            ("image_size.1", self.image_size.1, 1),
            ("embed_dim", self.embed_dim, 1),
            ("depth", self.depth, 1),
            ("num_heads", self.num_heads, 1),
            ("mlp_dim", self.mlp_dim, 1),
            ("num_registers", self.num_registers, 0),
            ("pos_embed_prefix", self.pos_embed_prefix, 0),
            ("projection", self.projection.unwrap_or(1), 1),
        ];
        for (field, value, least) in sizes {
            if !(least..=MAX_DIM).contains(&value) {
                return Err(Error::config(field, format!("within {least}..={MAX_DIM}"), value));
            }
        }
        for (field, side) in
            [("image_size.0", self.image_size.0), ("image_size.1", self.image_size.1)]
        {
            if side < self.patch_size {
                return Err(Error::config(field, format!("at least {}", self.patch_size), side));
            }
        }
        if self.embed_dim % self.num_heads != 0 {
            let expected = format!("a divisor of embed_dim {}", self.embed_dim);
            return Err(Error::config("num_heads", expected, self.num_heads));
        }
        let (class, prefix) = (i64::from(self.class_token), self.num_prefix_tokens());
        if ![0, class, prefix].contains(&self.pos_embed_prefix) {
            let expected = format!("0, {class} (class token) or {prefix} (all prefix tokens)");
            return Err(Error::config("pos_embed_prefix", expected, self.pos_embed_prefix));
        }
        self.check_positions()?;
        if let Some(pool) = &self.attention_pool {
            pool.check(self.embed_dim, MAX_DIM)?;
        }
        if self.layer_scale && !self.norm_placement.is_before() {
            let expected = "false if the norms come after the sub-layers";
            return Err(Error::config("layer_scale", expected, true));
        }
        self.check_pooling()?;
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return Err(Error::config("norm_eps", "a positive number", self.norm_eps));
        }
        Ok(())
    }

    /// Checks the rotary embeddings and the bias of attention.
    fn check_positions(&self) -> Result<()> {
        let head_dim = self.embed_dim / self.num_heads;
        if let Some(rotary) = &self.rotary {
            rotary.check(head_dim)?;
        }
        if self.mixed_rotary && head_dim % 2 != 0 {
            let expected = "an even embed_dim / num_heads, for rotary positions";
            return Err(Error::config("num_heads", expected, format!("heads of {head_dim}")));
        }
        let kinds = [self.rotary.is_some(), self.mixed_rotary, self.relative_bias];
        if kinds.into_iter().filter(|&kind| kind).count() > 1 {
            let expected = "at most one of rotary, mixed_rotary and relative_bias";
            return Err(Error::config("rotary", expected, "several"));
        }
        if self.relative_bias && !(self.class_token && self.num_registers == 0) {
            let expected = "false without a class token or with registers";
            return Err(Error::config("relative_bias", expected, true));
        }
        Ok(())
    }

    /// Checks that the tokens and the layers that pooling reads exist.
    fn check_pooling(&self) -> Result<()> {
        let expected = match self.pooling {
            Pooling::ClassToken | Pooling::ClassTokenAndAverage if !self.class_token => {
                "an average if there is no class token"
            }
            Pooling::ClassAndDistillation if !self.class_token || self.num_registers < 1 => {
                "another one if there is no class token beside a distillation token"
            }
            Pooling::Attention if self.attention_pool.is_none() => {
                "another one if there is no attention_pool"
            }
            _ => return Ok(()),
        };
        Err(Error::config("pooling", expected, self.pooling.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected numbers are the parameters of timm's models without their heads.
    #[test]
    fn weights_are_counted_as_timm_counts_them() {
        let beit = ViTConfig {
            pos_embed: false,
            pos_embed_prefix: 0,
            relative_bias: true,
            layer_scale: true,
            pooling: Pooling::AverageThenNorm,
            ..ViTConfig::default()
        };
        // The biases of the keys, which are zero, are weights here and none in timm.
        assert_eq!(beit.num_params(), 85_761_984 + 12 * 768);
        let mixed = ViTConfig {
            pos_embed: false,
            pos_embed_prefix: 0,
            mixed_rotary: true,
            layer_scale: true,
            ..ViTConfig::default()
        };
        assert_eq!(mixed.num_params(), 85_675_008);
        let aimv2 = ViTConfig {
            patch_size: 14,
            embed_dim: 1024,
            depth: 24,
            num_heads: 8,
            mlp_dim: 2816,
            activation: MlpActivation::SwiGlu,
            class_token: false,
            pos_embed_prefix: 0,
            patch_norm: true,
            qkv_bias: false,
            proj_bias: false,
            rms_norm: true,
            norm_bias: false,
            pooling: Pooling::Average,
            norm_eps: 1e-5,
            ..ViTConfig::default()
        };
        assert_eq!(aimv2.num_params(), 309_197_824);
    }

    #[test]
    fn positions_that_exclude_each_other_are_refused() {
        let class_token = ViTConfig { relative_bias: true, ..ViTConfig::default() };
        class_token.validate().unwrap();
        for config in [
            ViTConfig { mixed_rotary: true, ..class_token.clone() },
            ViTConfig { rotary: Some(Rotary::DINOV3), ..class_token.clone() },
            ViTConfig { num_registers: 1, ..class_token },
        ] {
            assert!(config.validate().is_err(), "{config:?}");
        }
    }

    #[test]
    fn settings_of_later_families_are_not_written_for_earlier_ones() {
        let text = serde_json::to_string(&ViTConfig::default()).unwrap();
        for field in ["mixed", "relative", "patch_norm", "proj_bias", "rms_norm", "norm_bias"] {
            assert!(!text.contains(field), "{field}: {text}");
        }
    }
}
