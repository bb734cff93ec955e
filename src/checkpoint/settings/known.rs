//! The shapes of published models whose settings differ from the rules, and that no file beside the
//! weights describes.

use crate::backbone::MlpActivation;

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
    pub(in crate::checkpoint) norm_eps: f64,
    pub(in crate::checkpoint) activation: MlpActivation,
}

const CONV_NEXTS: [KnownConvNeXt; 3] = [
    KnownConvNeXt {
        name: "ConvNeXt-XXL",
        dims: [384, 768, 1536, 3072],
        norm_eps: 1e-5,
        activation: MlpActivation::Gelu,
    },
    KnownConvNeXt {
        name: "timm's test_convnext",
        dims: [24, 32, 48, 64],
        norm_eps: 1e-5,
        activation: MlpActivation::GeluTanh,
    },
    KnownConvNeXt {
        name: "timm's test_convnext2",
        dims: [32, 64, 96, 128],
        norm_eps: 1e-5,
        activation: MlpActivation::GeluTanh,
    },
];

impl KnownConvNeXt {
    /// Returns the row of these widths.
    pub(in crate::checkpoint) fn find(dims: &[i64]) -> Option<&'static KnownConvNeXt> {
        CONV_NEXTS.iter().find(|row| row.dims == dims)
    }
}
