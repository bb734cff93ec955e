//! Named configs with timm's names.

use super::ConvNeXtConfig;
use crate::error::{Error, Result};

/// Name, C of the first stage, depth of the third.
#[rustfmt::skip]
const CONVNEXT: &[(&str, i64, i64)] = &[
    ("convnext_tiny",   96,  9),
    ("convnext_small",  96, 27),
    ("convnext_base",  128, 27),
    ("convnext_large", 192, 27),
];

impl ConvNeXtConfig {
    /// Returns a named config: ConvNeXt T, S, B or L. [`ConvNeXtConfig::presets`] lists the names.
    ///
    /// # Errors
    /// [`Error::Config`] with all names if the name is unknown.
    pub fn preset(name: &str) -> Result<Self> {
        let Some(&(_, c, depth)) = CONVNEXT.iter().find(|row| row.0 == name) else {
            let names = Self::presets().collect::<Vec<_>>().join(", ");
            return Err(Error::config("preset", format!("one of {names}"), name));
        };
        let dims = vec![c, 2 * c, 4 * c, 8 * c];
        Ok(ConvNeXtConfig { dims, depths: vec![3, 3, depth, 3], ..ConvNeXtConfig::default() })
    }

    /// Returns the names that [`ConvNeXtConfig::preset`] accepts.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        CONVNEXT.iter().map(|row| row.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbone::BackboneConfig;

    /// The expected numbers are the parameters of timm's models without their heads.
    #[test]
    fn weights_are_counted_as_timm_counts_them() {
        let counts = ConvNeXtConfig::presets().map(|name| {
            let config = ConvNeXtConfig::preset(name).unwrap();
            config.validate().unwrap();
            config.shape().unwrap().num_params
        });
        let expected = [27_820_128, 49_454_688, 87_566_464, 196_230_336];
        assert_eq!(counts.collect::<Vec<_>>(), expected);
        assert!(ConvNeXtConfig::preset("convnext").is_err());
    }
}
