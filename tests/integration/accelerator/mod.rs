//! Tests on a device whose tensors do not mix with those of the CPU, as on a GPU, without one.
//!
//! Each test has a process of its own, because libtorch has to know the device before the first
//! backward pass.

mod device;
mod launches;
mod methods;
mod mistakes;
mod runs;
