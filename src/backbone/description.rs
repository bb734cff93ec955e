//! What a backbone is called, for people and for adapter files.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Precision, Preprocessing};

/// What a backbone is called, beside its digest: enough for a person to find it again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Description {
    /// The name of the family.
    pub family: String,
    /// The name of the checkpoint's file, without its folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Number of weights.
    pub num_params: usize,
    /// Height and width of the images, if the backbone accepts one size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<(i64, i64)>,
    /// The precision of the weights, if it is one of the named ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<Precision>,
    /// How images are prepared, if the backbone knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preprocessing: Option<Preprocessing>,
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.family)?;
        if let Some(file) = &self.file {
            write!(f, " {file}")?;
        }
        write!(f, ", {} weights", self.num_params)?;
        if let Some((height, width)) = self.image_size {
            write!(f, ", images of {height}x{width}")?;
        }
        if let Some(precision) = self.precision {
            write!(f, ", {precision}")?;
        }
        Ok(())
    }
}
