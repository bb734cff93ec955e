//! Ends the program on Ctrl-C.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;

/// A flag: whether the user asked the program to end. Clones share it.
#[derive(Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Returns a flag that the first Ctrl-C sets. That Ctrl-C also prints `said`; the second one
    /// quits at once.
    pub fn on_ctrl_c(said: &'static str) -> Result<Self> {
        let stop = Stop::default();
        let (flag, pressed) = (stop.clone(), AtomicBool::new(false));
        ctrlc::set_handler(move || {
            if pressed.swap(true, Ordering::SeqCst) {
                // Without destructors, which would run beside threads that still use libtorch.
                signal_hook::low_level::exit(130);
            }
            flag.ask();
            eprintln!("\n{said}; Ctrl-C again to quit at once");
        })?;
        Ok(stop)
    }

    /// Asks the program to end.
    pub fn ask(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Returns whether the program was asked to end.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Returns the answer of an observer of a training run: `Break` if the program was asked to
    /// end.
    pub fn flow(&self) -> ControlFlow<()> {
        if self.is_asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}
