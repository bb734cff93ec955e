//! Conversion between raw memory and tensors.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, TchError, Tensor};

use super::malloc::populate;
use super::threads::for_each;
use crate::error::Result;

/// Converts `bytes`, which hold elements of dtype `kind`, to an f32 tensor `[N]` on the CPU, and
/// returns with it whether all its elements are finite. N is `bytes.len()` divided by the size of an
/// element, rounded down. The conversion from f16 and bf16 is exact; f64 is rounded.
///
/// Elements of f32 are copied and checked in one pass on libtorch's threads.
///
/// # Errors
/// Returns libtorch's error if memory is short.
pub(crate) fn to_f32(bytes: &[u8], kind: Kind) -> Result<(Tensor, bool)> {
    let size = kind.elt_size_in_bytes();
    let count = [(bytes.len() / size) as i64];
    if kind == Kind::Float {
        let copy = |at: usize, to: &mut [u8]| {
            to.copy_from_slice(&bytes[at..at + to.len()]);
            Ok(())
        };
        return read_f32(bytes.len() / size, &copy)?
            .map_err(|e| TchError::Torch(e.to_string()).into());
    }
    let converted = if bytes.as_ptr().align_offset(size) == 0 {
        // SAFETY: `count` aligned elements lie within `bytes`. Nothing writes through the tensor,
        // and it does not outlive the borrow: this block drops it, and the copy has a storage of
        // its own.
        let lent = unsafe { Tensor::f_from_blob(bytes.as_ptr(), &count, &[], kind, Device::Cpu) }?;
        lent.f_to_kind(Kind::Float)?
    } else {
        let aligned = Tensor::f_from_data_size(&bytes[..count[0] as usize * size], &count, kind)?;
        aligned.f_to_kind(Kind::Float)?
    };
    let finite = floats(&converted).iter().fold(0, |seen, x| seen | overflow(x.to_bits())) == 0;
    Ok((converted, finite))
}

/// The elements that a thread copies at a time: 128 KiB, many pages, but so few
/// that all threads end at about the same time.
const COPIED_AT_A_TIME: usize = 1 << 15;

/// Creates an f32 tensor `[count]` on the CPU from elements that `read` writes, and returns with it
/// whether all of them are finite. On libtorch's threads, `read` is called with the offset of some
/// bytes among those of all elements and with the place for them, and fills it.
///
/// # Errors
/// Returns libtorch's error if memory is short; within it, the first error of `read`.
pub(crate) fn read_f32(
    count: usize,
    read: &(dyn Fn(usize, &mut [u8]) -> io::Result<()> + Sync),
) -> Result<io::Result<(Tensor, bool)>> {
    let mut all = Fresh::new(&[count as i64])?;
    let (seen, failed) = (AtomicU32::new(0), Mutex::new(None));
    let chunks: Vec<_> = all.floats().chunks_mut(COPIED_AT_A_TIME).map(Mutex::new).collect();
    for_each(chunks.len(), |i| {
        let mut to = chunks[i].lock().unwrap_or_else(PoisonError::into_inner);
        populate(&mut to);
        if let Err(error) = read(i * COPIED_AT_A_TIME * 4, bytes_of(&mut to)) {
            let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
            failed.get_or_insert(error);
            return;
        }
        let here = to.iter().fold(0, |seen, x| seen | overflow(x.to_bits()));
        seen.fetch_or(here, Ordering::Relaxed);
    })?;
    drop(chunks);
    Ok(match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok((all.done(), seen.into_inner() == 0)),
    })
}

/// Returns the bytes of the elements.
fn bytes_of(floats: &mut [f32]) -> &mut [u8] {
    let size = std::mem::size_of_val(floats);
    // SAFETY: the bytes are those of `floats`, which stays borrowed. A byte has no alignment, and
    // every bit pattern is a valid f32.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), size) }
}

/// Returns the highest bit if `bits` are those of an f32 that is NaN or infinite: only then are all
/// bits of the exponent set, and adding one to the exponent carries.
fn overflow(bits: u32) -> u32 {
    ((bits & 0x7fff_ffff) + 0x0080_0000) & 0x8000_0000
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
                let (copy, _) = to_f32(bytes, kind).unwrap();
                assert_eq!((copy.size(), copy.kind()), (vec![count as i64], Kind::Float));
                assert_eq!(copy, plain.to_kind(Kind::Float), "{kind:?} from {start}");
            }
        }
        let (empty, finite) = to_f32(&[], Kind::Float).unwrap();
        assert_eq!((empty.numel(), finite), (0, true));
    }

    #[test]
    fn the_copy_is_its_own() {
        let mut bytes = 1f32.to_le_bytes().repeat(3);
        let (copy, _) = to_f32(&bytes, Kind::Float).unwrap();
        bytes.fill(0);
        assert_eq!(Vec::<f32>::try_from(copy).unwrap(), [1.0; 3]);
    }

    /// Puts one value at each of several places of a tensor of more than one chunk.
    #[test]
    fn one_element_that_is_not_finite_is_seen() {
        let count = COPIED_AT_A_TIME + 5;
        let kinds = [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16];
        for (kind, place) in
            kinds.into_iter().flat_map(|kind| [0, 7, count - 1].map(|at| (kind, at)))
        {
            let finite_in = |value: f64| {
                let tensor = Tensor::full(count as i64, -2.5, (kind, Device::Cpu));
                _ = tensor.get(place as i64).fill_(value);
                let mut bytes = vec![0; count * kind.elt_size_in_bytes()];
                tensor.copy_data_u8(&mut bytes, count);
                to_f32(&bytes, kind).unwrap().1
            };
            for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                assert!(!finite_in(value), "{value} at {place} of {kind:?}");
            }
            for value in [0.0, -0.0, 1e-45, 6e4, -6e4] {
                assert!(finite_in(value), "{value} at {place} of {kind:?}");
            }
        }
        for bits in [f32::MAX, f32::MIN, f32::MIN_POSITIVE, -0.0].map(f32::to_bits) {
            assert_eq!(overflow(bits), 0, "{bits:x}");
        }
    }
}
