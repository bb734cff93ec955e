//! The one integration binary: each further one would link libtorch again.

mod adapted;
mod build_script;
mod bypass;
#[cfg(feature = "data")]
mod data;
mod golden;
mod layering;
