//! Reads and writes files; a written file is complete or does not exist.

use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// How the name of a file ends while it is written, here and in the library.
const UNFINISHED: &str = ".tmp";

/// Removes the temporary files that killed processes left in `folder`.
pub fn remove_unfinished(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        if name.starts_with(b".") && name.ends_with(UNFINISHED.as_bytes()) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Writes a temporary file in the folder of `path` and renames it, so that a reader sees the old
/// file or the new one. A link stays a link; a device or a pipe is an error, because the rename
/// would replace it.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let path = &target(path)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(".");
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix(&name).suffix(UNFINISHED);
        // A temporary file can be read by its owner alone; this one is for the user, and the umask
        // decides.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let mut file = builder.tempfile_in(folder.unwrap_or(Path::new(".")))?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(Error::io(path))
}

/// Returns the regular file that `path` leads to, or `path` itself if there is nothing yet.
fn target(path: &Path) -> std::io::Result<PathBuf> {
    match std::fs::metadata(path) {
        Ok(found) if found.is_file() => path.canonicalize(),
        Ok(_) => Err(std::io::Error::new(ErrorKind::InvalidInput, "not a regular file")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(path.to_path_buf()),
        Err(error) => Err(error),
    }
}

/// Reads a JSON file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|e| Error::corrupt(path, e.to_string()))
}

/// Writes `value` as JSON with [`write_atomically`].
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec(value).map_err(|e| Error::io(path)(e.into()))?;
    write_atomically(path, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_written_whole_and_a_missing_folder_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("values.json");
        write_json(&path, &[1, 2]).unwrap();
        assert_eq!(read_json::<Vec<i32>>(&path).unwrap(), [1, 2]);
        let nowhere = write_json(&folder.path().join("none/values.json"), &1).unwrap_err();
        assert!(matches!(nowhere, Error::Io { .. }));
        std::fs::write(&path, "[1").unwrap();
        assert!(matches!(read_json::<Vec<i32>>(&path), Err(Error::CorruptFile { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_stays_and_what_is_no_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("values.json"), folder.path().join("link.json"));
        std::fs::write(&file, "0").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        write_json(&link, &1).unwrap();
        assert!(link.is_symlink());
        assert_eq!(read_json::<i32>(&file).unwrap(), 1);
        assert!(matches!(write_json(Path::new("/dev/null"), &1), Err(Error::Io { .. })));
        assert!(matches!(write_json(folder.path(), &1), Err(Error::Io { .. })));
    }
}
