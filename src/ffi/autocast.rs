//! libtorch's autocast behind a guard.

use std::cell::RefCell;
use std::ffi::{c_char, c_int};
use std::marker::PhantomData;

use tch::{Device, Kind};

use super::autograd::take;
use crate::error::{Error, Result};

/// A guard that turns autocast on for this thread until it is dropped. Under autocast, libtorch
/// computes matrix products in bf16 or f16 and computes operations that need a wider range in f32.
/// Weights keep their dtype.
///
/// The guard may live through many training steps, because casts of trained weights are not cached.
///
/// Dropping the guard restores the previous state of autocast, also after an early return, an error
/// or a panic. If a guard is dropped before one that was created after it, its state ends with that
/// one.
///
/// ```
/// use convpass::Autocast;
/// use tch::{Device, Kind, Tensor};
///
/// # fn main() -> convpass::Result<()> {
/// let x = Tensor::rand([4, 4], (Kind::Float, Device::Cpu));
/// {
///     let _guard = Autocast::enter(Device::Cpu, Kind::BFloat16)?;
///     assert_eq!(x.matmul(&x).kind(), Kind::BFloat16);
/// }
/// assert_eq!(x.matmul(&x).kind(), Kind::Float);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "autocast ends as the guard is dropped"]
pub struct Autocast {
    number: u64,
    /// Makes the guard `!Send`, because each thread has a state of its own.
    _thread: PhantomData<*const ()>,
}

/// A guard of this thread that is not dropped yet, or not the last one.
#[derive(Debug)]
struct Entered {
    number: u64,
    device: DeviceType,
    /// The state before the guard.
    before: State,
    dropped: bool,
}

thread_local! {
    /// The guards of this thread in the order of their creation.
    static ENTERED: RefCell<Vec<Entered>> = const { RefCell::new(Vec::new()) };
}

/// A type of device with an autocast of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(i32)]
enum DeviceType {
    Cpu = 0,
    Cuda = 1,
    Mps = 2,
}

impl DeviceType {
    fn of(device: Device) -> Option<Self> {
        match device {
            Device::Cpu => Some(DeviceType::Cpu),
            Device::Cuda(_) => Some(DeviceType::Cuda),
            Device::Mps => Some(DeviceType::Mps),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct State {
    enabled: bool,
    /// [`HALF`] or [`BFLOAT16`].
    kind: c_int,
    cache: bool,
}

/// The numbers that libtorch gives these dtypes.
const HALF: c_int = 5;
const BFLOAT16: c_int = 15;

impl Autocast {
    /// Turns autocast to the dtype `kind` on for the type of `device`, which is a CPU, a CUDA GPU or
    /// Metal (MPS).
    ///
    /// # Errors
    /// Returns [`Error::Config`] for a dtype other than bf16 and f16, and for other devices.
    pub fn enter(device: Device, kind: Kind) -> Result<Self> {
        let kind = match kind {
            Kind::BFloat16 => BFLOAT16,
            Kind::Half => HALF,
            _ => return Err(Error::config("kind", "bf16 or f16", format!("{kind:?}"))),
        };
        let Some(device) = DeviceType::of(device) else {
            let expected = "a CPU, a CUDA GPU or Metal";
            return Err(Error::config("device", expected, format!("{device:?}")));
        };
        let before = State::get(device)?;
        // The cache keeps casts of trained weights until the guard is dropped, so after a step of
        // the optimizer they would be stale. It does not keep casts of frozen weights at all.
        State { enabled: true, kind, cache: false }.set(device, 1)?;
        let number = ENTERED.with_borrow_mut(|entered| {
            let number = entered.last().map_or(0, |last| last.number + 1);
            entered.push(Entered { number, device, before, dropped: false });
            number
        });
        Ok(Autocast { number, _thread: PhantomData })
    }

    /// Returns the dtype in which libtorch computes products on this thread and on devices of the
    /// type of `device`, or `None` if autocast is off. A result computed under autocast depends on
    /// this dtype as it depends on a weight.
    pub(crate) fn kind(device: Device) -> Result<Option<Kind>> {
        let Some(device) = DeviceType::of(device) else { return Ok(None) };
        let State { enabled, kind, .. } = State::get(device)?;
        Ok(match kind {
            _ if !enabled => None,
            BFLOAT16 => Some(Kind::BFloat16),
            HALF => Some(Kind::Half),
            other => {
                let found = format!("the dtype {other} of libtorch");
                return Err(Error::config("autocast", "bf16 or f16", found));
            }
        })
    }

    /// Returns the name of [`Autocast::kind`].
    #[cfg_attr(not(feature = "train"), allow(dead_code, reason = "for code that caches results"))]
    pub(crate) fn name(device: Device) -> Result<Option<&'static str>> {
        let kind = Self::kind(device)?;
        Ok(kind.map(|kind| if kind == Kind::Half { "f16" } else { "bf16" }))
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        ENTERED.with_borrow_mut(|entered| {
            let Some(own) = entered.iter_mut().find(|guard| guard.number == self.number) else {
                return;
            };
            own.dropped = true;
            let device = own.device;
            // The state ends with the last guard for this type of device.
            while let Some(last) = entered.iter().rposition(|guard| guard.device == device)
                && entered[last].dropped
            {
                // `set` fails only if memory is short, and `drop` cannot report an error.
                let _ = entered.remove(last).before.set(device, -1);
            }
        });
    }
}

impl State {
    fn get(device: DeviceType) -> Result<Self> {
        let mut state = State { enabled: false, kind: 0, cache: false };
        let State { enabled, kind, cache } = &mut state;
        // SAFETY: the call writes to these three variables only.
        take(unsafe { convpass_autocast_get(device as c_int, enabled, kind, cache) })?;
        Ok(state)
    }

    fn set(self, device: DeviceType, deeper: c_int) -> Result<()> {
        let State { enabled, kind, cache } = self;
        // SAFETY: the call receives plain values only.
        take(unsafe { convpass_autocast_set(device as c_int, enabled, kind, cache, deeper) })
    }
}

unsafe extern "C" {
    fn convpass_autocast_get(
        device: c_int,
        enabled: *mut bool,
        kind: *mut c_int,
        cache: *mut bool,
    ) -> *mut c_char;
    fn convpass_autocast_set(
        device: c_int,
        enabled: bool,
        kind: c_int,
        cache: bool,
        deeper: c_int,
    ) -> *mut c_char;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::catch_unwind;

    #[test]
    fn every_exit_restores_the_state() {
        for device in [Device::Cpu, Device::Cuda(0), Device::Mps] {
            let kind = DeviceType::of(device).unwrap();
            let before = State::get(kind).unwrap();
            assert!(!before.enabled);
            let early = |fail: bool| -> Result<()> {
                let _outer = Autocast::enter(device, Kind::BFloat16)?;
                let outer = State::get(kind)?;
                assert!(outer.enabled && outer.kind == 15);
                assert_eq!(Autocast::kind(device)?, Some(Kind::BFloat16));
                {
                    let _inner = Autocast::enter(device, Kind::Half)?;
                    assert_eq!(State::get(kind)?.kind, 5);
                    assert_eq!(Autocast::name(device)?, Some("f16"));
                    if fail {
                        return Err(Error::config("test", "no failure", "one"));
                    }
                }
                assert_eq!(State::get(kind)?, outer);
                Ok(())
            };
            early(false).unwrap();
            assert_eq!(Autocast::name(device).unwrap(), None);
            assert_eq!(State::get(kind).unwrap(), before);
            early(true).unwrap_err();
            assert_eq!(State::get(kind).unwrap(), before);
            let panicked = catch_unwind(|| {
                let _guard = Autocast::enter(device, Kind::BFloat16).unwrap();
                std::panic::resume_unwind(Box::new(()));
            });
            assert!(panicked.is_err());
            assert_eq!(State::get(kind).unwrap(), before);
        }
        // Out of order.
        let before = State::get(DeviceType::Cpu).unwrap();
        let outer = Autocast::enter(Device::Cpu, Kind::BFloat16).unwrap();
        let inner = Autocast::enter(Device::Cpu, Kind::Half).unwrap();
        drop(outer);
        assert_eq!(State::get(DeviceType::Cpu).unwrap().kind, HALF);
        drop(inner);
        assert_eq!(State::get(DeviceType::Cpu).unwrap(), before);
        assert!(Autocast::enter(Device::Cpu, Kind::Double).is_err());
        assert!(Autocast::enter(Device::Vulkan, Kind::Half).is_err());
    }
}
