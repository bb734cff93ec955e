//! The settings of a ViT that its tensors do not show, each with its origin.

use super::choice::{Choice, Unsettled};
use super::names::{Activation, Layout};
use super::plan::Plan;
use super::report::{Setting, SettingSource};
use super::settings::{self, KnownViT, Told};
use super::vit_bias::{FREQUENCIES, bias_table, is_of_square};
use super::vit_kind::ViTKind;
use crate::backbone::{MlpActivation, NormPlacement, Pooling, ViTConfig};
use crate::error::{Error, Result};

/// The width of a head in every model of the supported families, except those of [`KnownViT`].
const HEAD_DIM: i64 = 64;

/// The sizes of a ViT, which its tensors show.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// The kind of the model, if it is not a plain one.
    pub(super) kind: Option<&'static ViTKind>,
    /// Whether there is a position table.
    pub(super) pos_embed: bool,
    pub(super) embed_dim: i64,
    pub(super) patch_size: i64,
    pub(super) mlp_dim: i64,
    pub(super) fc1_rows: i64,
    pub(super) class_token: bool,
    pub(super) num_registers: i64,
    /// Rows of the position table for prefix tokens.
    pub(super) pos_embed_prefix: i64,
    /// The grid of the other rows of the position table; the usual grid if there is no table.
    pub(super) grid: (i64, i64),
}

/// The settings of the model in a checkpoint.
#[derive(Debug)]
pub(super) struct ViTSettings {
    pub(super) num_heads: Choice<i64>,
    pub(super) norm_eps: Choice<f64>,
    pub(super) activation: Choice<MlpActivation>,
    pub(super) pooling: Choice<Pooling>,
    pub(super) norm_placement: Choice<NormPlacement>,
    pub(super) image_size: Choice<(i64, i64)>,
    /// The settings that nothing tells. Their values above are the usual ones.
    pub(super) unsettled: Vec<Unsettled>,
}

impl ViTSettings {
    /// Chooses each setting: what the tensors show, else what a file beside the checkpoint tells,
    /// else what is known of a shape, else what is usual under the names of the file.
    ///
    /// # Errors
    /// The errors of [`settings::told`]; [`Error::FileField`] if the file and the tensors exclude
    /// each other.
    pub(super) fn of(plan: &Plan, sizes: &Sizes) -> Result<Self> {
        let told = settings::told(plan, Some(sizes.embed_dim))?;
        let patches = sizes.grid.0.saturating_mul(sizes.grid.1);
        let Sizes { embed_dim, patch_size, mlp_dim, class_token, .. } = *sizes;
        let known = KnownViT::find(embed_dim, mlp_dim, patch_size, class_token, patches);
        let mut unsettled = Vec::new();
        Ok(ViTSettings {
            num_heads: num_heads(plan, sizes, &told, known, &mut unsettled),
            norm_eps: norm_eps(plan, sizes, &told, &mut unsettled),
            activation: activation_of(plan, sizes, &told, known, &mut unsettled),
            pooling: pooling(plan, sizes, &told, &mut unsettled)?,
            norm_placement: norm_placement(plan, sizes, &told, &mut unsettled),
            image_size: image_size(plan, sizes, &told, &mut unsettled)?,
            unsettled,
        })
    }

    /// Returns the settings that the model of `config` was opened with.
    pub(super) fn used(self, config: &ViTConfig) -> Vec<Setting> {
        let size = |(height, width): &(i64, i64)| format!("{height}x{width}");
        vec![
            self.num_heads.setting("num_heads", &config.num_heads, i64::to_string),
            self.norm_eps.setting("norm_eps", &config.norm_eps, |eps| format!("{eps:e}")),
            self.activation.setting("activation", &config.activation, |act| format!("{act:?}")),
            self.pooling.setting("pooling", &config.pooling, |pooling| format!("{pooling:?}")),
            self.norm_placement
                .setting("norm_placement", &config.norm_placement, |place| format!("{place:?}")),
            self.image_size.setting("image_size", &config.image_size, size),
        ]
    }
}

fn names(plan: &Plan) -> String {
    plan.family.name.to_owned()
}

fn num_heads(
    plan: &Plan,
    sizes: &Sizes,
    told: &Told,
    known: Option<&KnownViT>,
    unsettled: &mut Vec<Unsettled>,
) -> Choice<i64> {
    if let Some((Layout::IntoHeads, &[_, heads, _])) = plan.first_part("blocks.0.attn.qkv.weight") {
        return Choice::new(heads, SettingSource::Tensors);
    }
    let of_tables = [(bias_table(plan), 2), (Some(FREQUENCIES), 4)].into_iter();
    let of_tables =
        of_tables.filter_map(|(name, rank)| Some(plan.shape(name?, rank).ok()?[rank / 2]));
    if let Some(heads) = of_tables.last() {
        return Choice::new(heads, SettingSource::Tensors);
    }
    let embed_dim = sizes.embed_dim;
    let of_kind = sizes.kind.and_then(|kind| Some((kind, kind.head_dim?)));
    let of_kind = of_kind.filter(|(_, head_dim)| embed_dim % head_dim == 0);
    Choice::told(told.num_heads, &told.source, || match (of_kind, known) {
        (Some((kind, head_dim)), _) => {
            Choice::new(embed_dim / head_dim, SettingSource::Known(kind.name.to_owned()))
        }
        (None, Some(known)) => {
            Choice::new(known.num_heads, SettingSource::Known(known.name.to_owned()))
        }
        (None, None) => {
            if embed_dim % HEAD_DIM != 0 {
                unsettled.push(Unsettled {
                    field: "num_heads",
                    candidates: "any divisor of a width that is of no known model",
                    flag: "--heads",
                });
            }
            Choice::new(usual_heads(embed_dim), SettingSource::Assumed(names(plan)))
        }
    })
}

/// Returns the number of heads of width [`HEAD_DIM`], or 1 if that does not divide `embed_dim`.
pub(super) fn usual_heads(embed_dim: i64) -> i64 {
    if embed_dim % HEAD_DIM == 0 { embed_dim / HEAD_DIM } else { 1 }
}

fn norm_eps(
    plan: &Plan,
    sizes: &Sizes,
    told: &Told,
    unsettled: &mut Vec<Unsettled>,
) -> Choice<f64> {
    Choice::told(told.norm_eps, &told.source, || {
        if let Some((kind, eps)) = sizes.kind.and_then(|kind| Some((kind, kind.norm_eps?))) {
            return Choice::new(eps, SettingSource::Known(kind.name.to_owned()));
        }
        if plan.has("norm_pre.weight") {
            return Choice::new(
                1e-5,
                SettingSource::Names(format!("{} and a norm_pre", names(plan))),
            );
        }
        let usual = || Choice::new(plan.family.norm_eps, SettingSource::Names(names(plan)));
        if plan.family.name != "Hugging Face ViT" {
            return usual();
        }
        // Hugging Face gives these names to models of several classes, whose epsilons differ.
        if !sizes.class_token {
            let known = [1280, 1408].contains(&sizes.embed_dim);
            if !known {
                unsettled.push(Unsettled {
                    field: "norm_eps",
                    candidates: "1e-6 (the published I-JEPA), 1e-12 (the default of IJepaConfig)",
                    flag: "--eps",
                });
            }
            return Choice::new(1e-6, SettingSource::Known("I-JEPA".to_owned()));
        }
        if plan.is_bare() && !plan.file.contains("pooler.dense.weight") {
            unsettled.push(Unsettled {
                field: "norm_eps",
                candidates: "1e-12 (ViTModel, ViTMAEModel), 1e-6 (ViTMSNModel)",
                flag: "--eps",
            });
        }
        usual()
    })
}

fn activation_of(
    plan: &Plan,
    sizes: &Sizes,
    told: &Told,
    known: Option<&KnownViT>,
    unsettled: &mut Vec<Unsettled>,
) -> Choice<MlpActivation> {
    let usual = activation(plan, sizes.fc1_rows, sizes.mlp_dim);
    if usual == MlpActivation::SwiGlu {
        return Choice::new(usual, SettingSource::Tensors);
    }
    Choice::told(told.activation, &told.source, || {
        let known = known.filter(|_| plan.family.name == "timm");
        if let Some((known, activation)) = known.and_then(|row| Some((row, row.activation?))) {
            return Choice::new(activation, SettingSource::Known(known.name.to_owned()));
        }
        // The models of this size under these names are LAION's (GELU) and Apple's and Meta's
        // (QuickGELU).
        if matches!(plan.family.activation, Activation::QuickGelu) && sizes.embed_dim >= 1280 {
            unsettled.push(Unsettled {
                field: "activation",
                candidates: "gelu (LAION), quick_gelu (DFN, MetaCLIP)",
                flag: "--activation",
            });
        }
        let source = if plan.has("norm_pre.weight") && !is_openai(plan) {
            SettingSource::Assumed(names(plan))
        } else {
            SettingSource::Names(names(plan))
        };
        Choice::new(usual, source)
    })
}

/// Returns whether the file has one of the scalars that only OpenAI's own files hold.
fn is_openai(plan: &Plan) -> bool {
    match plan.family.activation {
        Activation::QuickGeluBeside(names) => names.iter().any(|name| plan.file.contains(name)),
        _ => false,
    }
}

/// Returns the activation that is usual under the names of the file: SwiGLU if the first layer of
/// the MLP is twice as wide.
pub(super) fn activation(plan: &Plan, fc1_rows: i64, mlp_dim: i64) -> MlpActivation {
    if mlp_dim.checked_mul(2) == Some(fc1_rows) {
        return MlpActivation::SwiGlu;
    }
    match plan.family.activation {
        Activation::QuickGelu => MlpActivation::QuickGelu,
        Activation::GeluTanh => MlpActivation::GeluTanh,
        Activation::QuickGeluBeside(_) if is_openai(plan) => MlpActivation::QuickGelu,
        Activation::Gelu | Activation::QuickGeluBeside(_) => MlpActivation::Gelu,
    }
}

fn pooling(
    plan: &Plan,
    sizes: &Sizes,
    told: &Told,
    unsettled: &mut Vec<Unsettled>,
) -> Result<Choice<Pooling>> {
    let norm_last = plan.has("fc_norm.weight");
    let of_kind = sizes.kind.and_then(|kind| kind.pooling);
    if let Some(pooling) = told.pooling {
        let pooling = match pooling {
            Pooling::ClassToken | Pooling::ClassTokenAndAverage if !sizes.class_token => {
                return Err(Error::FileField {
                    file: plan.file.path().to_path_buf(),
                    field: "pooling".to_owned(),
                    expected: "an average, because the checkpoint has no class token".to_owned(),
                    found: format!("{pooling:?} in {}", told.source),
                });
            }
            Pooling::Average if norm_last => Pooling::AverageThenNorm,
            // timm calls the mean of both tokens of a DeiT `token`.
            Pooling::ClassToken if of_kind == Some(Pooling::ClassAndDistillation) => {
                Pooling::ClassAndDistillation
            }
            pooling => pooling,
        };
        return Ok(Choice::new(pooling, SettingSource::File(told.source.clone())));
    }
    // A classifier that reads two vectors shows that they are the class token and the mean.
    let classifier = plan.file.shape("classifier.weight").and_then(|shape| shape.get(1));
    let is_double = classifier.copied() == sizes.embed_dim.checked_mul(2);
    if !norm_last
        && sizes.class_token
        && !is_double
        && plan.family.name == "open_clip"
        && !plan.has("norm_pre.weight")
    {
        unsettled.push(Unsettled {
            field: "pooling",
            candidates: "class_token, average_then_norm (CLIPA), average",
            flag: "--pooling",
        });
    }
    if let (false, Some(candidates)) = (is_double, sizes.kind.and_then(|kind| kind.poolings)) {
        unsettled.push(Unsettled { field: "pooling", candidates, flag: "--pooling" });
    }
    let pooling = match (of_kind, sizes.class_token) {
        _ if norm_last => Pooling::AverageThenNorm,
        (_, true) if is_double => Pooling::ClassTokenAndAverage,
        (Some(pooling), _) => pooling,
        _ if plan.has("attn_pool.latent") => Pooling::Attention,
        (None, true) => Pooling::ClassToken,
        (None, false) => Pooling::Average,
    };
    Ok(Choice::new(pooling, SettingSource::Tensors))
}

/// Chooses the place of the norms. timm's models with norms after the sub-layers have the tensors of
/// a ViT that is pooled by its mean and has no prefix tokens.
fn norm_placement(
    plan: &Plan,
    sizes: &Sizes,
    told: &Told,
    unsettled: &mut Vec<Unsettled>,
) -> Choice<NormPlacement> {
    let is_alike = plan.family.name == "timm"
        && sizes.kind.is_none()
        && plan.has("fc_norm.weight")
        && !(sizes.class_token || sizes.num_registers > 0 || plan.has("blocks.0.ls1.gamma"));
    Choice::told(told.norm_placement.filter(|_| plan.family.name == "timm"), &told.source, || {
        if let Some(kind) = sizes.kind {
            let source = SettingSource::Known(kind.name.to_owned());
            return Choice::new(kind.norm_placement, source);
        }
        if is_alike {
            unsettled.push(Unsettled {
                field: "norm_placement",
                candidates: "before (a usual ViT), after (timm's vit_*_rpn_*)",
                flag: "--norm-placement",
            });
        }
        Choice::new(NormPlacement::Before, SettingSource::Names(names(plan)))
    })
}

/// Chooses the image size: the told one if it has as many patches as the position table, else that
/// of the table.
///
/// # Errors
/// The errors of [`Plan::shape`].
fn image_size(
    plan: &Plan,
    sizes: &Sizes,
    told: &Told,
    unsettled: &mut Vec<Unsettled>,
) -> Result<Choice<(i64, i64)>> {
    let patch = sizes.patch_size;
    let patches = |(height, width): (i64, i64)| {
        (height.checked_div(patch)?).checked_mul(width.checked_div(patch)?)
    };
    let side = |patches: i64| patches.saturating_mul(patch);
    let of_table = (side(sizes.grid.0), side(sizes.grid.1));
    let fits = |size: (i64, i64)| !sizes.pos_embed || patches(size) == patches(of_table);
    let fitting = told.image_size.filter(|&size| fits(size));
    let bias = bias_table(plan).filter(|_| !sizes.pos_embed);
    if let (Some(table), None) = (bias, fitting)
        && !is_of_square(plan.shape(table, 2)?[0])
    {
        unsettled.push(Unsettled {
            field: "image_size",
            candidates: "any whose bias table is as long as that of the file",
            flag: "--image-size",
        });
    }
    Ok(Choice::told(fitting, &told.source, || Choice::new(of_table, SettingSource::Tensors)))
}
