//! [`Description`]: what a backbone is, for messages and adapter files.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Precision, Preprocessing};

/// A description of a backbone with which a person can find it again. Its digest is stored
/// separately.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Description {
    /// The name of the family.
    pub family: String,
    /// File name of the checkpoint, without its folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Number of weights.
    pub num_params: usize,
    /// Height and width of the images, if the backbone accepts only one size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<(i64, i64)>,
    /// The precision of the weights, if it is a variant of [`Precision`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<Precision>,
    /// The preprocessing of the images, if it is known.
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
