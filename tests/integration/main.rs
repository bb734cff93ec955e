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
mod dense;
mod features;
mod golden;
mod layering;
mod low_bit;
mod malformed;
mod methods;
mod opening;
mod outside;
mod own_backbone;
mod peft;
mod precision;
#[cfg(feature = "train")]
mod resume;
#[cfg(feature = "train")]
mod small;
#[cfg(feature = "train")]
mod streaming;
#[cfg(feature = "train")]
mod training;
#[cfg(feature = "train")]
mod vtab_finetune;
