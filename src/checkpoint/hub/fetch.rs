//! Downloads files of the hub into the cache.

use std::fs::{self, File};
use std::io::{self, IsTerminal};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};

use super::HubName;
use super::cache::{CONFIGS, HubCache, variable};
use crate::checkpoint::{folder, shards};
use crate::error::list;

/// How often a broken download is taken up again.
const RETRIES: usize = 3;

/// Downloads a checkpoint with the configs beside it, all from one commit, and returns its path in
/// the cache: that of the named file, or that of the snapshot.
pub(super) fn fetch(name: &HubName, cache: &HubCache) -> Result<PathBuf, String> {
    // The client asserts what a server answers.
    let fetched = catch_unwind(AssertUnwindSafe(|| fetch_all(name, cache)));
    fetched.unwrap_or_else(|_| Err("the server's answer could not be understood".to_owned()))
}

fn fetch_all(name: &HubName, cache: &HubCache) -> Result<PathBuf, String> {
    let api = api(cache).map_err(|error| explain(&error))?;
    let named = Repo::with_revision(name.repo.clone(), RepoType::Model, name.revision.clone());
    let info = api.repo(named.clone()).info().map_err(|error| explain(&error))?;
    let files: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let weights = weights(name, &files)?;
    // One commit, even if the branch moves on meanwhile.
    let commit = Repo::with_revision(name.repo.clone(), RepoType::Model, info.sha.clone());
    let repo = api.repo(commit.clone());
    let store = Cache::new(cache.path().to_path_buf());
    let get = |file: &str| match store.repo(commit.clone()).get(file) {
        Some(path) => Ok(path),
        None => download(&repo, file),
    };
    let beside = weights.rsplit_once('/').map_or("", |(folder, _)| folder);
    for config in CONFIGS {
        let config = join(beside, config);
        if files.contains(&config) {
            get(&config)?;
        }
    }
    let path = get(&weights)?;
    if shards::is_index(&path) {
        let (shards, _) = shards::read(&path).map_err(|error| error.to_string())?;
        for shard in shards {
            let shard = shard.file_name().unwrap_or_default().to_string_lossy().into_owned();
            get(&join(beside, &shard))?;
        }
    }
    // The name that was asked for leads to this commit from now on.
    let refs = store.repo(named).create_ref(&info.sha);
    refs.map_err(|error| format!("{}: {error}", cache.path().display()))?;
    match (&name.file, path.parent()) {
        (None, Some(snapshot)) => Ok(snapshot.to_path_buf()),
        _ => Ok(path),
    }
}

fn join(folder: &str, file: &str) -> String {
    if folder.is_empty() { file.to_owned() } else { format!("{folder}/{file}") }
}

/// Returns the file of the repository that holds the weights.
fn weights(name: &HubName, files: &[String]) -> Result<String, String> {
    if let Some(file) = &name.file {
        let found = files.contains(file);
        return found
            .then(|| file.clone())
            .ok_or_else(|| format!("the repository has no such file; it has {}", list(files)));
    }
    if let Some(usual) = folder::USUAL.iter().find(|usual| files.iter().any(|file| file == *usual))
    {
        return Ok((*usual).to_owned());
    }
    let named = files.iter().filter(|file| folder::is_named_as_checkpoint(Path::new(file)));
    match named.collect::<Vec<_>>()[..] {
        [one] => Ok(one.clone()),
        [] => Err(format!("the repository has no checkpoint; it has {}", list(files))),
        ref several => {
            let several: Vec<String> = several.iter().map(|&file| file.clone()).collect();
            Err(format!(
                "the repository has several checkpoints; add :FILE to choose of {}",
                list(&several)
            ))
        }
    }
}

/// Returns the client that the environment asks for.
fn api(cache: &HubCache) -> Result<Api, ApiError> {
    let store = Cache::new(cache.path().to_path_buf());
    let token_file = variable("HF_TOKEN_PATH").and_then(|path| fs::read_to_string(path).ok());
    let token = variable("HF_TOKEN").or(token_file).map(|token| token.trim().to_owned());
    let token = token.or_else(|| store.token());
    let endpoint = variable("HF_ENDPOINT");
    let mut builder = ApiBuilder::from_cache(store)
        .with_token(token)
        .with_retries(RETRIES)
        .with_progress(io::stderr().is_terminal())
        .with_user_agent("convpass", env!("CARGO_PKG_VERSION"));
    if let Some(endpoint) = endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    builder.build()
}

/// Downloads a file and compares it with the digest that the hub gives for large files.
fn download(repo: &ApiRepo, file: &str) -> Result<PathBuf, String> {
    let path = repo.download(file).map_err(|error| format!("{file}: {}", explain(&error)))?;
    let blob = fs::canonicalize(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let expected = blob.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if expected.len() != 64 {
        return Ok(path);
    }
    let found = sha256(&blob).map_err(|error| format!("{}: {error}", blob.display()))?;
    if found == expected {
        return Ok(path);
    }
    let removed = fs::remove_file(&path).and_then(|()| fs::remove_file(&blob));
    removed.map_err(|error| format!("{}: {error}", blob.display()))?;
    Err(format!("{file}: expected the SHA-256 {expected}, found {found}; the download was removed"))
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(format!("{:x}", hasher.finalize()))
}

/// Describes an error of the client with its causes, and says what helps.
fn explain(error: &ApiError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    let hint = if text.contains("status code 401") || text.contains("status code 403") {
        "; a private or gated repository needs a token in HF_TOKEN"
    } else if text.contains("status code 404") {
        "; the repository or the revision does not exist, or it is private"
    } else {
        ""
    };
    text + hint
}
