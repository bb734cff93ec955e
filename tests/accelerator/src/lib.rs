//! A second device for tests on a machine that has none.
//!
//! Its tensors do not mix with those of the CPU, as those of a GPU do not, and its operators are
//! counted. It computes on the CPU, so results can be compared bit for bit with the same operators
//! there. libtorch knows it as [`Device::Mps`].

#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use tch::Device;
// Links libtorch.
use torch_sys as _;

/// What the device was asked to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// The operators by name, each a launch on a GPU. Views and allocations are not counted.
    pub operators: BTreeMap<String, i64>,
    /// Calls that would make the CPU wait for a GPU, by name.
    pub waits: BTreeMap<String, i64>,
    /// Copies from the CPU to the device.
    pub sent: i64,
}

impl Counts {
    /// Returns the number of launches.
    pub fn launches(&self) -> i64 {
        self.operators.values().sum()
    }

    /// Returns the number of waits.
    pub fn waits(&self) -> i64 {
        self.waits.values().sum()
    }

    /// Returns the counts of `self` without those of `other`.
    pub fn without(&self, other: &Counts) -> Counts {
        let less = |of: &BTreeMap<String, i64>, other: &BTreeMap<String, i64>| {
            let mut rest = of.clone();
            for (name, count) in other {
                *rest.entry(name.clone()).or_default() -= count;
            }
            rest.retain(|_, count| *count != 0);
            rest
        };
        Counts {
            operators: less(&self.operators, &other.operators),
            waits: less(&self.waits, &other.waits),
            sent: self.sent - other.sent,
        }
    }

    /// Returns the counts of each of `times` equal parts.
    ///
    /// # Panics
    /// Panics if the parts are not equal.
    pub fn divided(&self, times: i64) -> Counts {
        let part = |count: i64| {
            assert_eq!(count % times, 0, "{self:?} is not {times} times the same");
            count / times
        };
        let parts = |of: &BTreeMap<String, i64>| {
            of.iter().map(|(name, count)| (name.clone(), part(*count))).collect()
        };
        Counts {
            operators: parts(&self.operators),
            waits: parts(&self.waits),
            sent: part(self.sent),
        }
    }
}

/// The device, held by one thread at a time, because counts are those of the whole process.
#[derive(Debug)]
pub struct Accelerator {
    _alone: MutexGuard<'static, ()>,
}

impl Accelerator {
    /// Makes the device, or waits for it.
    pub fn hold() -> Self {
        static INSTALL: Once = Once::new();
        static ALONE: Mutex<()> = Mutex::new(());
        // SAFETY: the call registers the device and touches nothing of this side.
        INSTALL.call_once(|| unsafe { accelerator_install() });
        Accelerator { _alone: ALONE.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Returns the name that libtorch has for the device.
    pub fn device(&self) -> Device {
        Device::Mps
    }

    /// Runs `call` and returns its result, and what the device was asked to do for it.
    pub fn count<T>(&self, call: impl FnOnce() -> T) -> (T, Counts) {
        // SAFETY: the call touches nothing of this side.
        unsafe { accelerator_reset() }
        let result = call();
        let mut counts = Counts::default();
        // SAFETY: `add` gets back the state that is passed here, and names that live through it.
        unsafe { accelerator_counts(add, (&raw mut counts).cast()) }
        (result, counts)
    }
}

unsafe extern "C" fn add(state: *mut c_void, kind: c_int, name: *const c_char, count: i64) {
    // SAFETY: `count` passes its own `Counts` and waits; `name` is a C string.
    let (counts, name) = unsafe { (&mut *state.cast::<Counts>(), CStr::from_ptr(name)) };
    let name = name.to_string_lossy().into_owned();
    match kind {
        0 => drop(counts.operators.insert(name, count)),
        1 => drop(counts.waits.insert(name, count)),
        _ => counts.sent = count,
    }
}

unsafe extern "C" {
    fn accelerator_install();
    fn accelerator_reset();
    fn accelerator_counts(
        each: unsafe extern "C" fn(*mut c_void, c_int, *const c_char, i64),
        state: *mut c_void,
    );
}
