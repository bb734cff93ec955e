//! A thread pool that computes results in advance and returns them in order.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use crate::error::{Error, Result};

/// A queue of results that threads compute, in the order of the calls of [`Ahead::order`].
///
/// It holds only results that were ordered and not taken yet. When it is dropped, each thread
/// finishes its current piece of work and ends.
#[derive(Debug)]
pub(super) struct Ahead<T> {
    /// `None` after the threads were stopped.
    orders: Option<Sender<(usize, Sender<T>)>>,
    ordered: VecDeque<Receiver<T>>,
    workers: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl<T: Send + 'static> Ahead<T> {
    /// Starts `threads` threads. `work` computes the result of an ordered number.
    ///
    /// # Errors
    /// [`Error::Io`] if the system cannot start a thread.
    pub(super) fn new(
        threads: NonZeroUsize,
        work: impl Fn(usize) -> T + Send + Sync + 'static,
    ) -> Result<Self> {
        let (orders, queue) = channel::<(usize, Sender<T>)>();
        let (queue, work) = (Arc::new(Mutex::new(queue)), Arc::new(work));
        let stop = Arc::new(AtomicBool::new(false));
        let mut ahead =
            Self { orders: Some(orders), ordered: VecDeque::new(), workers: Vec::new(), stop };
        for _ in 0..threads.get() {
            let (queue, work, stop) = (queue.clone(), work.clone(), ahead.stop.clone());
            let next = move || queue.lock().unwrap_or_else(PoisonError::into_inner).recv().ok();
            let worker = move || {
                while let Some((number, place)) = next() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    // Sending fails if the queue was dropped; nobody waits for the result then.
                    let _nobody = place.send(work(number));
                }
            };
            let spawned = Builder::new().name("decode".into()).spawn(worker);
            ahead.workers.push(spawned.map_err(Error::io("a decoding thread"))?);
        }
        Ok(ahead)
    }

    /// Orders the result of a number.
    pub(super) fn order(&mut self, number: usize) {
        let (place, result) = channel();
        if let Some(orders) = &self.orders {
            // Sending fails if no thread is left. `take` then reports why.
            let _gone = orders.send((number, place));
        }
        self.ordered.push_back(result);
    }

    /// Returns the number of results that were ordered and not taken.
    pub(super) fn len(&self) -> usize {
        self.ordered.len()
    }

    /// Waits for the result that was ordered first and returns it. Returns `None` if no result is
    /// ordered.
    ///
    /// # Panics
    /// If `work` panicked, the panic continues here.
    pub(super) fn take(&mut self) -> Option<T> {
        let result = self.ordered.pop_front()?.recv().ok();
        if result.is_none() {
            self.stop();
            self.workers.drain(..).for_each(|worker| {
                worker.join().unwrap_or_else(|panic| resume_unwind(panic));
            });
        }
        result
    }
}

impl<T> Ahead<T> {
    fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.orders = None;
        self.ordered.clear();
    }
}

impl<T> Drop for Ahead<T> {
    fn drop(&mut self) {
        self.stop();
        for worker in self.workers.drain(..) {
            // A panic was either reported by `take` or belongs to a result that nobody took.
            let _panic = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::thread::sleep;
    use std::time::Duration;

    use super::*;

    fn threads(count: usize) -> NonZeroUsize {
        NonZeroUsize::new(count).unwrap()
    }

    #[test]
    fn results_come_in_order_on_any_number_of_threads() {
        for count in [1, 2, 7] {
            let mut ahead = Ahead::new(threads(count), |number| {
                // The first results take longest.
                sleep(Duration::from_millis(10 - number.min(10) as u64));
                number * number
            })
            .unwrap();
            (0..20).for_each(|number| ahead.order(number));
            assert_eq!(ahead.len(), 20);
            for number in 0..20 {
                assert_eq!(ahead.take(), Some(number * number));
            }
            assert_eq!((ahead.take(), ahead.len()), (None, 0));
        }
    }

    #[test]
    fn dropping_it_leaves_the_rest_undone_and_no_thread() {
        let (done, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(())));
        let held = gate.lock().unwrap();
        let count = done.clone();
        let mut ahead = Ahead::new(threads(2), {
            let gate = gate.clone();
            move |_| {
                drop(gate.lock().unwrap());
                count.fetch_add(1, Ordering::SeqCst);
            }
        })
        .unwrap();
        (0..1000).for_each(|number| ahead.order(number));
        let stop = ahead.stop.clone();
        let dropped = std::thread::spawn(move || drop(ahead));
        while !stop.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        drop(held);
        dropped.join().unwrap();
        assert!(done.load(Ordering::SeqCst) <= 2);
        // The workers held the only other clones, so they have ended.
        assert_eq!((Arc::strong_count(&done), Arc::strong_count(&gate)), (1, 1));
    }

    #[test]
    fn a_panic_of_the_work_is_the_takers() {
        let mut ahead = Ahead::new(threads(1), |number| assert_ne!(number, 1)).unwrap();
        (0..3).for_each(|number| ahead.order(number));
        assert_eq!(ahead.take(), Some(()));
        let taken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| ahead.take()));
        assert!(taken.is_err());
        assert_eq!(ahead.take(), None);
    }
}
