//! Turns a panic of a dependency into an error.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;
use std::thread::panicking;

thread_local! {
    /// Whether a panic of this thread is contained, so that nothing is to be printed.
    static IS_CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Calls `work` and returns its result, or the message of its panic.
///
/// The panic is not printed, because the caller reports it. What `work` has changed is not used
/// after a panic: callers pass values that they drop.
pub(crate) fn contain<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    silence_contained_panics();
    let before = IS_CONTAINED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    IS_CONTAINED.set(before);
    result.map_err(|payload| message(&*payload))
}

/// Puts a panic hook in front of the present one, once in a process. It says nothing about
/// contained panics and passes on every other.
fn silence_contained_panics() {
    static HOOK: Once = Once::new();
    // A hook cannot be changed while its thread panics.
    if panicking() {
        return;
    }
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            if !IS_CONTAINED.get() {
                before(info);
            }
        }));
    });
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without a message").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_its_message() {
        assert_eq!(contain(|| 1), Ok(1));
        assert_eq!(contain(|| panic!("no {}", "good")), Err::<(), _>("no good".into()));
        assert_eq!(contain(|| panic!("plain")), Err::<(), _>("plain".into()));
        assert!(contain(|| std::panic::panic_any(3)).is_err());
        assert_eq!(contain(|| contain(|| panic!("inner"))), Ok(Err::<(), _>("inner".into())));
        assert!(!IS_CONTAINED.get());
    }
}
