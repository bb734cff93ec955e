//! Passes whose operators are recorded once and replayed without the code between them.

use std::cell::Cell;
use std::marker::PhantomData;

use crate::error::{Error, Result};

thread_local! {
    static IS_RECORDED: Cell<bool> = const { Cell::new(false) };
}

/// A guard that marks the passes of this thread as recorded until it is dropped.
///
/// A replay repeats the operators of a pass, and none of the decisions that the CPU took for them.
/// Code that would compute something else in another pass asks [`Recording::is_active`], and either
/// does the same in every pass or returns an error.
#[must_use = "the recording ends as the guard is dropped"]
#[derive(Debug)]
pub(crate) struct Recording {
    before: bool,
    /// Makes the guard `!Send`, because each thread has a state of its own.
    _thread: PhantomData<*const ()>,
}

impl Recording {
    #[cfg_attr(not(feature = "train"), allow(dead_code, reason = "training alone records passes"))]
    pub(crate) fn enter() -> Self {
        Recording { before: IS_RECORDED.replace(true), _thread: PhantomData }
    }

    /// Returns whether this thread runs a recorded pass.
    pub(crate) fn is_active() -> bool {
        IS_RECORDED.get()
    }

    /// Returns the error for a recorded pass that draws random numbers at the rate `rate`, which the
    /// config has in the field `field`.
    pub(crate) fn refuse_draw(field: &str, rate: f64) -> Result<()> {
        if rate == 0.0 || !Self::is_active() {
            return Ok(());
        }
        Err(Error::config(field, "0 with cuda_graph, whose replays draw nothing", rate))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        IS_RECORDED.set(self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_refused_until_the_outermost_guard_is_dropped() {
        assert!(Recording::refuse_draw("dropout", 0.1).is_ok());
        {
            let _outer = Recording::enter();
            drop(Recording::enter());
            let refused = Recording::refuse_draw("dropout", 0.1).unwrap_err();
            let expected =
                "dropout must be 0 with cuda_graph, whose replays draw nothing, found 0.1";
            assert_eq!(refused.to_string(), expected);
            assert!(Recording::refuse_draw("dropout", 0.0).is_ok());
        }
        assert!(!Recording::is_active());
    }
}
