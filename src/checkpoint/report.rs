//! The report of a load.

use std::fmt;

/// What a load did with each tensor of a file. A tensor that was not used is listed with a reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Names in the file of the tensors that the model took.
    pub applied: Vec<String>,
    /// Names in the file of the tensors that the model does not use, each with the reason.
    pub skipped: Vec<(String, String)>,
    /// The keys that lead to the state dict in a training checkpoint, such as `model`. It is empty
    /// if the names are those of the outermost dict.
    pub keys: Vec<String>,
    /// What was taken off all names before they were looked up, outermost first, such as
    /// `module.`.
    pub taken_off: Vec<String>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors applied, {} skipped", self.applied.len(), self.skipped.len())?;
        if !self.keys.is_empty() {
            write!(f, "\n  the weights are under the key {}", self.keys.join("."))?;
        }
        if !self.taken_off.is_empty() {
            write!(f, "\n  taken off the names: {}", self.taken_off.join(", "))?;
        }
        self.skipped.iter().try_for_each(|(name, reason)| write!(f, "\n  {name}: {reason}"))
    }
}
