//! The report of a load.

use std::fmt;

/// What a load did with each tensor of a file. A tensor that was not used is listed with a reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Names in the file of the tensors that the model took.
    pub applied: Vec<String>,
    /// Names in the file of the tensors that the model does not use, each with the reason.
    pub skipped: Vec<(String, String)>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors applied, {} skipped", self.applied.len(), self.skipped.len())?;
        self.skipped.iter().try_for_each(|(name, reason)| write!(f, "\n  {name}: {reason}"))
    }
}
