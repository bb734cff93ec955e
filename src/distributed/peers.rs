//! What a process tells the others through the store, and finds out about them there.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle, sleep};
use std::time::{Duration, Instant};

use super::launch::Launch;
use crate::error::{Error, Result};
use crate::ffi::c10d::{Group, Store, Transport};

/// The rank that ended an operation of others, and how.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Failure {
    /// `None` if no rank could be found out.
    pub(super) rank: Option<usize>,
    pub(super) reason: String,
}

/// The groups that this process has joined.
static GROUPS: AtomicUsize = AtomicUsize::new(0);

/// The keys of a rank: `here` from its start, `beat` several times in a second, `at` before each
/// operation, `left` at its end.
fn key(name: &str, rank: usize) -> String {
    format!("{name}/{rank}")
}

/// The view of one process on the others.
#[derive(Debug)]
pub(super) struct Peers {
    store: Arc<Mutex<Store>>,
    launch: Launch,
    timeout: Duration,
    heart: Option<Heart>,
}

impl Peers {
    /// Connects to the store and waits until every process has.
    pub(super) fn meet(launch: &Launch, timeout: Duration) -> Result<Self, Failure> {
        let started = Instant::now();
        // A second group of the same processes must not read the keys of the first.
        let group = GROUPS.fetch_add(1, Ordering::SeqCst);
        let prefix = format!("convpass/{}/{group}", launch.restarts);
        let serves = launch.serves_store();
        let store = Store::open(&launch.address, launch.port, serves, timeout, &prefix);
        let store = store.map_err(|error| Failure {
            rank: (!launch.agent_store && launch.rank != 0).then_some(0),
            reason: format!(
                "the store at {}:{} cannot be reached: {}",
                launch.address,
                launch.port,
                told(error)
            ),
        })?;
        let heart = store.try_clone().and_then(|store| Heart::start(store, launch.rank, timeout));
        let heart = heart.map_err(|error| Failure { rank: None, reason: told(error) })?;
        let store = Arc::new(Mutex::new(store));
        let mut peers = Peers { store, launch: launch.clone(), timeout, heart: Some(heart) };
        let arrive = peers.set(&key("here", launch.rank), std::process::id().to_string());
        let arrive = arrive.map_err(|error| peers.without_store(error));
        let left = timeout.saturating_sub(started.elapsed());
        if let Err(failure) = arrive.and_then(|()| peers.wait("here", left)) {
            peers.leave(Some(&failure), "", || ());
            return Err(failure);
        }
        Ok(peers)
    }

    /// Waits until every rank has set its key `name`. The failure names the first that has not.
    pub(super) fn wait(&self, name: &str, timeout: Duration) -> Result<(), Failure> {
        let keys: Vec<String> = (0..self.launch.world_size).map(|rank| key(name, rank)).collect();
        self.wait_for(&keys, timeout)
    }

    fn wait_for(&self, keys: &[String], timeout: Duration) -> Result<(), Failure> {
        let Err(error) = self.lock().wait(keys, timeout) else { return Ok(()) };
        let mut failure = self.cause(u64::MAX);
        let missing: Vec<usize> = match self.store.try_lock() {
            Ok(store) if failure.rank.is_none() => {
                let is_missing = |key: &String| matches!(store.get(key), Ok(None));
                let missing = keys.iter().enumerate().filter(|(_, key)| is_missing(key));
                missing.map(|(rank, _)| rank).collect()
            }
            _ => Vec::new(),
        };
        if let (None, Some(&first)) = (failure.rank, missing.first()) {
            let named: Vec<String> = missing.iter().map(usize::to_string).collect();
            failure.rank = Some(first);
            failure.reason = format!(
                "of {} ranks, these have not come within {} s: {}",
                self.launch.world_size,
                self.timeout.as_secs_f64(),
                crate::error::list(&named)
            );
        } else if failure.rank.is_none() {
            failure.reason = told(error);
        }
        Err(failure)
    }

    /// Connects the processes for operations on tensors. Every process makes this call.
    pub(super) fn open_group(
        &self,
        rank: usize,
        size: usize,
        transport: &Transport,
    ) -> Result<Group> {
        Group::open(&self.lock(), rank, size, self.timeout, transport)
    }

    /// Tells the others that this rank begins its operation `number`.
    pub(super) fn at(&self, number: u64) -> Result<()> {
        self.set(&key("at", self.launch.rank), number.to_string())
    }

    /// Lets every rank give a value, and rank 0 judge them. `judge` returns what is wrong with the
    /// value of a rank beside that of rank 0; this text is the result everywhere.
    pub(super) fn judged(
        &self,
        number: u64,
        value: &str,
        judge: &dyn Fn(usize, &str, &str) -> Option<String>,
    ) -> Result<Option<String>, Failure> {
        let (rank, size) = (self.launch.rank, self.launch.world_size);
        let (values, verdict) = (format!("value/{number}"), format!("verdict/{number}"));
        let lost = |error| self.without_store(error);
        self.set(&key(&values, rank), value.to_owned()).map_err(lost)?;
        if rank == 0 {
            self.wait(&values, self.timeout)?;
            let mut wrong = None;
            for other in 1..size {
                let found = self.text(&key(&values, other)).map_err(lost)?.unwrap_or_default();
                wrong = wrong.or_else(|| judge(other, value, &found));
            }
            self.set(&verdict, wrong.clone().unwrap_or_default()).map_err(lost)?;
            if wrong.is_some() {
                // The store ends with this process; the others have to read it before.
                let heard = self.lock().wait(
                    &(1..size)
                        .map(|other| key(&format!("heard/{number}"), other))
                        .collect::<Vec<_>>(),
                    self.timeout.min(LINGER),
                );
                let _left_alone = heard;
            }
            return Ok(wrong);
        }
        self.wait_for(std::slice::from_ref(&verdict), self.timeout)?;
        let wrong = self.text(&verdict).map_err(lost)?.filter(|wrong| !wrong.is_empty());
        self.set(&key(&format!("heard/{number}"), rank), String::new()).map_err(lost)?;
        Ok(wrong)
    }

    /// Finds out which rank ended this rank's operation `number`. It takes a few heartbeats.
    pub(super) fn cause(&self, number: u64) -> Failure {
        let (store, launch) = (self.store.clone(), self.launch.clone());
        let (sender, receiver) = channel();
        let pause = beat_interval(self.timeout) * 4;
        let patience = (self.timeout / 4).clamp(Duration::from_secs(1), LINGER);
        let search = move || {
            let held = store.lock().unwrap_or_else(PoisonError::into_inner);
            let found = suspect(&held, &launch, number, pause);
            // The receiver uses the store next.
            drop(held);
            let _gone = sender.send(found);
        };
        // In a thread of its own: a store whose process is stopped never answers.
        let started = Builder::new().name("peers".into()).spawn(search);
        match started.map(|_thread| receiver.recv_timeout(pause + patience)) {
            Ok(Ok(Ok(Some(failure)))) => failure,
            Ok(Ok(Ok(None))) => Failure { rank: None, reason: String::new() },
            Ok(Ok(Err(error))) => self.without_store(error),
            _ => self.without_store(Error::from(tch::TchError::Torch("no answer".to_owned()))),
        }
    }

    /// The failure of a process that cannot use the store.
    pub(super) fn without_store(&self, error: Error) -> Failure {
        let is_other = self.launch.rank != 0 && !self.launch.agent_store;
        let served = if self.launch.agent_store { "torchrun's agent" } else { "rank 0" };
        let reason = format!("the store of {served} does not answer: {}", told(error));
        Failure { rank: is_other.then_some(0), reason }
    }

    /// Tells the others that this rank ends, and why: by itself, or because of another. `close`
    /// ends its connections to them.
    pub(super) fn leave(&mut self, failure: Option<&Failure>, reason: &str, close: impl FnOnce()) {
        self.heart = None;
        // The thread of an unfinished search holds the store for ever.
        let Ok(store) = self.store.try_lock() else { return };
        let text = match failure {
            Some(Failure { rank: Some(rank), reason }) => format!("{rank} {reason}"),
            Some(Failure { rank: None, reason }) => format!("? {reason}"),
            None => format!("! {reason}"),
        };
        let told = store.set(&key("left", self.launch.rank), text.as_bytes());
        // The operations of the others end at once, and the others find the reason in the store.
        close();
        if told.is_err() || failure.is_none() || !self.launch.serves_store() {
            return;
        }
        // Others still ask the store of this process whose fault it was.
        let culprit = failure.and_then(|failure| failure.rank);
        let others = (1..self.launch.world_size).filter(|&rank| Some(rank) != culprit);
        let keys: Vec<String> = others.map(|rank| key("left", rank)).collect();
        let _all_or_enough_time = store.wait(&keys, beat_interval(self.timeout) * 8 + LINGER);
    }

    fn set(&self, key: &str, value: String) -> Result<()> {
        self.lock().set(key, value.as_bytes())
    }

    fn text(&self, key: &str) -> Result<Option<String>> {
        text(&self.lock(), key)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The longest time that a failed rank 0 still serves the store.
const LINGER: Duration = Duration::from_secs(5);

fn text(store: &Store, key: &str) -> Result<Option<String>> {
    Ok(store.get(key)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

/// Looks for the rank that others cannot go on without: one that left, else one whose heartbeat
/// stops within `pause`, else one that is behind operation `number`.
fn suspect(
    store: &Store,
    launch: &Launch,
    number: u64,
    pause: Duration,
) -> Result<Option<Failure>> {
    let others = || (0..launch.world_size).filter(|&rank| rank != launch.rank);
    if let Some(failure) = left(store, others())? {
        return Ok(Some(failure));
    }
    let beats = |store: &Store| -> Result<Vec<_>> {
        others().map(|rank| store.get(&key("beat", rank))).collect()
    };
    let before = beats(store)?;
    sleep(pause);
    if let Some(failure) = left(store, others())? {
        return Ok(Some(failure));
    }
    let after = beats(store)?;
    for (rank, (before, after)) in others().zip(before.into_iter().zip(after)) {
        if before.is_some() && before == after {
            let reason = "it gives no sign of life: its process was killed or stopped, or its \
                          machine cannot be reached";
            return Ok(Some(Failure { rank: Some(rank), reason: reason.to_owned() }));
        }
    }
    for rank in others() {
        let at = text(store, &key("at", rank))?.and_then(|at| at.parse::<u64>().ok());
        if at.is_some_and(|at| at < number && number != u64::MAX) {
            let reason = format!(
                "it is alive and has not come to operation {number}; its last one was {}",
                at.unwrap_or_default()
            );
            return Ok(Some(Failure { rank: Some(rank), reason }));
        }
    }
    Ok(None)
}

/// Returns what a rank of `ranks` left behind: first one that ended by itself.
fn left(store: &Store, ranks: impl Iterator<Item = usize>) -> Result<Option<Failure>> {
    let mut followed = None;
    for rank in ranks {
        let Some(text) = text(store, &key("left", rank))? else { continue };
        let (cause, reason) = text.split_once(' ').unwrap_or((&text, ""));
        let reason = reason.to_owned();
        match cause.parse() {
            Ok(cause) => followed = followed.or(Some(Failure { rank: Some(cause), reason })),
            Err(_) if cause == "!" => return Ok(Some(Failure { rank: Some(rank), reason })),
            Err(_) => {}
        }
    }
    Ok(followed)
}

/// Returns the message of an error of libtorch, in one line.
pub(super) fn told(error: Error) -> String {
    let text = match error {
        Error::Torch(tch::TchError::Torch(text)) => text,
        other => other.to_string(),
    };
    text.lines().next().unwrap_or_default().trim().to_owned()
}

fn beat_interval(timeout: Duration) -> Duration {
    (timeout / 20).clamp(Duration::from_millis(50), Duration::from_secs(1))
}

/// The thread that shows the others that this process lives.
#[derive(Debug)]
struct Heart {
    /// Dropped to end the thread.
    beats: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Heart {
    fn start(store: Store, rank: usize, timeout: Duration) -> Result<Self> {
        let (beats, ended) = channel();
        let interval = beat_interval(timeout);
        let beat = move || {
            for number in 0u64.. {
                // The store is gone when its process ended; the next operation reports that.
                let told = store.set(&key("beat", rank), number.to_string().as_bytes());
                if told.is_err() || ended.recv_timeout(interval) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
            }
        };
        let thread = Builder::new().name("heartbeat".into()).spawn(beat);
        let thread = thread.map_err(Error::io("a thread for heartbeats"))?;
        Ok(Heart { beats: Some(beats), thread: Some(thread) })
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.beats = None;
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}
