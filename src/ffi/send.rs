//! Copies from the CPU to a device for which the CPU does not wait.

use tch::{Device, Tensor};

use super::recording::Recording;
use crate::error::{Error, Result};

/// Returns `tensor` on `device`. If it comes from the CPU, the CPU does not wait until a GPU has come
/// to the copy.
///
/// # Errors
/// [`Error::Config`] in a pass that is recorded: its replays would read the CPU's memory when it is
/// freed.
pub(crate) fn send(tensor: &Tensor, device: Device) -> Result<Tensor> {
    if Recording::is_active() && tensor.device() == Device::Cpu {
        let expected = "false for a model that copies from the CPU in each pass";
        return Err(Error::config("cuda_graph", expected, true).in_config("TrainConfig"));
    }
    let pinned;
    let mut tensor = tensor;
    // A copy to the CPU has to arrive before its values are read. Metal copies later, from memory
    // that may be freed by then.
    let asynchronous = tensor.device() == Device::Cpu && !cfg!(target_vendor = "apple");
    if asynchronous && matches!(device, Device::Cuda(_)) {
        // CUDA copies pageable memory to pinned memory first, and waits for that. `pin_memory`
        // without the underscore prints a warning each time. A system may refuse to pin memory.
        if let Ok(own) = tensor.f_internal_pin_memory(device) {
            pinned = own;
            tensor = &pinned;
        }
    }
    Ok(tensor.f_to_device_(device, tensor.f_kind()?, asynchronous, false)?)
}
