//! The cache that this crate shares with Hugging Face's Python library.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use super::HubName;
use crate::checkpoint::beside::PREPROCESSOR;
use crate::checkpoint::settings::{CONFIG, OPEN_CLIP_CONFIG};
use crate::checkpoint::{folder, shards};

/// Small files beside the weights that say how to read them.
pub(super) const CONFIGS: [&str; 3] = [CONFIG, PREPROCESSOR, OPEN_CLIP_CONFIG];

/// The folder of the cache: `models--OWNER--NAME` with `refs/REVISION`, `snapshots/COMMIT` and
/// `blobs`.
pub(super) struct HubCache {
    path: PathBuf,
}

/// Returns the value of an environment variable that is set and not empty.
pub(super) fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Returns whether `HF_HUB_OFFLINE` forbids the network.
pub(super) fn is_offline() -> bool {
    let value = variable("HF_HUB_OFFLINE").unwrap_or_default().to_uppercase();
    ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
}

impl HubCache {
    /// Returns the cache of the environment: `HF_HUB_CACHE`, `HF_HOME/hub`,
    /// `XDG_CACHE_HOME/huggingface/hub` or `~/.cache/huggingface/hub`.
    pub(super) fn from_env() -> Result<Self, String> {
        let home = || Some(PathBuf::from(variable("HOME")?).join(".cache"));
        let xdg = || variable("XDG_CACHE_HOME").map(PathBuf::from);
        let usual = || Some(xdg().or_else(home)?.join("huggingface"));
        let hub = || Some(variable("HF_HOME").map(PathBuf::from).or_else(usual)?.join("hub"));
        let path = variable("HF_HUB_CACHE").map(PathBuf::from).or_else(hub);
        let path = path.ok_or("no home directory for the cache; set HF_HOME")?;
        Ok(HubCache { path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of a checkpoint that the cache has as a whole: the file, or the snapshot
    /// with the weights and a config. Offline a snapshot without a config is whole too.
    pub(super) fn checkpoint(&self, name: &HubName) -> Option<PathBuf> {
        let snapshot = self.snapshot(name)?;
        let has_config = || CONFIGS.iter().any(|config| snapshot.join(config).is_file());
        if let Some(file) = &name.file {
            return Some(snapshot.join(file)).filter(|file| is_whole(file));
        }
        let weights = folder::checkpoint_in(&snapshot).ok()?;
        (is_whole(&weights) && (is_offline() || has_config())).then_some(snapshot)
    }

    /// Returns the folder of the commit that the cache has for a revision.
    fn snapshot(&self, name: &HubName) -> Option<PathBuf> {
        let repo = self.path.join(format!("models--{}", name.repo.replace('/', "--")));
        let commit = fs::read_to_string(repo.join("refs").join(&name.revision));
        let commit = commit.unwrap_or_else(|_| name.revision.clone());
        let snapshot = repo.join("snapshots").join(commit.trim());
        snapshot.is_dir().then_some(snapshot)
    }
}

/// Returns whether a file exists and, if it is an index, all of its shards do.
fn is_whole(file: &Path) -> bool {
    let shards_exist = || match shards::read(file) {
        Ok((shards, _)) => shards.iter().all(|shard| shard.is_file()),
        Err(_) => false,
    };
    file.is_file() && (!shards::is_index(file) || shards_exist())
}
