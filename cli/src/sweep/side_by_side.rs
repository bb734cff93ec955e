//! Runs jobs at the same time, each in its own process.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, anyhow};

use crate::stop::Stop;

/// Calls `run` for each job on `workers` threads, and returns the results by index of the job.
///
/// Each call starts a process and waits for it. For a backbone like the bundled ViT this is faster
/// than one run on all cores. Results are repeatable, because libtorch has one random generator for
/// each process. `run` returns `None` if Ctrl-C, which also reaches the process, ended the job.
///
/// # Errors
/// The first error of `run`, which ends all threads.
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
                // Without Ctrl-C the user did not ask for the end, so this is an error.
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
