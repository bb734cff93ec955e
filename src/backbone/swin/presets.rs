//! Named configs with timm's names. The tag after a dot in a name of timm selects weights, not a
//! shape.

use super::{ContinuousBiasConfig, SwinConfig};
use crate::error::{Error, Result};
use crate::nn::NormPlacement;

/// Name, image side, window side, C of the first stage, depth of the third, heads of the first.
type Row = (&'static str, i64, i64, i64, i64, i64);

#[rustfmt::skip]
const SWIN: &[Row] = &[
    ("swin_tiny_patch4_window7_224",   224,  7,  96,  6, 3),
    ("swin_small_patch4_window7_224",  224,  7,  96, 18, 3),
    ("swin_base_patch4_window7_224",   224,  7, 128, 18, 4),
    ("swin_base_patch4_window12_384",  384, 12, 128, 18, 4),
    ("swin_large_patch4_window7_224",  224,  7, 192, 18, 6),
    ("swin_large_patch4_window12_384", 384, 12, 192, 18, 6),
];

fn swin((_, image, window, embed_dim, depth, heads): Row) -> SwinConfig {
    SwinConfig {
        image_size: (image, image),
        embed_dim,
        depths: vec![2, 2, depth, 2],
        num_heads: vec![heads, 2 * heads, 4 * heads, 8 * heads],
        window_sizes: vec![(window, window); 4],
        ..SwinConfig::default()
    }
}

/// A row of [`SWIN`], and the sides of the windows of the pretraining; zero stands for the window
/// itself.
type RowV2 = (Row, [i64; 4]);

#[rustfmt::skip]
const SWIN_V2: &[RowV2] = &[
    (("swinv2_tiny_window8_256",              256,  8,  96,  6, 3), [0; 4]),
    (("swinv2_tiny_window16_256",             256, 16,  96,  6, 3), [0; 4]),
    (("swinv2_small_window8_256",             256,  8,  96, 18, 3), [0; 4]),
    (("swinv2_small_window16_256",            256, 16,  96, 18, 3), [0; 4]),
    (("swinv2_base_window8_256",              256,  8, 128, 18, 4), [0; 4]),
    (("swinv2_base_window16_256",             256, 16, 128, 18, 4), [0; 4]),
    (("swinv2_base_window12_192",             192, 12, 128, 18, 4), [0; 4]),
    (("swinv2_base_window12to16_192to256",    256, 16, 128, 18, 4), [12, 12, 12, 6]),
    (("swinv2_base_window12to24_192to384",    384, 24, 128, 18, 4), [12, 12, 12, 6]),
    (("swinv2_large_window12_192",            192, 12, 192, 18, 6), [0; 4]),
    (("swinv2_large_window12to16_192to256",   256, 16, 192, 18, 6), [12, 12, 12, 6]),
    (("swinv2_large_window12to24_192to384",   384, 24, 192, 18, 6), [12, 12, 12, 6]),
];

fn swin_v2((row, pretrained): RowV2) -> SwinConfig {
    SwinConfig {
        norm_placement: NormPlacement::After,
        cosine_attention: true,
        continuous_bias: Some(ContinuousBiasConfig {
            hidden_dim: ContinuousBiasConfig::HIDDEN_DIM,
            pretrained_window_sizes: pretrained.iter().map(|&side| (side, side)).collect(),
        }),
        ..swin(row)
    }
}

impl SwinConfig {
    /// Returns a named config: Swin T, S, B or L, or Swin V2 T, S, B or L. [`SwinConfig::presets`]
    /// lists the names.
    ///
    /// # Errors
    /// [`Error::Config`] with all names if the name is unknown.
    pub fn preset(name: &str) -> Result<Self> {
        let first = SWIN.iter().find(|row| row.0 == name).map(|&row| swin(row));
        let second = || SWIN_V2.iter().find(|row| row.0.0 == name).map(|&row| swin_v2(row));
        first.or_else(second).ok_or_else(|| {
            let names = Self::presets().collect::<Vec<_>>().join(", ");
            Error::config("preset", format!("one of {names}"), name)
        })
    }

    /// Returns the names that [`SwinConfig::preset`] accepts.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        SWIN.iter().chain(SWIN_V2.iter().map(|(row, _)| row)).map(|row| row.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbone::BackboneConfig;

    #[test]
    fn every_preset_is_valid_and_unknown_names_are_told() {
        for name in SwinConfig::presets() {
            SwinConfig::preset(name).unwrap().validate().unwrap();
        }
        let error = SwinConfig::preset("swin").unwrap_err().to_string();
        assert!(error.contains("swin_base_patch4_window12_384"), "{error}");
    }

    /// The expected numbers are the parameters of timm's models without their heads.
    #[test]
    fn weights_are_counted_as_timm_counts_them() {
        for (name, count) in [
            ("swin_tiny_patch4_window7_224", 27_519_354),
            ("swin_small_patch4_window7_224", 48_837_258),
            ("swin_base_patch4_window7_224", 86_743_224),
            ("swin_large_patch4_window12_384", 195_198_516),
            // timm has no weights for the biases of keys, which are zero.
            ("swinv2_tiny_window8_256", 27_578_154 + 4_416),
            ("swinv2_base_window12to16_192to256", 86_893_816 + 12_032),
            ("swinv2_large_window12to24_192to384", 195_202_932 + 18_048),
        ] {
            assert_eq!(
                SwinConfig::preset(name).unwrap().shape().unwrap().num_params,
                count,
                "{name}"
            );
        }
    }
}
