//! Writing files.

use std::ffi::OsString;
use std::fs::File;
#[cfg(feature = "data")]
use std::fs::FileType;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::error::{Error, Result};

/// How the name of a file ends while it is written.
const UNFINISHED: &str = ".tmp";

/// Writes beside `path` and renames over it, so that a reader sees the old file or the new one. A
/// link stays a link: the file that it leads to is replaced.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically_with(path, |file| file.write_all(bytes), || Ok(()))
}

/// Does the same as [`write_atomically`] with the bytes that `content` writes. `before` runs when
/// all bytes are on the disk and `path` still holds the old file.
pub(crate) fn write_atomically_with(
    path: &Path,
    content: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    before: impl FnOnce() -> std::io::Result<()>,
) -> Result<()> {
    let write = || {
        let path = &target(path)?;
        let start = unfinished_start(path);
        let mut builder = tempfile::Builder::new();
        builder.prefix(&start).suffix(UNFINISHED);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // The file is the user's, not a temporary one: the umask decides, as for any new file.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let mut file = builder.tempfile_in(folder(path))?;
        content(&mut file)?;
        file.as_file().sync_all()?;
        before()?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(Error::io(path))
}

/// Returns the file that `path` leads to through links.
///
/// # Errors
/// If it is a folder, a device or a pipe, which a rename would replace or fail on.
fn target(path: &Path) -> io::Result<PathBuf> {
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => {
            Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"))
        }
        Ok(_) => path.canonicalize(),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(path.to_path_buf()),
        Err(error) => Err(error),
    }
}

/// A regular file that is open for reading at any offset, from any thread.
#[derive(Debug)]
pub(crate) struct OpenFile {
    file: File,
    len: usize,
    modified: Option<SystemTime>,
}

impl OpenFile {
    /// Opens the regular file at `path`.
    ///
    /// # Errors
    /// Returns an I/O error if the file cannot be opened, and for a directory, a pipe or a device,
    /// which have no size.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let not_regular = || io::Error::new(ErrorKind::InvalidInput, "not a regular file");
        // The check comes before the file is opened, because opening a pipe would block.
        if !std::fs::metadata(path)?.is_file() {
            return Err(not_regular());
        }
        let file = File::open(path)?;
        let found = file.metadata()?;
        let len = usize::try_from(found.len()).map_err(|_| not_regular())?;
        Ok(OpenFile { file, len, modified: found.modified().ok() })
    }

    /// Returns the size of the file when it was opened, in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Fills `to` with the bytes from the offset `at` on.
    ///
    /// # Errors
    /// [`ErrorKind::UnexpectedEof`] if the file ends before; the errors of the system.
    pub(crate) fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        #[cfg(unix)]
        return std::os::unix::fs::FileExt::read_exact_at(&self.file, to, at);
        #[cfg(windows)]
        {
            let mut done = 0;
            while done < to.len() {
                use std::os::windows::fs::FileExt;
                match self.file.seek_read(&mut to[done..], at + done as u64)? {
                    0 => return Err(ErrorKind::UnexpectedEof.into()),
                    count => done += count,
                }
            }
            Ok(())
        }
    }

    /// Returns whether the file still has the size and the time of its last change that it had when
    /// it was opened. A file that was replaced under its name is unchanged here: the old one stays
    /// open.
    ///
    /// # Errors
    /// The errors of the system.
    pub(crate) fn is_unchanged(&self) -> io::Result<bool> {
        let found = self.file.metadata()?;
        Ok(found.len() == self.len as u64 && found.modified().ok() == self.modified)
    }
}

/// Opens a regular file to read it. To open a pipe would wait for a writer, and a device may have no
/// end.
///
/// # Errors
/// [`Error::Io`] if the file cannot be opened; [`Error::NotAFile`] if it is neither a regular file
/// nor a folder, whose error is that of the system.
#[cfg(feature = "data")]
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    let found = std::fs::metadata(path).map_err(Error::io(path))?.file_type();
    if found.is_file() || found.is_dir() {
        return File::open(path).map_err(Error::io(path));
    }
    Err(Error::NotAFile { path: path.to_path_buf(), found: kind(found) })
}

/// Returns what a path leads to that is no regular file.
#[cfg(feature = "data")]
fn kind(found: FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if found.is_fifo() {
            return "a pipe";
        }
        if found.is_socket() {
            return "a socket";
        }
        if found.is_char_device() || found.is_block_device() {
            return "a device";
        }
    }
    let _elsewhere = found;
    "something else"
}

/// Reads a JSON file.
#[cfg(feature = "train")]
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|e| Error::corrupt(path, e.to_string()))
}

/// Removes the temporary files that [`write_atomically`] left beside `path` in killed processes.
#[cfg(feature = "train")]
pub(crate) fn remove_unfinished(path: &Path) -> Result<()> {
    let start = unfinished_start(path);
    let is_one = |name: &OsString| {
        let (name, start) = (name.as_encoded_bytes(), start.as_encoded_bytes());
        name.starts_with(start) && name.ends_with(UNFINISHED.as_bytes())
    };
    let remove = || {
        for file in std::fs::read_dir(folder(path))? {
            let file = file?;
            if is_one(&file.file_name()) {
                std::fs::remove_file(file.path())?;
            }
        }
        Ok(())
    };
    remove().map_err(Error::io(path))
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Returns the start of the name of the temporary file for `path`.
fn unfinished_start(path: &Path) -> OsString {
    let mut start = OsString::from(".");
    start.push(path.file_name().unwrap_or_default());
    start.push(".");
    start
}
