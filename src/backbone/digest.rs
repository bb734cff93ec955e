//! The digest of weights.

use sha2::{Digest, Sha256};
use tch::{Device, Tensor};

use crate::error::Result;

/// Returns the SHA-256, in hex, of `choices` and of each weight's name, dtype, shape and bytes in
/// order.
pub(super) fn digest(choices: &str, weights: &[(String, Tensor)]) -> Result<String> {
    let mut hash = Sha256::new();
    let mut bytes = Vec::new();
    hash.update(choices);
    for (name, weight) in weights {
        let header = format!("\n{name} {:?} {:?}\n", weight.f_kind()?, weight.size());
        hash.update(header);
        let weight = weight.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        bytes.resize(weight.numel() * weight.f_kind()?.elt_size_in_bytes(), 0);
        weight.f_copy_data_u8(&mut bytes, weight.numel())?;
        hash.update(&bytes);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
