//! The one integration binary: each further one would link libtorch again.

mod adapted;
mod build_script;
mod bypass;
mod golden;
mod layering;
