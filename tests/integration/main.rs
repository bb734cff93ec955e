//! The one integration binary: each further one would link libtorch again.

#[cfg(target_os = "linux")]
mod accelerator;
mod adapted;
mod audit;
mod augment;
mod build_script;
mod bypass;
mod captured;
mod child;
mod clip;
mod contract;
mod convpass_models;
mod data;
mod data_parallel;
mod dense;
mod distributed;
mod export;
mod faults;
mod features;
mod file_faults;
mod golden;
mod head_rate;
mod hostile;
#[cfg(target_os = "linux")]
mod hosts;
mod hub;
mod killed_run;
mod layering;
mod low_bit;
mod malformed;
mod methods;
mod metrics;
mod opening;
mod outside;
mod own_backbone;
mod peft;
mod photos;
mod precision;
mod resume;
mod streaming;
mod support;
mod team;
mod told;
mod training;
#[cfg(target_os = "linux")]
mod unwritable;
mod variants;
mod vote;
mod vtab_finetune;
mod wrappers;
