//! Reads the config of a ViT and its position table from a checkpoint.

use std::borrow::Cow;
use std::path::Path;

use tch::Tensor;

use super::choice::Unsettled;
use super::load::{Checkpoint, infer};
use super::names::{PositionNames, SHARED_BIAS_TABLE};
use super::plan::Plan;
use super::report::Setting;
use super::settings;
use super::square_root;
use super::vit_bias::{FREQUENCIES, TABLE, bias_grid, bias_table, read_bias};
use super::vit_kind::ViTKind;
use super::vit_settings::{Sizes, ViTSettings};
use crate::backbone::{AttentionPooling, ViTConfig};
use crate::error::Result;
use crate::nn::{TableFilter, resize_pos_embed};

impl ViTConfig {
    /// Infers the config of the model in a checkpoint.
    ///
    /// The tensors do not show every value; the table gives the rules for the others. A file of
    /// settings beside the checkpoint (`config.json` of Hugging Face or timm,
    /// `open_clip_config.json`) has priority over the rules for heads, eps, activation (except
    /// SwiGLU), pooling and image size (if it gives the same number of patches). If a rule does not
    /// hold for your model, correct the value and use
    /// [`FrozenViT::open_with`](crate::FrozenViT::open_with).
    ///
    /// Where nothing tells a value, this function returns the usual one, whereas
    /// [`FrozenViT::open`](crate::FrozenViT::open) and
    /// [`AnyBackbone::open`](crate::AnyBackbone::open) return [`Error::Unsettled`].
    ///
    /// | value | rule |
    /// |---|---|
    /// | heads | 16 for the widths of ViT-H, -g, -G, -e and so400m (1152, 1280, 1408, 1664, 1792) and of SigLIP's giant-opt; otherwise `embed_dim / 64`, or 1 if 64 does not divide `embed_dim`; 128 channels each in AIMv2; Google's `.npz` files, the bias tables of BEiT and learned rotary frequencies contain the number |
    /// | image size | that of a file beside the checkpoint, if the position table fits it; else a square grid of patches if the position table without its prefix rows has a square number of rows; otherwise one row of patches. Without a position table, the grid of BEiT's bias table, which is as square as the number of its rows allows |
    /// | eps | 1e-6 (Google, timm, DINOv2), 1e-12 (Hugging Face ViT and BEiT; 1e-6 without a class token), 1e-5 (AIMv2; CLIP under any names; under timm's names a CLIP model has `norm_pre`) |
    /// | activation | SwiGLU if the first MLP layer is twice as wide (packed); QuickGELU for Hugging Face CLIP, and for open_clip names if the file has OpenAI's own scalars (`input_resolution`, `context_length`, `vocab_size`); tanh GELU for the shapes that only SigLIP's later models have under timm's names; otherwise exact GELU |
    /// | place of the norms | before each sub-layer; `config.json` of timm tells otherwise (`vit_*_rpn_*`) |
    /// | RMS norms | the norms of the blocks have no bias |
    /// | pooling | average, then norm if there is `fc_norm`; the class token beside the average if there is a classifier over both; otherwise the class token; norm, then average if there is no class token |
    /// | prefix rows of the position table | Under the names of timm and of the DINOv2 repository: the usual number is 0 if there is a `reg_token`, and otherwise 1 for the class token. The first of the usual number, 0, the class token, and the class token plus registers that leaves the grid of a told image size, else a square grid, is used; if none does, the usual number. Under other names: one row for the class token. |
    ///
    /// # Errors
    /// The errors of [`TensorFile::open`](crate::checkpoint::TensorFile::open);
    /// [`Error::UnknownFormat`] if the tensor names match no supported family;
    /// [`Error::OtherBackbone`] if the file holds a backbone other than a ViT;
    /// [`Error::MissingTensor`] or [`Error::ShapeMismatch`] if the tensors that determine the sizes
    /// are absent or have another rank; [`Error::CorruptFile`] if the tensors give an invalid
    /// config; [`Error::FileField`] if a field of a file beside the checkpoint is not supported.
    ///
    /// [`Error::Unsettled`]: crate::Error::Unsettled
    /// [`Error::CorruptFile`]: crate::Error::CorruptFile
    /// [`Error::FileField`]: crate::Error::FileField
    /// [`Error::UnknownFormat`]: crate::Error::UnknownFormat
    /// [`Error::OtherBackbone`]: crate::Error::OtherBackbone
    /// [`Error::MissingTensor`]: crate::Error::MissingTensor
    /// [`Error::ShapeMismatch`]: crate::Error::ShapeMismatch
    pub fn infer(path: impl AsRef<Path>) -> Result<Self> {
        infer(path)
    }
}

impl Checkpoint for ViTConfig {
    fn from_plan(plan: &Plan) -> Result<Self> {
        let sizes = sizes(plan)?;
        let settings = ViTSettings::of(plan, &sizes)?;
        let has_any = |names: [&str; 2]| names.into_iter().any(|name| plan.has(name));
        // The models whose norms have no bias have RMS norms.
        let norm_bias = has_any(["blocks.0.norm1.bias", "blocks.0.norm2.bias"]);
        Ok(ViTConfig {
            image_size: settings.image_size.value,
            patch_size: sizes.patch_size,
            embed_dim: sizes.embed_dim,
            depth: (0..).take_while(|i| plan.has(&format!("blocks.{i}.norm1.weight"))).count()
                as i64,
            num_heads: settings.num_heads.value,
            mlp_dim: sizes.mlp_dim,
            activation: settings.activation.value,
            class_token: sizes.class_token,
            num_registers: sizes.num_registers,
            pos_embed: sizes.pos_embed,
            pos_embed_prefix: sizes.pos_embed_prefix,
            rotary: sizes.kind.and_then(|kind| kind.rotary),
            mixed_rotary: plan.has(FREQUENCIES),
            relative_bias: bias_table(plan).is_some(),
            patch_bias: plan.has("patch_embed.proj.bias"),
            patch_norm: plan.has("patch_embed.norm.weight"),
            qkv_bias: plan.has("blocks.0.attn.qkv.bias"),
            proj_bias: has_any(["blocks.0.attn.proj.bias", "blocks.0.mlp.fc2.bias"]),
            rms_norm: !norm_bias,
            norm_bias,
            pre_norm: plan.has("norm_pre.weight"),
            layer_scale: plan.has("blocks.0.ls1.gamma"),
            norm_placement: settings.norm_placement.value,
            attention_norm: plan.has("blocks.0.attn.norm.weight"),
            mlp_norm: plan.has("blocks.0.mlp.norm.weight"),
            final_norm: sizes.kind.is_none_or(|kind| kind.final_norm),
            pooling: settings.pooling.value,
            attention_pool: if plan.has("attn_pool.latent") {
                Some(AttentionPooling {
                    num_heads: sizes.kind.and_then(|kind| kind.pool_heads),
                    mlp_dim: if plan.has("attn_pool.key_value.weight") {
                        0
                    } else {
                        plan.shape("attn_pool.mlp.fc2.weight", 2)?[1]
                    },
                    reads_prefix: sizes.kind.is_some_and(|kind| kind.pool_prefix),
                })
            } else {
                None
            },
            norm_eps: settings.norm_eps.value,
            projection: if plan.has("projection.weight") {
                Some(plan.shape("projection.weight", 2)?[0])
            } else {
                None
            },
        })
    }

    /// Sets the number of prefix rows that the file's table most likely has.
    ///
    /// The table alone does not determine the number: a table of 4x4 rows can also be one of 3x5
    /// rows and a class token. A likely number that fits the grid of the config comes first, then a
    /// likely number with which the table can be resized. An unlikely number that fits the grid
    /// comes last, because resizing is the more probable case.
    fn fit(&self, plan: &Plan) -> Result<Self> {
        if !self.pos_embed {
            return Ok(self.clone());
        }
        let rows = plan.shape("pos_embed", 3)?[1];
        let patches = self.layout().num_patches();
        let likely = [self.pos_embed_prefix, usual_prefix(plan, self.class_token)];
        let fits = |prefix: &i64| prefix.checked_add(patches) == Some(rows);
        let resizes = |prefix: &i64| rows.checked_sub(*prefix).and_then(square_root).is_some();
        let prefix = likely
            .into_iter()
            .find(fits)
            .or_else(|| likely.into_iter().find(resizes))
            .or_else(|| prefixes(self.class_token, self.num_registers).into_iter().find(fits));
        let pos_embed_prefix = prefix.unwrap_or(self.pos_embed_prefix);
        Ok(ViTConfig { pos_embed_prefix, ..self.clone() })
    }

    fn unsettled(plan: &Plan) -> Result<Vec<Unsettled>> {
        Ok(ViTSettings::of(plan, &sizes(plan)?)?.unsettled)
    }

    fn settings(&self, plan: &Plan) -> Result<Vec<Setting>> {
        Ok(ViTSettings::of(plan, &sizes(plan)?)?.used(self))
    }

    /// The norm behind the blocks has one of two names in timm, depending on its place; the model
    /// takes the one that the file has. A bias table may be shared by all blocks.
    fn stored_name<'n>(&self, plan: &Plan, name: &'n str) -> Cow<'n, str> {
        if name.ends_with(TABLE) && !plan.has(name) && plan.has(SHARED_BIAS_TABLE) {
            return SHARED_BIAS_TABLE.into();
        }
        let (norm, other) = match name.split_once('.') {
            Some(("norm", part)) => (name, format!("fc_norm.{part}")),
            Some(("fc_norm", part)) => (name, format!("norm.{part}")),
            _ => return name.into(),
        };
        if !plan.has(norm) && plan.has(&other) { other.into() } else { name.into() }
    }

    fn read(&self, plan: &Plan, name: &str, shape: &[i64]) -> Result<Tensor> {
        match name {
            "pos_embed" => read_positions(plan, shape, self),
            SHARED_BIAS_TABLE => read_bias(plan, name, shape, self),
            _ if name.ends_with(TABLE) => read_bias(plan, name, shape, self),
            _ => plan.read(name, shape, self.num_heads),
        }
    }
}

/// Returns the sizes that the tensors show.
fn sizes(plan: &Plan) -> Result<Sizes> {
    let dims = plan.shape("patch_embed.proj.weight", 4)?;
    let fc1_rows = plan.shape("blocks.0.mlp.fc1.weight", 2)?[0];
    let mlp_dim = plan.shape("blocks.0.mlp.fc2.weight", 2)?[1];
    let class_token = plan.has("cls_token");
    let num_registers = if plan.has("reg_token") { plan.shape("reg_token", 3)?[1] } else { 0 };
    let (embed_dim, patch_size) = (dims[0], dims[2]);
    let kind = ViTKind::of(plan, embed_dim, mlp_dim.checked_mul(2) == Some(fc1_rows))?;
    let rotates = |kind: &&ViTKind| kind.rotary.is_some() || plan.has(FREQUENCIES);
    let has_table = plan.has("pos_embed");
    let (pos_embed_prefix, grid) = match (bias_table(plan), kind.filter(rotates)) {
        (Some(table), _) if !has_table => (0, bias_grid(plan.shape(table, 2)?[0])),
        (None, Some(kind)) if !has_table => {
            let patches = kind.side.checked_div(patch_size).unwrap_or_default();
            (0, (patches, patches))
        }
        _ => {
            let told = settings::told(plan, Some(embed_dim))?.image_size;
            let grid = told.and_then(|(height, width)| {
                Some((height.checked_div(patch_size)?, width.checked_div(patch_size)?))
            });
            positions(plan, class_token, num_registers, grid)?
        }
    };
    Ok(Sizes {
        kind,
        pos_embed: has_table,
        embed_dim,
        patch_size,
        mlp_dim,
        fc1_rows,
        class_token,
        num_registers,
        pos_embed_prefix,
        grid,
    })
}

/// Returns the number of prefix rows in the file's position table and the grid of the other rows.
/// `told` is the grid that a file beside the checkpoint tells.
fn positions(
    plan: &Plan,
    class_token: bool,
    num_registers: i64,
    told: Option<(i64, i64)>,
) -> Result<(i64, (i64, i64))> {
    let rows = plan.shape("pos_embed", 3)?[1];
    let usual = usual_prefix(plan, class_token);
    let possible = prefixes(class_token, num_registers);
    let (usual, others) = match plan.family.positions {
        PositionNames::AllPrefix => (usual.saturating_add(num_registers), &[][..]),
        PositionNames::None | PositionNames::Class => (usual, &[][..]),
        PositionNames::UsuallyNoneBeside(_) => (usual, &possible[..]),
    };
    Ok(split_positions(rows, usual, others, told))
}

/// Reads the position table `[1, prefix + N, C]`. The table of another square grid is resized.
fn read_positions(plan: &Plan, shape: &[i64], config: &ViTConfig) -> Result<Tensor> {
    let (name, prefix) = ("pos_embed", config.pos_embed_prefix);
    let found = plan.shape(name, shape.len())?;
    let side = found[1].checked_sub(prefix).and_then(square_root);
    match side {
        // A table with the same number of patches is used unchanged, whatever the shape of its
        // grid.
        Some(side) if found[1] != shape[1] => {
            let stored = plan.read(name, &[shape[0], found[1], shape[2]], config.num_heads)?;
            resize_pos_embed(&stored, prefix, (side, side), config.grid(), table_filter(plan)?)
        }
        _ => plan.read(name, shape, config.num_heads),
    }
}

/// Returns the filter with which the library of the file's names resizes its position table. The
/// only class of Hugging Face that antialiases is DINOv2 with registers. timm has other filters for
/// some architectures.
fn table_filter(plan: &Plan) -> Result<TableFilter> {
    if plan.family.name.starts_with("Hugging Face") {
        let antialiases = plan.has("reg_token");
        return Ok(if antialiases { TableFilter::Antialiased } else { TableFilter::Plain });
    }
    let architecture = plan.config()?.and_then(|file| file.json["architecture"].as_str());
    let is_one_of = |parts: &[&str]| {
        architecture.is_some_and(|name| parts.iter().any(|part| name.contains(part)))
    };
    Ok(if is_one_of(&["flexivit_", "_radio_"]) {
        let align_corners = is_one_of(&["base_patch16_radio_v3", "huge_patch16_radio_v3"]);
        TableFilter::Bilinear { align_corners }
    } else {
        TableFilter::Antialiased
    })
}

/// Returns the usual number of prefix rows in position tables of this family.
fn usual_prefix(plan: &Plan, class_token: bool) -> i64 {
    match plan.family.positions {
        PositionNames::UsuallyNoneBeside(name) if plan.file.contains(name) => 0,
        _ => i64::from(class_token),
    }
}

/// Returns the number of prefix rows and the grid of the other rows. The number is the first of
/// `usual` and `others` that leaves as many rows as the grid `told` has, else the first that leaves a
/// square grid. If none does, the number is `usual` and the grid has one row.
fn split_positions(
    rows: i64,
    usual: i64,
    others: &[i64],
    told: Option<(i64, i64)>,
) -> (i64, (i64, i64)) {
    let leaves_told = |(height, width): (i64, i64)| {
        let prefix = rows.checked_sub(height.checked_mul(width)?)?;
        (prefix == usual || others.contains(&prefix)).then_some((prefix, (height, width)))
    };
    if let Some(split) = told.and_then(leaves_told) {
        return split;
    }
    let square = |&prefix: &i64| Some((prefix, square_root(rows.checked_sub(prefix)?)?));
    match [usual].iter().chain(others).find_map(square) {
        Some((prefix, side)) => (prefix, (side, side)),
        None => (usual, (1, rows.saturating_sub(usual))),
    }
}

/// Returns the numbers of prefix rows that are possible: none, the class token, and the class token
/// with the registers.
fn prefixes(class_token: bool, num_registers: i64) -> [i64; 3] {
    let class = i64::from(class_token);
    [0, class, class.saturating_add(num_registers)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_table_is_split_where_a_square_is_left() {
        for (positions, usual, class_token, registers, expected) in [
            (197, 1, true, 0, (1, (14, 14))),
            (196, 1, true, 0, (0, (14, 14))),
            (1369, 0, true, 4, (0, (37, 37))),
            (1370, 1, true, 4, (1, (37, 37))),
            (21, 0, true, 4, (5, (4, 4))),
            (16, 1, true, 0, (0, (4, 4))),
            (15, 0, false, 0, (0, (1, 15))),
            (2, 1, true, 0, (1, (1, 1))),
            (0, 1, true, 0, (1, (1, -1))),
        ] {
            let others = prefixes(class_token, registers);
            let found = split_positions(positions, usual, &others, None);
            assert_eq!(found, expected, "{positions}");
            // A grid that does not fit changes nothing.
            assert_eq!(split_positions(positions, usual, &others, Some((7, 9))), expected);
        }
        let told = |grid| split_positions(16, 1, &prefixes(true, 0), Some(grid));
        assert_eq!([told((3, 5)), told((2, 8))], [(1, (3, 5)), (0, (2, 8))]);
    }
}
