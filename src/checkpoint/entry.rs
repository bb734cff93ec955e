//! The position of a tensor in a file, and reading it from there.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crc32fast::Hasher;
use flate2::bufread::DeflateDecoder;
use tch::{Kind, Tensor};

use super::content::{Content, bytes, check, reader, unreadable};
use crate::error::Result;
use crate::ffi::{read_f32, to_f32};

/// The type of a tensor's elements as the file states it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ElementType {
    F64,
    F32,
    F16,
    Bf16,
    /// Any other dtype, such as integers and booleans, which no model uses: its name and, if known,
    /// the bytes of an element.
    Other(String, Option<usize>),
}

impl ElementType {
    /// Returns the bytes of an element, or `None` if they are unknown.
    pub(super) fn size(&self) -> Option<usize> {
        match self {
            ElementType::F64 => Some(8),
            ElementType::F32 => Some(4),
            ElementType::F16 | ElementType::Bf16 => Some(2),
            ElementType::Other(_, size) => *size,
        }
    }

    /// Returns whether no model has weights of this dtype.
    pub(super) fn is_other(&self) -> bool {
        matches!(self, ElementType::Other(..))
    }

    fn kind(&self) -> Option<Kind> {
        match self {
            ElementType::F64 => Some(Kind::Double),
            ElementType::F32 => Some(Kind::Float),
            ElementType::F16 => Some(Kind::Half),
            ElementType::Bf16 => Some(Kind::BFloat16),
            ElementType::Other(..) => None,
        }
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ElementType::F64 => "f64",
            ElementType::F32 => "f32",
            ElementType::F16 => "f16",
            ElementType::Bf16 => "bf16",
            ElementType::Other(name, _) => name,
        })
    }
}

/// A range of bytes in a file, plain or deflated.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    /// The range in the file.
    pub(super) at: Range<usize>,
    /// The CRC-32 of the inflated bytes; `None` if there is no checksum to compare.
    pub(super) crc: Option<u32>,
    /// Number of bytes after inflating; `None` if the bytes are not deflated.
    pub(super) inflated: Option<usize>,
}

impl Stored {
    /// Returns the number of bytes after inflating.
    pub(super) fn size(&self) -> usize {
        self.inflated.unwrap_or(self.at.len())
    }

    /// Returns at most the first `count` bytes, inflated.
    pub(super) fn head(&self, file: &dyn Content, count: usize) -> Result<Vec<u8>, String> {
        check(file, &self.at)?;
        if self.inflated.is_none() {
            return bytes(file, &(self.at.start..self.at.end.min(self.at.start + count)));
        }
        let mut head = Vec::new();
        let mut reader = DeflateDecoder::new(reader(file, self.at.clone())).take(count as u64);
        reader.read_to_end(&mut head).map_err(|e| unreadable(&e))?;
        Ok(head)
    }

    /// Returns all bytes, inflated, after a check of the checksum.
    pub(super) fn bytes(&self, file: &dyn Content) -> Result<Vec<u8>, String> {
        let bytes = match self.inflated {
            None => bytes(file, &self.at)?,
            Some(size) => inflate(file, &self.at, size)?,
        };
        self.check_crc(crc32fast::hash(&bytes))?;
        Ok(bytes)
    }

    fn check_crc(&self, found: u32) -> Result<(), String> {
        match self.crc {
            Some(crc) if crc != found => Err("checksum does not match".into()),
            _ => Ok(()),
        }
    }

    /// Reads `count` elements of f32 that are not deflated, of which the first one begins after
    /// `skip` bytes, and returns with them whether all are finite. The bytes go from the file to
    /// their place in the tensor, and their checksum is computed on the way.
    fn floats(
        &self,
        file: &dyn Content,
        skip: usize,
        count: usize,
    ) -> Result<(Tensor, bool), String> {
        check(file, &self.at)?;
        let start = self.at.start + skip;
        let sums = Mutex::new(BTreeMap::new());
        let read = |at: usize, to: &mut [u8]| {
            file.read_at(start + at, to)?;
            if self.crc.is_some() {
                let mut sum = Hasher::new();
                sum.update(to);
                sums.lock().unwrap_or_else(PoisonError::into_inner).insert(at, sum);
            }
            Ok(())
        };
        let read = read_f32(count, &read).map_err(|e| e.to_string())?;
        let read = read.map_err(|e| unreadable(&e))?;
        if self.crc.is_some() {
            let mut sum = sum(file, self.at.start..start)?;
            let sums = sums.into_inner().unwrap_or_else(PoisonError::into_inner);
            sums.values().for_each(|part| sum.combine(part));
            sum.combine(&self::sum(file, start + 4 * count..self.at.end)?);
            self.check_crc(sum.finalize())?;
        }
        Ok(read)
    }
}

/// Returns the checksum of the bytes of `at`.
fn sum(file: &dyn Content, at: Range<usize>) -> Result<Hasher, String> {
    let mut sum = Hasher::new();
    let mut part = [0; 1 << 12];
    let mut reader = reader(file, at);
    loop {
        match reader.read(&mut part).map_err(|e| unreadable(&e))? {
            0 => return Ok(sum),
            count => sum.update(&part[..count]),
        }
    }
}

/// The highest ratio by which deflate expands: a match of 258 bytes costs at least two bits.
const MAX_DEFLATE_RATIO: usize = 1032;

fn inflate(file: &dyn Content, at: &Range<usize>, size: usize) -> Result<Vec<u8>, String> {
    check(file, at)?;
    check_ratio(at.len(), size)?;
    let mut bytes = Vec::with_capacity(size + 1);
    // Reads one byte more than stated, so that a longer stream is noticed.
    DeflateDecoder::new(reader(file, at.clone()))
        .take(size as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| unreadable(&e))?;
    if bytes.len() != size {
        return Err(format!("it does not inflate to the stated {size} bytes"));
    }
    Ok(bytes)
}

/// Checks that `compressed` bytes can inflate to `size` bytes.
pub(super) fn check_ratio(compressed: usize, size: usize) -> Result<(), String> {
    if size / MAX_DEFLATE_RATIO > compressed {
        Err(format!("{compressed} bytes cannot inflate to {size}"))
    } else {
        Ok(())
    }
}

/// The position, dtype and shape of one tensor in a file.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) element: ElementType,
    pub(super) shape: Vec<i64>,
    /// Steps between elements along each dimension; `None` for row-major order.
    pub(super) strides: Option<Vec<i64>>,
    pub(super) stored: Stored,
    /// Byte offset of the first element within the stored bytes.
    pub(super) skip: usize,
    pub(super) big_endian: bool,
}

impl Entry {
    /// Checks that every element lies within the stored bytes, and that the tensor is no larger
    /// than they are. An expanded tensor, which repeats its elements, may be larger, up to the size
    /// to which a deflated file of `file_size` bytes can expand. Reading the tensor then allocates
    /// no more than the file justifies.
    ///
    /// Every entry of an index has passed this check. An entry whose element size is unknown passes
    /// unchecked, because it is never read.
    pub(super) fn check(&self, file_size: usize) -> Result<(), String> {
        let Some(element_size) = self.element.size() else { return Ok(()) };
        let available =
            self.stored.size().checked_sub(self.skip).ok_or("its data starts past its end")?;
        let bytes = |elements: Option<usize>, each: usize| elements?.checked_mul(each);
        let expanded = self.strides.as_ref().is_some_and(|strides| strides.contains(&0));
        let (needed, limit) = if expanded {
            // The elements become f32.
            let each = element_size.max(Kind::Float.elt_size_in_bytes());
            (bytes(numel(&self.shape), each), file_size.saturating_mul(MAX_DEFLATE_RATIO))
        } else {
            (bytes(numel(&self.shape), element_size), available)
        };
        let fits = |bytes: Option<usize>, limit: usize| bytes.is_some_and(|bytes| bytes <= limit);
        if fits(needed, limit) && fits(bytes(self.span(), element_size), available) {
            Ok(())
        } else {
            Err(format!("shape {:?} of {} needs more than {limit} bytes", self.shape, self.element))
        }
    }

    /// Returns the number of elements from the first to the last one in memory, both included.
    fn span(&self) -> Option<usize> {
        let numel = numel(&self.shape)?;
        let Some(strides) = &self.strides else { return Some(numel) };
        if numel == 0 {
            return Some(0);
        }
        self.shape.iter().zip(strides).try_fold(1usize, |span, (&dim, &stride)| {
            let steps = usize::try_from(dim - 1).ok()?;
            span.checked_add(steps.checked_mul(usize::try_from(stride).ok()?)?)
        })
    }

    /// Reads the tensor to the CPU in f32, and returns with it whether all its elements are known to
    /// be finite. Returns `None` if its dtype is not floating point.
    pub(super) fn read(&self, file: &dyn Content) -> Result<Option<(Tensor, bool)>, String> {
        let Some(kind) = self.element.kind() else { return Ok(None) };
        let (size, span) = (kind.elt_size_in_bytes(), self.span());
        // Checks the length once more, because libtorch copies the elements without a check.
        let end = span.and_then(|span| span.checked_mul(size)?.checked_add(self.skip));
        let (Some(span), Some(end)) = (span, end.filter(|&end| end <= self.stored.size())) else {
            return Err("its elements lie outside its bytes".into());
        };
        let is_swapped = self.big_endian != cfg!(target_endian = "big");
        let is_plain = self.stored.inflated.is_none() && !is_swapped;
        let (flat, finite) = if is_plain && kind == Kind::Float {
            self.stored.floats(file, self.skip, span)?
        } else {
            let stored = self.stored.bytes(file)?;
            let bytes = stored.get(self.skip..end).ok_or("its elements lie outside its bytes")?;
            let read =
                if is_swapped { to_f32(&swapped(bytes, size), kind) } else { to_f32(bytes, kind) };
            read.map_err(|e| e.to_string())?
        };
        let tensor = self.shaped(flat).map_err(|e| e.to_string())?;
        Ok(Some((tensor, finite)))
    }

    /// Returns the tensor whose elements, from the first to the last one in memory, are in `flat`.
    fn shaped(&self, flat: Tensor) -> Result<Tensor> {
        Ok(match &self.strides {
            None => flat.f_view(&self.shape[..])?,
            // Between its elements there may be others, which need not be finite.
            Some(strides) => flat.f_as_strided(&self.shape, strides, 0)?.f_contiguous()?,
        })
    }
}

fn swapped(bytes: &[u8], size: usize) -> Vec<u8> {
    bytes.chunks_exact(size).flat_map(|element| element.iter().rev().copied()).collect()
}

/// Returns the number of elements; `None` if a dimension is negative or the product of the
/// dimensions other than 0 overflows.
pub(super) fn numel(shape: &[i64]) -> Option<usize> {
    // A zero counts as one in the bound, because libtorch multiplies the other dimensions into
    // strides.
    let bound = shape
        .iter()
        .try_fold(1i64, |n, &dim| if dim < 0 { None } else { n.checked_mul(dim.max(1)) })?;
    if shape.contains(&0) { Some(0) } else { usize::try_from(bound).ok() }
}
