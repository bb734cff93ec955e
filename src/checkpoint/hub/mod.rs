//! Checkpoints of the Hugging Face hub, named `hf:OWNER/NAME[@REVISION][:FILE]`.

#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod fetch;

#[cfg(feature = "hub")]
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
#[cfg(feature = "hub")]
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// How the name of a checkpoint on the hub begins.
const SCHEME: &str = "hf:";

/// The name of a checkpoint on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "hub"), expect(dead_code, reason = "only the feature `hub` reads it"))]
struct HubName {
    /// `OWNER/NAME`.
    repo: String,
    /// A branch, a tag or a commit.
    revision: String,
    /// A file of the repository; `None` means its one checkpoint.
    file: Option<String>,
}

impl FromStr for HubName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let error = |reason: &str| Error::Hub { name: text.to_owned(), reason: reason.to_owned() };
        let name = text.strip_prefix(SCHEME).ok_or_else(|| error("the name begins with hf:"))?;
        let (name, file) = match name.split_once(':') {
            Some((name, file)) => (name, Some(file)),
            None => (name, None),
        };
        let (repo, revision) = name.split_once('@').unwrap_or((name, "main"));
        let is_word = |word: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !word.is_empty() && !word.starts_with('.') && word.chars().all(allowed)
        };
        if repo.split('/').count() != 2 || !repo.split('/').all(is_word) {
            return Err(error("expected hf:OWNER/NAME, then @REVISION and :FILE if needed"));
        }
        if !revision.split('/').all(is_word) {
            return Err(error("the revision is not the name of a branch, a tag or a commit"));
        }
        if file.is_some_and(|file| !file.split('/').all(is_word)) {
            return Err(error("the file is not a path within the repository"));
        }
        Ok(HubName {
            repo: repo.to_owned(),
            revision: revision.to_owned(),
            file: file.map(str::to_owned),
        })
    }
}

/// Returns the local path of a checkpoint that is named `hf:..`, and `None` for every other path.
/// Files that the cache does not have are downloaded.
///
/// # Errors
/// [`Error::Hub`] if the name is malformed, the file cannot be fetched, or the crate was built
/// without the feature `hub`.
pub(super) fn local(path: &Path) -> Result<Option<PathBuf>> {
    let Some(text) = path.to_str().filter(|text| text.starts_with(SCHEME)) else {
        return Ok(None);
    };
    let name: HubName = text.parse()?;
    resolve(text, &name).map(Some)
}

#[cfg(not(feature = "hub"))]
fn resolve(text: &str, _: &HubName) -> Result<PathBuf> {
    let reason = "this program was built without the feature `hub` of convpass".to_owned();
    Err(Error::Hub { name: text.to_owned(), reason })
}

#[cfg(feature = "hub")]
fn resolve(text: &str, name: &HubName) -> Result<PathBuf> {
    // Opening a backbone reads its checkpoint more than once: a branch that moves on meanwhile must
    // not change it.
    static RESOLVED: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut resolved = RESOLVED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(path) = resolved.get(text).filter(|path| path.exists()) {
        return Ok(path.clone());
    }
    let path = find(name).map_err(|reason| Error::Hub { name: text.to_owned(), reason })?;
    resolved.insert(text.to_owned(), path.clone());
    Ok(path)
}

/// Returns the path of a checkpoint in the cache, and downloads it if the cache does not have it.
#[cfg(feature = "hub")]
fn find(name: &HubName) -> Result<PathBuf, String> {
    let cache = cache::HubCache::from_env()?;
    match cache.checkpoint(name) {
        Some(found) => Ok(found),
        None if cache::is_offline() => {
            let place = cache.path().display();
            Err(format!("HF_HUB_OFFLINE is set, and the cache {place} does not have it"))
        }
        None => fetch::fetch(name, &cache),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_all_their_parts() {
        for (text, repo, revision, file) in [
            ("hf:a/b", "a/b", "main", None),
            ("hf:timm/vit_s.dino@v1.0", "timm/vit_s.dino", "v1.0", None),
            ("hf:a/b:w/x.npz", "a/b", "main", Some("w/x.npz")),
            ("hf:a/b@refs/pr/3:x.pt", "a/b", "refs/pr/3", Some("x.pt")),
        ] {
            let name: HubName = text.parse().unwrap();
            let found = (&*name.repo, &*name.revision, name.file.as_deref());
            assert_eq!(found, (repo, revision, file));
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for text in [
            "hf:",
            "hf:a",
            "hf:a/b/c",
            "hf:/b",
            "hf:a/",
            "hf:a b/c",
            "hf:a/b@",
            "hf:a/b@..",
            "hf:a/..",
            "hf:a/b:",
            "hf:a/b:../x",
            "hf:a/b:/x",
            "hf:a/b:x//y",
            "hf:a/b:x?y",
            "hf:a/b@x y",
        ] {
            let error = text.parse::<HubName>().unwrap_err();
            assert!(matches!(&error, Error::Hub { name, .. } if name == text), "{text}: {error}");
        }
        assert!(local(Path::new("a/hf:b")).unwrap().is_none());
    }
}
