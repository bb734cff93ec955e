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
/// The file must not be changed or cut short by anyone while it is mapped.
#[derive(Debug)]
pub(crate) struct FileMap(Mmap);

impl FileMap {
    /// Maps the regular file at `path`.
    ///
    /// # Errors
    /// An I/O error; also for a directory, a pipe or a device, which cannot be mapped as a whole.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        // Asked before opening: to open a pipe would block.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        // SAFETY: the map is private and read-only, and lives as long as the bytes lent from it.
        // What remains is another process that changes the file meanwhile. The readers check each
        // offset against the map and copy tensors out of it, so new bytes can give wrong numbers
        // or an error but no invalid value (every bit pattern of the element types is one); a
        // file cut short raises SIGBUS. No reader of a map can prevent that, so it is documented
        // as the caller's part.
        unsafe { Mmap::map(&file) }.map(FileMap)
    }

    /// Takes the pages of `range` out of the process's resident memory, where the system can. They
    /// stay in the page cache, and come back when they are read again.
    pub(crate) fn release(&self, range: &Range<usize>) {
        #[cfg(unix)]
        if !range.is_empty() && range.end <= self.len() {
            // SAFETY: the pages are a file's and were never written to, so what comes back on the
            // next read, from whichever thread, is the same bytes.
            let released = unsafe {
                self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
            };
            // Without it more memory counts as the process's own; that is all.
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
