//! Conversion between raw memory and tensors.

use tch::{Device, Kind, TchError, Tensor};

/// Converts `bytes`, which hold elements of dtype `kind`, to an f32 tensor `[N]` on the CPU. N is
/// `bytes.len()` divided by the size of an element, rounded down. The conversion from f16 and bf16
/// is exact; f64 is rounded.
///
/// It is one pass on libtorch's threads. `Tensor::f_from_data_size` in its place fills the tensor
/// with zeros first, copies on one thread and needs a second pass for the conversion.
///
/// # Errors
/// Returns libtorch's error if memory is short.
pub(crate) fn to_f32(bytes: &[u8], kind: Kind) -> Result<Tensor, TchError> {
    let size = kind.elt_size_in_bytes();
    let count = [(bytes.len() / size) as i64];
    if bytes.as_ptr().align_offset(size) != 0 {
        let aligned = Tensor::f_from_data_size(&bytes[..count[0] as usize * size], &count, kind)?;
        return aligned.f_to_kind(Kind::Float);
    }
    // SAFETY: `count` aligned elements lie within `bytes`. Nothing writes through the tensor, and
    // it does not outlive the borrow: this function drops it, and the copy has a storage of its
    // own.
    let lent = unsafe { Tensor::f_from_blob(bytes.as_ptr(), &count, &[], kind, Device::Cpu) }?;
    let mut copy = Tensor::f_empty(count, (Kind::Float, Device::Cpu))?;
    copy.f_copy_(&lent)?;
    Ok(copy)
}

/// Returns the elements of `tensor` if it is f32, on the CPU and contiguous; returns an empty slice
/// otherwise. Nothing may write to the tensor during the borrow.
pub(crate) fn floats(tensor: &Tensor) -> &[f32] {
    let is_f32 = tensor.kind() == Kind::Float && tensor.device() == Device::Cpu;
    if !is_f32 || tensor.numel() == 0 || !tensor.is_contiguous() {
        return &[];
    }
    // SAFETY: `numel` contiguous f32 values lie there for as long as the tensor is borrowed.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast_const().cast(), tensor.numel()) }
}

/// A new f32 tensor on the CPU whose elements still have to be written.
#[derive(Debug)]
pub(crate) struct Fresh(Tensor);

impl Fresh {
    /// Allocates a tensor of shape `shape`. Its elements are uninitialized.
    ///
    /// # Errors
    /// Returns libtorch's error if memory is short.
    pub(crate) fn new(shape: &[i64]) -> Result<Self, TchError> {
        Ok(Fresh(Tensor::f_empty(shape, (Kind::Float, Device::Cpu))?))
    }

    /// Returns the elements for writing.
    pub(crate) fn floats(&mut self) -> &mut [f32] {
        if self.0.numel() == 0 {
            return &mut [];
        }
        // SAFETY: `numel` contiguous f32 values lie there, and nothing else refers to this tensor.
        // libtorch allocated the memory, and every bit pattern is a valid f32.
        unsafe { std::slice::from_raw_parts_mut(self.0.data_ptr().cast(), self.0.numel()) }
    }

    /// Returns the finished tensor.
    pub(crate) fn done(self) -> Tensor {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Converts the same bytes from every start offset and compares with tch's own copy.
    #[test]
    fn agrees_with_the_plain_copy() {
        let bytes: Vec<u8> = (0..4099u32).map(|i| (i * 37 % 113) as u8).collect();
        for kind in [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16] {
            let size = kind.elt_size_in_bytes();
            for start in 0..size {
                let bytes = &bytes[start..];
                let count = bytes.len() / size;
                let plain = Tensor::f_from_data_size(&bytes[..count * size], &[count as i64], kind)
                    .unwrap();
                let copy = to_f32(bytes, kind).unwrap();
                assert_eq!((copy.size(), copy.kind()), (vec![count as i64], Kind::Float));
                assert_eq!(copy, plain.to_kind(Kind::Float), "{kind:?} from {start}");
            }
        }
        assert_eq!(to_f32(&[], Kind::Float).unwrap().numel(), 0);
    }

    #[test]
    fn the_copy_is_its_own() {
        let mut bytes = 1f32.to_le_bytes().repeat(3);
        let copy = to_f32(&bytes, Kind::Float).unwrap();
        bytes.fill(0);
        assert_eq!(Vec::<f32>::try_from(copy).unwrap(), [1.0; 3]);
    }
}
