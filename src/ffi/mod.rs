//! All `unsafe` code of the crate.
#![allow(unsafe_code)]

#[cfg(test)]
pub(crate) mod alloc_probe;
pub(crate) mod autocast;
mod autograd;
#[cfg(feature = "distributed")]
pub(crate) mod c10d;
pub(crate) mod cuda;
mod elements;
pub(crate) mod malloc;
mod threads;

pub(crate) use autograd::{Backward, attach, untouched};
pub(crate) use elements::{Fresh, floats, read_f32, to_f32};
pub(crate) use threads::for_each;
