//! All unsafe code of the crate.

#[cfg(test)]
pub(crate) mod alloc_probe;
pub(crate) mod cuda;
mod elements;
pub(crate) mod malloc;
mod mmap;

pub(crate) use elements::to_f32;
pub(crate) use mmap::FileMap;
