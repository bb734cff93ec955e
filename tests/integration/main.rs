//! The one integration binary: each further one would link libtorch again.

mod adapted;
mod audit;
#[cfg(feature = "data")]
mod augment;
mod build_script;
mod bypass;
mod child;
#[cfg(feature = "clip")]
mod clip;
mod contract;
mod convpass_models;
#[cfg(feature = "data")]
mod data;
#[cfg(all(feature = "train", feature = "report"))]
mod examples;
mod features;
mod golden;
mod layering;
mod low_bit;
mod methods;
mod outside;
mod peft;
mod precision;
#[cfg(feature = "train")]
mod resume;
#[cfg(feature = "train")]
mod search;
#[cfg(feature = "train")]
mod small;
#[cfg(feature = "train")]
mod streaming;
#[cfg(feature = "train")]
mod training;
