//! What a load did with each tensor of a file.

use std::fmt;

/// Accounts for every tensor of a file that was loaded; nothing is ignored without a reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Names, as in the file, of the tensors that the model took.
    pub applied: Vec<String>,
    /// Names, as in the file, of those it has no use for, each with the reason.
    pub skipped: Vec<(String, String)>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors applied, {} skipped", self.applied.len(), self.skipped.len())?;
        self.skipped.iter().try_for_each(|(name, reason)| write!(f, "\n  {name}: {reason}"))
    }
}
