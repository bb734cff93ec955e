//! The memory that all decoding threads of the process share.

use std::sync::{Condvar, Mutex, PoisonError};

/// The bytes that images may take while they are decoded and resized, in all threads together. The
/// largest image alone takes half of them.
pub(super) const TOTAL: u64 = 1 << 30;

/// The bytes of the process that are not reserved.
static SHARED: Budget = Budget::new(TOTAL);

#[derive(Debug)]
struct Budget {
    total: u64,
    free: Mutex<u64>,
    freed: Condvar,
}

/// A part of the budget. It is given back when the value is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    budget: &'static Budget,
    bytes: u64,
}

/// Waits until `bytes` of the shared budget are free, and reserves them. More than the budget is
/// reserved as the whole budget, so that such an image is decoded while no other one is.
///
/// A thread holds at most one reservation; two could wait for each other for ever.
pub(super) fn reserve(bytes: u64) -> Reservation {
    SHARED.reserve(bytes)
}

impl Budget {
    const fn new(total: u64) -> Self {
        Self { total, free: Mutex::new(total), freed: Condvar::new() }
    }

    fn reserve(&'static self, bytes: u64) -> Reservation {
        let bytes = bytes.min(self.total);
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let too_few = |free: &mut u64| *free < bytes;
        let mut free = self.freed.wait_while(free, too_few).unwrap_or_else(PoisonError::into_inner);
        *free -= bytes;
        Reservation { budget: self, bytes }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        *self.budget.free.lock().unwrap_or_else(PoisonError::into_inner) += self.bytes;
        self.budget.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn threads_never_hold_more_than_the_budget() {
        static OWN: Budget = Budget::new(10);
        static HELD: AtomicU64 = AtomicU64::new(0);
        thread::scope(|scope| {
            for thread in 0..8 {
                scope.spawn(move || {
                    for round in 0..50 {
                        let bytes = [3, 7, 10, 400][(thread + round) % 4];
                        let reservation = OWN.reserve(bytes);
                        let held = HELD.fetch_add(reservation.bytes, Ordering::SeqCst);
                        assert!(held + reservation.bytes <= 10);
                        HELD.fetch_sub(reservation.bytes, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(*OWN.free.lock().unwrap(), 10);
    }
}
