//! Jobs in processes of their own, several at a time.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, anyhow};

use crate::stop::Stop;

/// Calls `run` for each job, on as many threads as `workers` says, each of which waits for a process: at the size of
/// the bundled ViT that is faster than one run on all cores, and libtorch's generator, which a process shares, repeats.
/// `run` gives `None` where Ctrl-C, which reaches that process too, ended the job. The first error ends all.
pub fn side_by_side<J: Sync, T: Send>(
    workers: usize,
    jobs: &[J],
    stop: &Stop,
    run: impl Fn(&J) -> Result<Option<T>> + Sync,
) -> Result<BTreeMap<usize, T>> {
    let (next, done) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let work = || -> Result<()> {
        while !stop.is_asked() {
            let index = next.fetch_add(1, Ordering::SeqCst);
            let Some(job) = jobs.get(index) else { break };
            let Some(result) = run(job)? else {
                // A signal to that process alone is no wish of the user's.
                let ended = || anyhow!("a run's process was ended by a signal");
                return if stop.is_asked() { Ok(()) } else { Err(ended()) };
            };
            done.lock().expect("no holder panics").insert(index, result);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers.min(jobs.len())).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })?;
    Ok(done.into_inner().expect("no holder panics"))
}
