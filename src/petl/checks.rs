//! Checks that several configs share.

use crate::error::{Error, Result};

pub(super) fn scale(scale: f64) -> Result<()> {
    if scale.is_finite() { Ok(()) } else { Err(Error::config("scale", "finite", scale)) }
}

pub(super) fn dropout(rate: f64) -> Result<()> {
    if (0.0..1.0).contains(&rate) {
        Ok(())
    } else {
        Err(Error::config("dropout", "within 0..1", rate))
    }
}
