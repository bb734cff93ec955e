//! `convpass sweep --status`: how far a plan is.

use std::fmt;

/// The runs of a plan by their state.
#[derive(Default)]
pub(super) struct Status {
    pub(super) done: usize,
    /// Runs whose numbers became NaN or infinite.
    pub(super) diverged: Vec<String>,
    /// Runs that a process makes now, with that process.
    pub(super) claimed: Vec<(String, String)>,
    /// Runs whose folder holds something else, with the reason.
    pub(super) refused: Vec<(String, String)>,
    /// All runs of the plan.
    pub(super) planned: usize,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (run, holder) in &self.claimed {
            writeln!(f, "{run}: made by {holder}")?;
        }
        for run in &self.diverged {
            writeln!(f, "{run}: diverged")?;
        }
        for (run, reason) in &self.refused {
            writeln!(f, "{run}: {reason}")?;
        }
        let (done, claimed, diverged) = (self.done, self.claimed.len(), self.diverged.len());
        let seen = done + claimed + diverged + self.refused.len();
        let open = self.planned.saturating_sub(seen);
        write!(
            f,
            "of {} runs {done} are done, {claimed} are made now, {open} are open",
            self.planned
        )?;
        match (diverged, self.refused.len()) {
            (0, 0) => Ok(()),
            (diverged, refused) => write!(f, ", {diverged} diverged, {refused} cannot be used"),
        }
    }
}
