//! Read-only memory maps.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

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
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
