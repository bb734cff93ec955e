//! Writing files.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};

/// How the name of a file ends while it is written.
const UNFINISHED: &str = ".tmp";

/// Writes beside `path` and renames over it, so that a reader sees the old file or the new one.
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

/// A JSON file's content.
#[cfg(feature = "train")]
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|e| Error::corrupt(path, e.to_string()))
}

/// Removes what [`write_atomically`] left beside `path` in a process that was killed.
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

/// How the name of the file begins that becomes `path`.
fn unfinished_start(path: &Path) -> OsString {
    let mut start = OsString::from(".");
    start.push(path.file_name().unwrap_or_default());
    start.push(".");
    start
}
