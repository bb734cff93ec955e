//! Named configs with timm's names.

use super::ConvNeXtConfig;
use crate::error::{Error, Result};

/// Name, C of the first stage, depth of the third.
type Row = (&'static str, i64, i64);

#[rustfmt::skip]
const CONVNEXT: &[Row] = &[
    ("convnext_tiny",   96,  9),
    ("convnext_small",  96, 27),
    ("convnext_base",  128, 27),
    ("convnext_large", 192, 27),
];

#[rustfmt::skip]
const CONVNEXT_V2: &[Row] = &[
    ("convnextv2_atto",   40,  6),
    ("convnextv2_femto",  48,  6),
    ("convnextv2_pico",   64,  6),
    ("convnextv2_nano",   80,  8),
    ("convnextv2_tiny",   96,  9),
    ("convnextv2_small",  96, 27),
    ("convnextv2_base",  128, 27),
    ("convnextv2_large", 192, 27),
    ("convnextv2_huge",  352, 27),
];

fn convnext((_, c, depth): Row) -> ConvNeXtConfig {
    // The small models have two blocks in the other stages.
    let others = if depth < 9 { 2 } else { 3 };
    ConvNeXtConfig {
        dims: vec![c, 2 * c, 4 * c, 8 * c],
        depths: vec![others, others, depth, others],
        ..ConvNeXtConfig::default()
    }
}

fn convnext_v2(row: Row) -> ConvNeXtConfig {
    ConvNeXtConfig { response_norm: true, layer_scale: false, ..convnext(row) }
}

impl ConvNeXtConfig {
    /// Returns a named config: ConvNeXt T, S, B or L, or a ConvNeXt V2 from atto to huge. [`ConvNeXtConfig::presets`] lists the names.
    ///
    /// # Errors
    /// [`Error::Config`] with all names if the name is unknown.
    pub fn preset(name: &str) -> Result<Self> {
        let find = |rows: &[Row]| rows.iter().find(|row| row.0 == name).copied();
        let second = || find(CONVNEXT_V2).map(convnext_v2);
        find(CONVNEXT).map(convnext).or_else(second).ok_or_else(|| {
            let names = Self::presets().collect::<Vec<_>>().join(", ");
            Error::config("preset", format!("one of {names}"), name)
        })
    }

    /// Returns the names that [`ConvNeXtConfig::preset`] accepts.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        CONVNEXT.iter().chain(CONVNEXT_V2).map(|row| row.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbone::{BackboneConfig, ConvNeXtNorm, ConvNeXtStem};

    /// The expected numbers are the parameters of timm's models without their heads.
    #[test]
    fn weights_are_counted_as_timm_counts_them() {
        let counts = ConvNeXtConfig::presets().map(|name| {
            let config = ConvNeXtConfig::preset(name).unwrap();
            config.validate().unwrap();
            config.shape().unwrap().num_params
        });
        let expected = [27_820_128, 49_454_688, 87_566_464, 196_230_336];
        assert_eq!(counts.take(expected.len()).collect::<Vec<_>>(), expected);
        assert!(ConvNeXtConfig::preset("convnext").is_err());
    }

    /// The same for `convnextv2_tiny`, `convnext_atto_ols`, `convnext_zepto_rms_ols`,
    /// `convnext_large_mlp` and `convnext_tiny_hnf`.
    #[test]
    fn weights_of_other_stems_norms_and_heads_are_counted() {
        let preset = |name| ConvNeXtConfig::preset(name).unwrap();
        let stem = |hidden_dim, activation| ConvNeXtStem::Overlapping { hidden_dim, activation };
        let atto = ConvNeXtConfig { stem: stem(24, false), ..convnext(("", 40, 6)) };
        let zepto = ConvNeXtConfig {
            stem: stem(32, true),
            norm: ConvNeXtNorm::Deviation,
            ..convnext(("", 32, 4))
        };
        for (config, count) in [
            (preset("convnextv2_tiny"), 27_866_496),
            (atto, 3_381_912),
            (zepto, 1_907_232),
            (ConvNeXtConfig { head_dim: Some(1536), ..preset("convnext_large") }, 198_591_168),
            (ConvNeXtConfig { norm_before_pooling: true, ..preset("convnext_tiny") }, 27_820_128),
        ] {
            assert_eq!(config.shape().unwrap().num_params, count, "{config:?}");
        }
    }
}
