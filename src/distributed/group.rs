//! The group of the processes of a run.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::thread::panicking;
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use super::launch::Launch;
use super::peers::{Failure, Peers, told};
use crate::error::{Error, Result};
use crate::ffi::c10d::{Group, Transport};

/// The processes of a run, connected by torch.distributed (c10d): gloo on a CPU, NCCL on GPUs.
///
/// Every process calls the same operations in the same order. An operation that fails in one
/// process fails in all of them, after the timeout at the latest, and the error names the rank that
/// the others waited for where that can be found out. After an error the group cannot be used
/// again. When the value is dropped, the others are told.
///
/// ```no_run
/// use std::time::Duration;
///
/// use convpass::distributed::ProcessGroup;
/// use tch::{Device, Tensor};
///
/// # fn main() -> convpass::Result<()> {
/// // Under torchrun, Slurm, or with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
/// let timeout = Duration::from_secs(300);
/// let Some(group) = ProcessGroup::from_env(Device::Cpu, timeout)? else {
///     return Ok(()); // This process runs alone.
/// };
/// let mut sum = Tensor::from_slice(&[group.rank() as f32]);
/// group.all_reduce(&mut sum)?;
/// # Ok(())
/// # }
/// ```
pub struct ProcessGroup {
    peers: RefCell<Peers>,
    /// `None` in a group of one process.
    group: Option<Group>,
    launch: Launch,
    /// The device of the tensors that the transport accepts.
    device: Device,
    timeout: Duration,
    /// Number of operations so far.
    operations: Cell<u64>,
    failure: RefCell<Option<Failure>>,
    /// Why this process leaves, if it said so.
    reason: RefCell<Option<String>>,
}

impl fmt::Debug for ProcessGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessGroup")
            .field("launch", &self.launch)
            .field("device", &self.device)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl ProcessGroup {
    /// Connects this process to the others as the environment says ([`Launch::from_env`]). Returns
    /// `None` if it runs alone.
    ///
    /// # Errors
    /// The errors of [`Launch::from_env`] and of [`ProcessGroup::connect`].
    pub fn from_env(device: Device, timeout: Duration) -> Result<Option<Self>> {
        let launch = Launch::from_env()?;
        launch.map(|launch| Self::connect(&launch, device, timeout)).transpose()
    }

    /// Connects this process to the others and waits until all are there.
    ///
    /// `device` is the device of the model: a GPU is reached by NCCL, which needs the feature `cuda`
    /// and one GPU for each process; otherwise gloo connects the processes, through the network
    /// interface that `GLOO_SOCKET_IFNAME` names, if it is set. `timeout` is the longest time that
    /// this process waits for the others, here and in each operation.
    ///
    /// # Errors
    /// [`Error::Config`] if `timeout` is 0; [`Error::Distributed`] if a process does not come within
    /// the timeout, with its rank, or if the processes cannot be connected.
    pub fn connect(launch: &Launch, device: Device, timeout: Duration) -> Result<Self> {
        if timeout.is_zero() {
            return Err(Error::config("timeout", "above 0", "0 s"));
        }
        let failed = |failure| error(launch, "connecting to the other processes", failure);
        let mut peers = Peers::meet(launch, timeout).map_err(failed)?;
        let (transport, device) = match device {
            Device::Cuda(_) => (Transport::Nccl, device),
            _ => (gloo(launch), Device::Cpu),
        };
        let group = match launch.world_size {
            1 => None,
            size => match peers.open_group(launch.rank, size, &transport) {
                Ok(group) => Some(group),
                Err(error) => {
                    let mut failure = peers.cause(u64::MAX);
                    failure.reason = joined(&failure.reason, told(error));
                    peers.leave(Some(&failure), "", || ());
                    return Err(failed(failure));
                }
            },
        };
        Ok(ProcessGroup {
            peers: RefCell::new(peers),
            group,
            launch: launch.clone(),
            device,
            timeout,
            operations: Cell::new(0),
            failure: RefCell::new(None),
            reason: RefCell::new(None),
        })
    }

    /// Returns the number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.launch.rank
    }

    /// Returns the number of processes.
    pub fn world_size(&self) -> usize {
        self.launch.world_size
    }

    /// Returns the place of this process among the others.
    pub fn launch(&self) -> &Launch {
        &self.launch
    }

    /// Returns the longest time that this process waits for the others.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Replaces `tensor` by its sum over all processes, which pass tensors of one shape and dtype.
    ///
    /// # Errors
    /// [`Error::Distributed`] if a process does not take part.
    pub fn all_reduce(&self, tensor: &mut Tensor) -> Result<()> {
        let what = format!("the all-reduce of {} numbers", tensor.numel());
        self.collective(&what, tensor, |group, tensor| group.all_reduce(tensor, self.timeout))
    }

    /// Replaces `tensor` by that of the process `root`; the processes pass tensors of one shape and
    /// dtype.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no process `root`; [`Error::Distributed`] if a process does not
    /// take part.
    pub fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()> {
        if root >= self.world_size() {
            let expected = format!("below {}, the number of processes", self.world_size());
            return Err(Error::config("root", expected, root));
        }
        let what = format!("the broadcast of {} numbers", tensor.numel());
        let broadcast =
            |group: &Group, tensor: &mut Tensor| group.broadcast(tensor, root, self.timeout);
        self.collective(&what, tensor, broadcast)
    }

    /// Waits until every process has come to this call.
    ///
    /// # Errors
    /// [`Error::Distributed`] if a process does not.
    pub fn barrier(&self) -> Result<()> {
        let mut one = Tensor::f_zeros([1], (Kind::Float, self.device))?;
        self.collective("a barrier", &mut one, |group, one| group.all_reduce(one, self.timeout))
    }

    /// Checks that every process passes the same `value`. `name` says in the error what differs.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`], in every process, with the first rank that has another value than
    /// rank 0; [`Error::Distributed`] if a process does not take part.
    pub fn agree(&self, name: &str, value: &str) -> Result<()> {
        self.compare(value, |expected, found| {
            let (expected, found) = (expected.to_owned(), found.to_owned());
            (expected != found).then(|| (name.to_owned(), expected, found))
        })
    }

    /// Compares the `value` of every process with that of rank 0. `difference` receives that of
    /// rank 0 and the other, and returns a field and its two values.
    pub(crate) fn compare(
        &self,
        value: &str,
        difference: impl Fn(&str, &str) -> Option<(String, String, String)>,
    ) -> Result<()> {
        let number = self.next();
        self.check("comparing settings")?;
        let judge = |rank: usize, expected: &str, found: &str| {
            let (field, expected, found) = difference(expected, found)?;
            serde_json::to_string(&(rank, field, expected, found)).ok()
        };
        let verdict = self.peers.borrow().judged(number, value, &judge);
        let verdict = verdict.map_err(|failure| self.failed("comparing settings", failure))?;
        let Some(verdict) = verdict else { return Ok(()) };
        let (rank, field, expected, found) = serde_json::from_str(&verdict).map_err(|e| {
            self.failed("comparing settings", Failure { rank: Some(0), reason: e.to_string() })
        })?;
        Err(Error::RanksDiffer { rank, field, expected, found })
    }

    /// Returns the numbers of every process, by rank. They need not be equally many.
    ///
    /// # Errors
    /// [`Error::Distributed`] if a process does not take part.
    pub fn gather(&self, numbers: &[f64]) -> Result<Vec<Vec<f64>>> {
        let (rank, size) = (self.rank() as i64, self.world_size());
        let on_cpu = (Kind::Double, Device::Cpu);
        let mut counts = Tensor::f_zeros([size as i64], on_cpu)?;
        let _set = counts.f_narrow(0, rank, 1)?.f_fill_(numbers.len() as f64)?;
        self.all_reduce(&mut counts)?;
        let counts: Vec<usize> =
            Vec::<f64>::try_from(&counts)?.into_iter().map(|count| count as usize).collect();
        let longest = counts.iter().copied().max().unwrap_or_default();
        let mut all = Tensor::f_zeros([size as i64, longest as i64], on_cpu)?;
        let own = Tensor::f_from_slice(numbers)?;
        all.f_select(0, rank)?.f_narrow(0, 0, numbers.len() as i64)?.f_copy_(&own)?;
        self.all_reduce(&mut all)?;
        let all = Vec::<f64>::try_from(all.f_view([-1])?)?;
        let row = |(rank, count): (usize, usize)| all[rank * longest..][..count].to_vec();
        Ok(counts.into_iter().enumerate().map(row).collect())
    }

    /// Ends the membership of this process and tells the others why, so that their error says it.
    /// Without this call they are told only that the process ended.
    pub fn leave(self, reason: &str) {
        *self.reason.borrow_mut() = Some(reason.lines().collect::<Vec<_>>().join(" "));
    }

    fn next(&self) -> u64 {
        self.operations.set(self.operations.get() + 1);
        self.operations.get()
    }

    fn collective(
        &self,
        what: &str,
        tensor: &mut Tensor,
        run: impl Fn(&Group, &mut Tensor) -> Result<()>,
    ) -> Result<()> {
        let number = self.next();
        self.check(what)?;
        let Some(group) = self.group.as_ref().filter(|_| tensor.numel() > 0) else {
            return Ok(());
        };
        let told_all = self.peers.borrow().at(number);
        told_all.map_err(|e| self.failed(what, self.peers.borrow().without_store(e)))?;
        let mut sent = tensor.f_detach()?.f_to_device(self.device)?.f_contiguous()?;
        if let Err(error) = run(group, &mut sent) {
            let mut failure = self.peers.borrow().cause(number);
            failure.reason = joined(&failure.reason, told(error));
            return Err(self.failed(&format!("{what} (operation {number})"), failure));
        }
        if sent.data_ptr() != tensor.data_ptr() {
            tch::no_grad(|| tensor.f_copy_(&sent))?;
        }
        Ok(())
    }

    /// Returns the error of an earlier operation, after which there can be no other.
    fn check(&self, what: &str) -> Result<()> {
        let failure = self.failure.borrow().clone();
        failure.map_or(Ok(()), |failure| Err(error(&self.launch, what, failure)))
    }

    fn failed(&self, what: &str, failure: Failure) -> Error {
        *self.failure.borrow_mut() = Some(failure.clone());
        error(&self.launch, what, failure)
    }
}

impl Drop for ProcessGroup {
    /// Tells the others that this process leaves.
    fn drop(&mut self) {
        let reason = match self.reason.get_mut() {
            Some(reason) => reason.as_str(),
            None if panicking() => "it panicked",
            None => "it ended before the others",
        };
        let failure = self.failure.get_mut().take();
        let group = self.group.take();
        self.peers.get_mut().leave(failure.as_ref(), reason, || drop(group));
    }
}

/// Chooses how gloo reaches the other processes.
fn gloo(launch: &Launch) -> Transport {
    match std::env::var("GLOO_SOCKET_IFNAME") {
        Ok(name) if !name.is_empty() => Transport::Interface(name),
        _ if launch.is_loopback() => Transport::Hostname("127.0.0.1".to_owned()),
        _ => Transport::Gloo,
    }
}

/// Joins what was found out about another rank and what libtorch says.
fn joined(reason: &str, message: String) -> String {
    if reason.is_empty() { message } else { format!("{reason} ({message})") }
}

fn error(launch: &Launch, during: &str, failure: Failure) -> Error {
    Error::Distributed {
        rank: launch.rank,
        world_size: launch.world_size,
        during: during.to_owned(),
        failed: failure.rank,
        reason: failure.reason,
    }
}
