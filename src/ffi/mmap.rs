//! Read-only memory maps.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;

/// A whole file, mapped read-only.
///
/// No one may change or truncate the file while it is mapped.
#[derive(Debug)]
pub(crate) struct FileMap(Mmap);

impl FileMap {
    /// Maps the regular file at `path`.
    ///
    /// # Errors
    /// Returns an I/O error if the file cannot be opened or mapped, and for a directory, a pipe or
    /// a device, because these cannot be mapped as a whole.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        // The check comes before the file is opened, because opening a pipe would block.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        // SAFETY: the map is private and read-only, and it lives as long as the bytes borrowed from
        // it. The remaining risk is that another process changes the file while it is mapped. The
        // readers check each offset against the map and copy tensors out of it, so changed bytes
        // can give wrong numbers or an error, but no invalid value: every bit pattern of the
        // element types is valid. A truncated file raises SIGBUS. No reader of a map can prevent
        // that, so the docs make it the caller's responsibility.
        unsafe { Mmap::map(&file) }.map(FileMap)
    }

    /// Removes the pages of `range` from the resident memory of the process, on systems that
    /// support it. The pages stay in the page cache and are mapped again at the next read.
    pub(crate) fn release(&self, range: &Range<usize>) {
        #[cfg(unix)]
        if !range.is_empty() && range.end <= self.len() {
            // SAFETY: the pages belong to a file and were never written to, so the next read, from
            // any thread, returns the same bytes.
            let released = unsafe {
                self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
            };
            // A failure has no effect except that the process keeps these pages in its resident
            // memory.
            drop(released);
        }
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_released_reads_the_same_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let bytes: Vec<u8> = (0..50_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = FileMap::open(&path).unwrap();
        for range in [0..50_000, 5000..5001, 4096..8192, 7..7, 49_999..60_000, 60_000..70_000] {
            assert_eq!(*map, *bytes);
            map.release(&range);
        }
        assert_eq!(*map, *bytes);
    }
}
