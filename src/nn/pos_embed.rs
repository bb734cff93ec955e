//! Resampling of position embedding tables.

use tch::{Kind, Tensor};

use crate::error::Result;

/// The filter with which a position table is resampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableFilter {
    /// Bicubic with antialiasing, as timm's `resample_abs_pos_embed`.
    Antialiased,
    /// Bicubic without antialiasing, as most `interpolate_pos_encoding` of Hugging Face.
    Plain,
    /// Bilinear without antialiasing, as timm for FlexiViT and C-RADIO.
    Bilinear {
        /// Whether the outermost positions keep their places.
        align_corners: bool,
    },
}

/// Resamples a position embedding table `[1, prefix + rows * cols, C]` from the patch grid `from`
/// to the patch grid `to` with `filter`, computed in f32. The rows of the prefix tokens stay as
/// they are.
pub(crate) fn resize_pos_embed(
    table: &Tensor,
    prefix: i64,
    from: (i64, i64),
    to: (i64, i64),
    filter: TableFilter,
) -> Result<Tensor> {
    let (kind, channels) = (table.kind(), table.size()[2]);
    // [1, N, C] -> [1, C, rows, cols]
    let grid = table.f_narrow(1, prefix, from.0 * from.1)?.f_to_kind(Kind::Float)?;
    let grid = grid.f_reshape([1, from.0, from.1, channels])?.f_permute([0, 3, 1, 2])?;
    let align_corners = false;
    let (size, scale) = ([to.0, to.1], None::<f64>);
    let grid = match filter {
        TableFilter::Antialiased => {
            grid.f_internal_upsample_bicubic2d_aa(size, align_corners, scale, scale)?
        }
        TableFilter::Plain => grid.f_upsample_bicubic2d(size, align_corners, scale, scale)?,
        TableFilter::Bilinear { align_corners } => {
            grid.f_upsample_bilinear2d(size, align_corners, scale, scale)?
        }
    };
    let grid = grid.f_permute([0, 2, 3, 1])?.f_reshape([1, to.0 * to.1, channels])?;
    Ok(Tensor::f_cat(&[table.f_narrow(1, 0, prefix)?, grid.f_to_kind(kind)?], 1)?)
}
