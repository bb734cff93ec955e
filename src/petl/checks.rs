//! Checks that several configs share.

use crate::error::{Error, Result};

pub(super) fn scale(scale: f64) -> Result<()> {
    match scale.is_finite() {
        true => Ok(()),
        false => Err(Error::config("scale", "finite", scale)),
    }
}

pub(super) fn dropout(rate: f64) -> Result<()> {
    match (0.0..1.0).contains(&rate) {
        true => Ok(()),
        false => Err(Error::config("dropout", "within 0..1", rate)),
    }
}
