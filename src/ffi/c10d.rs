//! The C++ half of torch.distributed (c10d): a store of keys and values, and a group of processes.

use std::ffi::{CString, c_char, c_int};
use std::ptr::{self, NonNull};
use std::time::Duration;

use tch::{TchError, Tensor};
use torch_sys::C_tensor;

use super::autograd::take;
use crate::error::{Error, Result};

/// A connection to the store of a run. One thread uses a connection at a time.
#[derive(Debug)]
pub(crate) struct Store(NonNull<RawStore>);

// SAFETY: a store may be used from any thread; every method holds the store's own lock.
unsafe impl Send for Store {}

impl Store {
    /// Connects to the store at `host`:`port`, and serves it first if `serves`.
    pub(crate) fn open(
        host: &str,
        port: u16,
        serves: bool,
        timeout: Duration,
        prefix: &str,
    ) -> Result<Self> {
        let (host, prefix) = (c_string(host)?, c_string(prefix)?);
        let mut out = ptr::null_mut();
        // SAFETY: the strings outlive the call; `out` is written if there is no message.
        take(unsafe {
            convpass_store_open(
                host.as_ptr(),
                port,
                serves,
                millis(timeout),
                prefix.as_ptr(),
                &mut out,
            )
        })?;
        Ok(Store(not_null(out)?))
    }

    /// Opens another connection to the same store.
    pub(crate) fn try_clone(&self) -> Result<Self> {
        let mut out = ptr::null_mut();
        // SAFETY: `self.0` is a live store; `out` is written if there is no message.
        take(unsafe { convpass_store_clone(self.0.as_ptr(), &mut out) })?;
        Ok(Store(not_null(out)?))
    }

    /// Sets the value of a key.
    pub(crate) fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let key = c_string(key)?;
        // SAFETY: key and value outlive the call, which copies them.
        take(unsafe {
            convpass_store_set(self.0.as_ptr(), key.as_ptr(), value.as_ptr(), value.len())
        })
    }

    /// Returns the value of a key, or `None` if it has none.
    pub(crate) fn get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let key = c_string(key)?;
        let (mut value, mut length) = (ptr::null_mut(), 0);
        // SAFETY: the key outlives the call, which writes `value` and, if that is not null,
        // `length`.
        take(unsafe {
            convpass_store_get(self.0.as_ptr(), key.as_ptr(), &mut value, &mut length)
        })?;
        if value.is_null() {
            return Ok(None);
        }
        // SAFETY: `value` is memory from `malloc` with `length` bytes, and this side frees it.
        let copy = unsafe {
            let copy = std::slice::from_raw_parts(value, length).to_vec();
            libc::free(value.cast());
            copy
        };
        Ok(Some(copy))
    }

    /// Waits until every key has a value.
    pub(crate) fn wait(&self, keys: &[String], timeout: Duration) -> Result<()> {
        let keys = keys.iter().map(|key| c_string(key)).collect::<Result<Vec<_>>>()?;
        let pointers: Vec<*const c_char> = keys.iter().map(|key| key.as_ptr()).collect();
        // SAFETY: the strings and the array of their pointers outlive the call.
        take(unsafe {
            convpass_store_wait(self.0.as_ptr(), pointers.as_ptr(), pointers.len(), millis(timeout))
        })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the pointer came from C++ and is freed once.
        unsafe { convpass_store_free(self.0.as_ptr()) }
    }
}

/// How the processes of a [`Group`] reach each other.
#[derive(Debug)]
pub(crate) enum Transport {
    Nccl,
    /// gloo through the named network interface.
    Interface(String),
    /// gloo at the address of this host name.
    Hostname(String),
    /// gloo at the address of this machine's name.
    Gloo,
}

/// A connected group of processes.
#[derive(Debug)]
pub(crate) struct Group(NonNull<RawGroup>);

// SAFETY: a group may be used from any thread, though only from one at a time; it is not `Sync`.
unsafe impl Send for Group {}

impl Group {
    /// Connects `size` processes, all of which make this call.
    pub(crate) fn open(
        store: &Store,
        rank: usize,
        size: usize,
        timeout: Duration,
        transport: &Transport,
    ) -> Result<Self> {
        let (mut interface, mut hostname) = (None, None);
        match transport {
            Transport::Interface(name) => interface = Some(c_string(name)?),
            Transport::Hostname(name) => hostname = Some(c_string(name)?),
            Transport::Nccl | Transport::Gloo => {}
        }
        let pointer = |name: &Option<CString>| name.as_ref().map_or(ptr::null(), |n| n.as_ptr());
        let mut out = ptr::null_mut();
        // SAFETY: store and names outlive the call; `out` is written if there is no message.
        take(unsafe {
            convpass_group_open(
                store.0.as_ptr(),
                int(rank)?,
                int(size)?,
                millis(timeout),
                matches!(transport, Transport::Nccl),
                pointer(&interface),
                pointer(&hostname),
                &mut out,
            )
        })?;
        Ok(Group(not_null(out)?))
    }

    /// Replaces `tensor` by its sum over the processes.
    pub(crate) fn all_reduce(&self, tensor: &mut Tensor, timeout: Duration) -> Result<()> {
        // SAFETY: group and tensor outlive the call, which ends when the operation did or failed.
        take(unsafe {
            convpass_group_all_reduce(self.0.as_ptr(), tensor.as_ptr(), millis(timeout))
        })
    }

    /// Replaces `tensor` by that of process `root`.
    pub(crate) fn broadcast(
        &self,
        tensor: &mut Tensor,
        root: usize,
        timeout: Duration,
    ) -> Result<()> {
        // SAFETY: as in `all_reduce`.
        take(unsafe {
            convpass_group_broadcast(self.0.as_ptr(), tensor.as_ptr(), int(root)?, millis(timeout))
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: the pointer came from C++ and is freed once.
        unsafe { convpass_group_free(self.0.as_ptr()) }
    }
}

/// Returns the milliseconds of a timeout. More than a century would overflow when C++ adds it to the
/// present in nanoseconds.
fn millis(timeout: Duration) -> i64 {
    const CENTURY: i64 = 100 * 365 * 24 * 3_600_000;
    i64::try_from(timeout.as_millis()).map_or(CENTURY, |millis| millis.min(CENTURY))
}

fn int(number: usize) -> Result<c_int> {
    c_int::try_from(number).map_err(|_| refused(format!("{number} is no number of processes")))
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| refused(format!("{text:?} holds a zero byte")))
}

fn not_null<T>(pointer: *mut T) -> Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(|| refused("nothing was made".to_owned()))
}

fn refused(reason: String) -> Error {
    TchError::Torch(reason).into()
}

#[repr(C)]
struct RawStore {
    _opaque: [u8; 0],
}

#[repr(C)]
struct RawGroup {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    fn convpass_store_open(
        host: *const c_char,
        port: u16,
        serves: bool,
        timeout_ms: i64,
        prefix: *const c_char,
        out: *mut *mut RawStore,
    ) -> *mut c_char;
    fn convpass_store_clone(store: *const RawStore, out: *mut *mut RawStore) -> *mut c_char;
    fn convpass_store_set(
        store: *mut RawStore,
        key: *const c_char,
        value: *const u8,
        length: usize,
    ) -> *mut c_char;
    fn convpass_store_get(
        store: *mut RawStore,
        key: *const c_char,
        value: *mut *mut u8,
        length: *mut usize,
    ) -> *mut c_char;
    fn convpass_store_wait(
        store: *mut RawStore,
        keys: *const *const c_char,
        count: usize,
        timeout_ms: i64,
    ) -> *mut c_char;
    fn convpass_store_free(store: *mut RawStore);
    fn convpass_group_open(
        store: *const RawStore,
        rank: c_int,
        size: c_int,
        timeout_ms: i64,
        with_nccl: bool,
        interface: *const c_char,
        hostname: *const c_char,
        out: *mut *mut RawGroup,
    ) -> *mut c_char;
    fn convpass_group_all_reduce(
        group: *mut RawGroup,
        tensor: *const C_tensor,
        timeout_ms: i64,
    ) -> *mut c_char;
    fn convpass_group_broadcast(
        group: *mut RawGroup,
        tensor: *const C_tensor,
        root: c_int,
        timeout_ms: i64,
    ) -> *mut c_char;
    fn convpass_group_free(group: *mut RawGroup);
}
