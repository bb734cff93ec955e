//! The shapes of published models whose settings differ from the rules, and that no file beside the
//! weights describes.

use crate::backbone::{ConvNeXtNorm, MlpActivation};

/// A shape of published ViTs. A shape that is `None` in a row may have any value.
#[derive(Debug)]
pub(in crate::checkpoint) struct KnownViT {
    /// What has this shape, in a few words.
    pub(in crate::checkpoint) name: &'static str,
    pub(in crate::checkpoint) num_heads: i64,
    /// The activation, if models of this shape under timm's names have one that differs.
    pub(in crate::checkpoint) activation: Option<MlpActivation>,
    width: i64,
    mlp_dim: Option<i64>,
    patch_size: Option<i64>,
    class_token: Option<bool>,
    patches: Option<i64>,
}

/// A row for every model of a width.
const fn of_width(name: &'static str, width: i64, num_heads: i64) -> KnownViT {
    KnownViT {
        name,
        width,
        num_heads,
        mlp_dim: None,
        patch_size: None,
        class_token: None,
        patches: None,
        activation: None,
    }
}

const TANH: Option<MlpActivation> = Some(MlpActivation::GeluTanh);

/// The shapes of timm 1.0, open_clip 3 and transformers 5. The first row that fits is used.
#[rustfmt::skip]
const VITS: &[KnownViT] = &[
    KnownViT { mlp_dim: Some(192), ..of_width("timm's test_vit", 64, 2) },
    KnownViT { mlp_dim: Some(192), ..of_width("timm's test_vit3", 96, 3) },
    KnownViT { mlp_dim: Some(288), ..of_width("timm's test_vit4", 96, 3) },
    KnownViT { mlp_dim: Some(8960), ..of_width("PE core G", 1536, 16) },
    KnownViT { patch_size: Some(32), class_token: Some(false), activation: TANH, ..of_width("SigLIP B/32", 768, 12) },
    KnownViT { patch_size: Some(16), class_token: Some(false), patches: Some(32 * 32), activation: TANH, ..of_width("SigLIP L/16 at 512", 1024, 16) },
    KnownViT { patch_size: Some(16), class_token: Some(false), activation: TANH, ..of_width("SigLIP so400m/16", 1152, 16) },
    KnownViT { class_token: Some(false), activation: TANH, ..of_width("SigLIP giant-opt", 1536, 16) },
    of_width("ViT-Ti", 192, 3),
    of_width("ViT-S", 384, 6),
    of_width("ViT-B", 768, 12),
    of_width("ViT-L", 1024, 16),
    of_width("ViT-so400m", 1152, 16),
    of_width("ViT-H", 1280, 16),
    of_width("ViT-g", 1408, 16),
    of_width("ViT-g of DINOv2", 1536, 24),
    of_width("ViT-G, bigG", 1664, 16),
    of_width("ViT-e", 1792, 16),
];

impl KnownViT {
    /// Returns the first row that fits a model with these sizes. `patches` is the number of patches
    /// of its position table.
    pub(in crate::checkpoint) fn find(
        width: i64,
        mlp_dim: i64,
        patch_size: i64,
        class_token: bool,
        patches: i64,
    ) -> Option<&'static KnownViT> {
        let fits = |wanted: Option<i64>, found: i64| wanted.is_none_or(|wanted| wanted == found);
        VITS.iter().find(|row| {
            row.width == width
                && fits(row.mlp_dim, mlp_dim)
                && fits(row.patch_size, patch_size)
                && fits(row.patches, patches)
                && row.class_token.is_none_or(|wanted| wanted == class_token)
        })
    }
}

/// The widths of a published ConvNeXt whose settings differ from the rules.
#[derive(Debug)]
pub(in crate::checkpoint) struct KnownConvNeXt {
    /// What has this shape, in a few words.
    pub(in crate::checkpoint) name: &'static str,
    dims: [i64; 4],
    /// The sides of the kernels of each stage, if they differ.
    kernels: &'static [i64],
    pub(in crate::checkpoint) norm_eps: f64,
    pub(in crate::checkpoint) activation: MlpActivation,
    /// The norm, if norms have no bias.
    pub(in crate::checkpoint) norm: Option<ConvNeXtNorm>,
}

const fn convnext(
    name: &'static str,
    dims: [i64; 4],
    norm_eps: f64,
    activation: MlpActivation,
) -> KnownConvNeXt {
    KnownConvNeXt { name, dims, kernels: &[], norm_eps, activation, norm: None }
}

#[rustfmt::skip]
const CONV_NEXTS: [KnownConvNeXt; 6] = [
    convnext("ConvNeXt-XXL", [384, 768, 1536, 3072], 1e-5, MlpActivation::Gelu),
    convnext("timm's test_convnext", [24, 32, 48, 64], 1e-5, MlpActivation::GeluTanh),
    convnext("timm's test_convnext2", [32, 64, 96, 128], 1e-5, MlpActivation::GeluTanh),
    KnownConvNeXt { kernels: &[7, 5, 5, 3], ..convnext("timm's test_convnext3", [32, 64, 96, 128], 1e-5, MlpActivation::Silu) },
    KnownConvNeXt { norm: Some(ConvNeXtNorm::Deviation), ..convnext("timm's convnext_zepto_rms", [32, 64, 128, 256], 1e-6, MlpActivation::Gelu) },
    KnownConvNeXt { norm: Some(ConvNeXtNorm::Rms), ..convnext("timm's convnext_atto_rms", [40, 80, 160, 320], 1e-6, MlpActivation::Gelu) },
];

impl KnownConvNeXt {
    /// Returns the row of these widths and kernels; `kernels` is empty if all stages have the same.
    /// `biases` states whether norms have biases.
    pub(in crate::checkpoint) fn find(
        dims: &[i64],
        kernels: &[i64],
        biases: bool,
    ) -> Option<&'static KnownConvNeXt> {
        CONV_NEXTS
            .iter()
            .find(|row| row.dims == dims && row.kernels == kernels && row.norm.is_none() == biases)
    }
}
