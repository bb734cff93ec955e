//! All unsafe code of the crate.

#[cfg(test)]
pub(crate) mod alloc_probe;
pub(crate) mod cuda;
mod mmap;

pub(crate) use mmap::FileMap;
