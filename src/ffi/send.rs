//! Copies from the CPU to a device for which the CPU does not wait.

use tch::{Device, Tensor};

use crate::error::Result;

/// Returns `tensor` on `device`. The CPU does not wait until a GPU has come to the copy.
pub(crate) fn send(tensor: &Tensor, device: Device) -> Result<Tensor> {
    let pinned;
    let mut tensor = tensor;
    if matches!(device, Device::Cuda(_)) && tensor.device() == Device::Cpu {
        // CUDA copies pageable memory to pinned memory first and waits for that copy.
        pinned = tensor.f_pin_memory(device)?;
        tensor = &pinned;
    }
    // Metal copies later from memory that may be freed by then.
    let asynchronous = !cfg!(target_vendor = "apple");
    Ok(tensor.f_to_device_(device, tensor.f_kind()?, asynchronous, false)?)
}
