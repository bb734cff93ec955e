//! All `unsafe` code of the crate.
#![allow(unsafe_code)]

#[cfg(feature = "train")]
mod adamw;
#[cfg(test)]
pub(crate) mod alloc_probe;
pub(crate) mod autocast;
mod autograd;
#[cfg(feature = "distributed")]
pub(crate) mod c10d;
pub(crate) mod cuda;
#[cfg(feature = "train")]
mod cuda_graph;
mod elements;
mod int8;
mod linear;
pub(crate) mod malloc;
mod processor;
mod products;
mod recording;
mod send;
mod threads;

#[cfg(feature = "train")]
pub(crate) use adamw::{AdamWStep, FusedSlot, fused_adamw};
#[cfg(feature = "train")]
pub(crate) use autograd::clear_gradient;
pub(crate) use autograd::{Backward, attach, untouched};
#[cfg(feature = "train")]
pub(crate) use cuda_graph::CudaGraph;
pub(crate) use elements::{Fresh, floats, read_f32, to_f32};
pub(crate) use int8::PackedInt8;
pub(crate) use linear::{has_onednn, onednn_linear};
pub(crate) use processor::{has_int8_products, is_amd_with_avx512};
pub(crate) use products::{add_product, add_scaled, convolution_backward};
pub(crate) use recording::Recording;
pub(crate) use send::send;
pub(crate) use threads::for_each;
