//! Finds the checkpoint in a folder.

use std::path::{Path, PathBuf};

use super::hub;
use crate::error::{Error, Result, list};

/// The file names that Hugging Face, timm and open_clip use for a checkpoint. The first one that
/// exists in a folder is used.
pub(super) const USUAL: [&str; 8] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "model.npz",
    "pytorch_model.pth",
];

/// The file extensions of checkpoints.
const ENDINGS: [&str; 5] = ["safetensors", "pth", "pt", "bin", "npz"];

/// Returns `path` if it is a file, and the path of the checkpoint in it if it is a folder. A name of
/// the Hugging Face hub, `hf:OWNER/NAME[@REVISION][:FILE]`, is fetched first.
///
/// # Errors
/// [`Error::UnknownFormat`] if the folder holds no checkpoint, or several of which none has a usual
/// name; [`Error::Hub`] if a name of the hub cannot be fetched.
pub(super) fn checkpoint_in(path: &Path) -> Result<PathBuf> {
    let fetched = hub::local(path)?;
    let path = fetched.as_deref().unwrap_or(path);
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    if let Some(found) = USUAL.iter().map(|name| path.join(name)).find(|file| file.is_file()) {
        return Ok(found);
    }
    let entries = std::fs::read_dir(path).map_err(Error::io(path))?;
    let mut files = Vec::new();
    for entry in entries {
        files.push(entry.map_err(Error::io(path))?.path());
    }
    files.sort();
    let is_checkpoint = |file: &&PathBuf| file.is_file() && is_named_as_checkpoint(file);
    let checkpoints: Vec<&PathBuf> = files.iter().filter(is_checkpoint).collect();
    match checkpoints[..] {
        [one] => Ok(one.clone()),
        [] => {
            Err(not_one(path, "a folder without a checkpoint", &files.iter().collect::<Vec<_>>()))
        }
        _ => {
            Err(not_one(path, "a folder with several checkpoints; name one of them", &checkpoints))
        }
    }
}

/// Returns whether a path ends as those of checkpoints do.
pub(super) fn is_named_as_checkpoint(path: &Path) -> bool {
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    ENDINGS.contains(&ending.as_str())
}

fn not_one(folder: &Path, what: &str, files: &[&PathBuf]) -> Error {
    let name =
        |file: &&PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let names: Vec<String> = files.iter().map(name).collect();
    let holds = if names.is_empty() { "nothing".to_owned() } else { list(&names) };
    let reason = format!("{what}; it holds {holds}");
    Error::UnknownFormat { file: folder.to_path_buf(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        folder
    }

    #[test]
    fn the_usual_name_comes_first_and_a_single_file_needs_none() {
        for (files, expected) in [
            (&["model.safetensors", "other.safetensors", "config.json"][..], "model.safetensors"),
            (&["ViT-B_16.npz", "config.json"][..], "ViT-B_16.npz"),
            (
                &["model.safetensors.index.json", "a.safetensors"][..],
                "model.safetensors.index.json",
            ),
        ] {
            let folder = folder_with(files);
            assert_eq!(checkpoint_in(folder.path()).unwrap(), folder.path().join(expected));
        }
    }

    #[test]
    fn a_folder_that_does_not_tell_says_what_it_holds() {
        for (files, expected) in [
            (&["config.json", "README.md"][..], "it holds README.md, config.json"),
            (&["a.pth", "b.pth"][..], "it holds a.pth, b.pth"),
            (&[][..], "it holds nothing"),
        ] {
            let error = checkpoint_in(folder_with(files).path()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
