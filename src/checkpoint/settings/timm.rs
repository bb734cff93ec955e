//! The settings in timm's `config.json`. The file names an architecture, whose entry point in timm
//! has the settings; the rules here say the same of the names.

use serde_json::Value;

use super::activations::activation;
use super::{CONFIG, SideFile, Told};
use crate::backbone::MlpActivation::{self, GeluTanh, QuickGelu};
use crate::backbone::{ConvNeXtNorm, NormPlacement, Pooling};
use crate::error::Result;

/// A rule for the architectures whose names match a pattern, in which `*` stands for any text.
struct Rule {
    pattern: &'static str,
    setting: Setting,
}

enum Setting {
    Heads(i64),
    Eps(f64),
    Activation(MlpActivation),
    /// Norms after the sub-layers.
    NormsAfter,
    /// The norm of a ConvNeXt.
    Norm(ConvNeXtNorm),
}

use Setting::{Activation, Eps, Heads, Norm, NormsAfter};

const fn rule(pattern: &'static str, setting: Setting) -> Rule {
    Rule { pattern, setting }
}

/// The settings of timm 1.0 that no tensor shows. Of several rules for one setting the first one
/// that matches is used.
const RULES: &[Rule] = &[
    rule("vit_base_patch16_gap_224*", Heads(16)),
    rule("vit_giant_*radio*", Heads(24)),
    rule("vit_giant_*dinov2*", Heads(24)),
    rule("vit_giant_*tipsv2*", Heads(24)),
    rule("vit_giant_*lingbot*", Heads(24)),
    rule("vit_huge_plus_*", Heads(20)),
    rule("vit_giant_*", Heads(16)),
    rule("vit_gigantic_*", Heads(16)),
    rule("vit_giantopt_*", Heads(16)),
    rule("vit_huge_*", Heads(16)),
    rule("vit_so400m_*", Heads(16)),
    rule("deit3_huge_*", Heads(16)),
    rule("test_vit", Heads(2)),
    rule("test_vit2", Heads(2)),
    rule("test_vit3", Heads(3)),
    rule("test_vit4", Heads(3)),
    rule("convnext_xxlarge*", Eps(1e-5)),
    rule("test_convnext*", Eps(1e-5)),
    rule("vit_*_clip_*", Eps(1e-5)),
    rule("*_quickgelu*", Activation(QuickGelu)),
    rule("vit_base_patch32_siglip_*", Activation(GeluTanh)),
    rule("vit_large_patch16_siglip_*512", Activation(GeluTanh)),
    rule("vit_so400m_patch16_siglip_*", Activation(GeluTanh)),
    rule("vit_giantopt_*", Activation(GeluTanh)),
    rule("test_convnext", Activation(GeluTanh)),
    rule("test_convnext2", Activation(GeluTanh)),
    rule("test_convnext3", Activation(MlpActivation::Silu)),
    rule("vit_*_rpn_*", NormsAfter),
    rule("eva02_enormous_*", NormsAfter),
    rule("convnext_zepto_rms*", Norm(ConvNeXtNorm::Deviation)),
    rule("convnext_*_rms*", Norm(ConvNeXtNorm::Rms)),
];

/// Arguments of timm's networks in `model_args` that change the features without a tensor that
/// shows it, each with the only values that are supported.
const PLAIN: [(&str, &[&str]); 6] = [
    ("norm_layer", &["\"layernorm\"", "\"layer_norm\""]),
    ("block_fn", &[]),
    ("pool_include_prefix", &["false"]),
    ("use_rot_pos_emb", &["false"]),
    ("attn_layer", &["\"\"", "\"attn\""]),
    ("always_partition", &["false"]),
];

/// Reads the settings. `embed_dim` is the width of the model in the checkpoint, if it has a single
/// one.
pub(super) fn told(file: &SideFile, embed_dim: Option<i64>) -> Result<Told> {
    let json = &file.json;
    file.width(json, "num_features", None, embed_dim)?;
    let (name, args) = (json["architecture"].as_str().unwrap_or_default(), &json["model_args"]);
    let pooled =
        [&args["global_pool"], &json["global_pool"], &json["pretrained_cfg"]["global_pool"]];
    let pool = pooled.iter().find_map(|value| value.as_str());
    let told = match pool {
        Some(pool) => of_architecture(file, name, "global_pool", pool)?,
        None => of_architecture(file, name, "global_pool", "default")?,
    };
    for (field, supported) in PLAIN {
        let value = &args[field];
        if !value.is_null() && !supported.contains(&value.to_string().as_str()) {
            let expected = match supported.first() {
                Some(first) => format!("{first} or absent"),
                None => "absent".to_owned(),
            };
            return Err(file.field(&format!("model_args.{field}"), &expected, value));
        }
    }
    let image_size = match file.size(args, "img_size")? {
        Some(size) => Some(size),
        None => input_size(&json["pretrained_cfg"]["input_size"]),
    };
    Ok(Told {
        num_heads: file.number(args, "num_heads", Value::as_i64)?.or(told.num_heads),
        norm_eps: file.number(args, "norm_eps", Value::as_f64)?.or(told.norm_eps),
        activation: activation(file, args, "act_layer")?.or(told.activation),
        image_size,
        norm_placement: match args["use_post_norm"].as_bool() {
            Some(true) => Some(NormPlacement::After),
            _ => told.norm_placement,
        },
        ..told
    })
}

/// Returns the settings of the architecture `name`, pooled as `pool` says, which is the value of
/// `field` in the file, or `default` if there is none.
///
/// # Errors
/// [`Error::FileField`](crate::Error::FileField) if the architecture or the pooling is not
/// supported.
pub(super) fn of_architecture(
    file: &SideFile,
    name: &str,
    field: &str,
    pool: &str,
) -> Result<Told> {
    // A tag behind a dot names the weights, not the architecture.
    let name = name.split('.').next().unwrap_or_default();
    let mut told = Told { source: format!("{CONFIG}, architecture {name}"), ..Told::default() };
    if !name.is_empty() {
        told.norm_placement = Some(NormPlacement::Before);
    }
    for rule in RULES.iter().filter(|rule| matches(rule.pattern, name)) {
        match rule.setting {
            Heads(heads) => told.num_heads = told.num_heads.or(Some(heads)),
            Eps(eps) => told.norm_eps = told.norm_eps.or(Some(eps)),
            Activation(activation) => told.activation = told.activation.or(Some(activation)),
            NormsAfter => told.norm_placement = Some(NormPlacement::After),
            Norm(norm) => told.norm = told.norm.or(Some(norm)),
        }
    }
    told.pooling = match pool {
        "token" => Some(Pooling::ClassToken),
        // With timm's `fc_norm` in the file the norm comes after the mean.
        "avg" => Some(Pooling::Average),
        // Attention pooling has tensors of its own, and a pooling that is not told is the usual one.
        "map" | "default" => None,
        "" if field == "timm_pool" => None,
        _ => return Err(file.field(field, "token, avg or map", &pool.into())),
    };
    Ok(told)
}

/// Returns the height and width in `[3, H, W]`.
fn input_size(value: &Value) -> Option<(i64, i64)> {
    match value.as_array().map(Vec::as_slice) {
        Some([_, height, width]) => height.as_i64().zip(width.as_i64()),
        _ => None,
    }
}

/// Returns whether `name` matches `pattern`, in which each `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(name) = name.strip_prefix(start) else { return false };
    (0..=name.len()).any(|at| name.get(at..).is_some_and(|name| matches(rest, name)))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;

    fn read(json: Value) -> Result<Told> {
        told(&SideFile { path: PathBuf::from(CONFIG), json }, Some(1280))
    }

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("test_vit", "test_vit2", false),
            ("vit_*_rpn_*", "vit_base_patch16_rpn_224", true),
            ("vit_*_rpn_*", "vit_base_patch16_224", false),
            ("vit_large_patch16_siglip_*512", "vit_large_patch16_siglip_gap_512", true),
            ("vit_large_patch16_siglip_*512", "vit_large_patch16_siglip_512", true),
            ("vit_large_patch16_siglip_*512", "vit_large_patch16_siglip_gap_384", false),
            ("*_quickgelu*", "vit_base_patch16_clip_quickgelu_224", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn the_arguments_come_before_the_rules() {
        let json = json!({"architecture": "vit_huge_patch14_clip_quickgelu_224.dfn5b",
            "global_pool": "token", "pretrained_cfg": {"input_size": [3, 224, 196]}});
        let found = read(json).unwrap();
        assert_eq!((found.num_heads, found.norm_eps), (Some(16), Some(1e-5)));
        assert_eq!(found.activation, Some(QuickGelu));
        assert_eq!(
            (found.pooling, found.image_size),
            (Some(Pooling::ClassToken), Some((224, 196)))
        );
        let json = json!({"architecture": "vit_huge_patch14_224", "global_pool": "token",
            "model_args": {"num_heads": 20, "act_layer": "relu", "global_pool": "avg"}});
        let found = read(json).unwrap();
        assert_eq!((found.num_heads, found.pooling), (Some(20), Some(Pooling::Average)));
        assert_eq!(found.activation, Some(MlpActivation::Relu));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (change, field) in [
            (json!({"architecture": "x", "num_features": 768}), "num_features"),
            (json!({"architecture": "x", "global_pool": "avgmax"}), "global_pool"),
            (json!({"architecture": "x", "model_args": {"global_pool": "max"}}), "global_pool"),
            (json!({"architecture": "x", "model_args": {"norm_layer": "rmsnorm"}}), "norm_layer"),
            (
                json!({"architecture": "x", "model_args": {"pool_include_prefix": true}}),
                "pool_include_prefix",
            ),
            (json!({"architecture": "x", "model_args": {"act_layer": "mish"}}), "act_layer"),
        ] {
            let error = read(change).unwrap_err().to_string();
            assert!(error.contains(field), "{field}: {error}");
        }
    }
}
