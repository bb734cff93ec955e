//! The tokens behind the frozen blocks of a model, computed once for each image of a dataset.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use fs4::fs_std::FileExt;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};
use tempfile::{Builder, NamedTempFile};

use crate::backbone::{Backbone, Stream};
use crate::data::{BatchConfig, Batches, ImageDataset, Order, PartialBatch};
use crate::error::{Error, Result};
use crate::ffi::autocast::Autocast;
use crate::ffi::send;
use crate::files::OpenFile;
use crate::model::{Bytes, PetlModel};
use crate::seam::TokenLayout;

/// Where and in which dtype the tokens behind the frozen blocks are kept, `[N, T, C]` for N images.
///
/// For ViT-B/16 at 224x224, an image takes 605 kB in f32. Cached tokens are computed in other
/// batches than those of a pass over the images, so they may differ from it in the last bit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrefixCache {
    /// The folder of the cache files. A batch reads the tokens of its images from there. A later run
    /// uses a file again if it has the same backbone, frozen blocks, pixels, normalization, dtype
    /// and autocast dtype. If `None`, the tokens are kept in memory.
    pub folder: Option<PathBuf>,
    /// Keeps the tokens rounded to bf16, which halves their size compared to f32. If `false`, they
    /// keep the dtype that the backbone computes in.
    pub bf16: bool,
}

/// The tokens behind the frozen blocks, for every image of a dataset.
#[derive(Debug)]
pub(crate) struct Prefix {
    tokens: Tokens,
    layout: TokenLayout,
    /// The dtype that the backbone computes in.
    kind: Kind,
}

impl Prefix {
    /// Computes the tokens of every image, or opens the file in which an earlier run left them.
    ///
    /// `watch` is called with the number of processed images and the number of all images. If it
    /// returns `Break`, the result is `None` and no file is left behind. A process that does not
    /// write keeps tokens that it does not find in memory.
    pub(crate) fn new<B: Backbone>(
        model: &PetlModel<B>,
        dataset: &ImageDataset,
        config: BatchConfig,
        cache: &PrefixCache,
        writes: bool,
        watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<Self>> {
        let own = model.backbone().compute_kind();
        let kind = if cache.bf16 { Kind::BFloat16 } else { own };
        let config =
            BatchConfig { partial: PartialBatch::Keep, order: Order::Sequential, ..config };
        let Some(one) = Batches::new(dataset, BatchConfig { batch_size: 1, ..config })?.next()
        else {
            return Err(Error::config("dataset", "at least one image", 0));
        };
        let one = model.frozen_prefix(&one?.0)?;
        let (mut shape, layout) = (one.tokens.size(), one.layout);
        shape[0] = dataset.len() as i64;
        let path = match &cache.folder {
            Some(folder) => Some(folder.join(file_name(model, dataset, config, kind, &shape)?)),
            None => None,
        };
        if let Some(tokens) = path.as_deref().map(|p| find(p, &shape, kind)).transpose()?.flatten()
        {
            return Ok(Some(Prefix { tokens, layout, kind: own }));
        }
        let mut store = Store::new(path.filter(|_| writes), &shape, kind)?;
        let mut done = 0;
        for batch in Batches::new(dataset, config)? {
            let tokens = model.frozen_prefix(&batch?.0)?.tokens.f_to_kind(kind)?;
            store.push(done, &tokens)?;
            done += tokens.size()[0];
            if watch(done as usize, dataset.len()).is_break() {
                return Ok(None);
            }
        }
        Ok(Some(Prefix { tokens: store.finish(&shape, kind)?, layout, kind: own }))
    }

    /// Returns the tokens of the images `index`, a tensor on the CPU, on `device`, in the dtype that
    /// the backbone computes in.
    pub(crate) fn select(&self, index: &Tensor, device: Device) -> Result<Tensor> {
        let tokens = self.tokens.select(index)?;
        Ok(send(&tokens, device)?.f_to_kind(self.kind)?)
    }

    /// Wraps tokens from [`Prefix::select`] as the input of the first block that is not frozen.
    pub(crate) fn stream(&self, tokens: &Tensor) -> Stream {
        Stream { tokens: tokens.shallow_clone(), layout: self.layout }
    }
}

/// Tokens `[N, T, C]` of N images.
#[derive(Debug)]
enum Tokens {
    /// On the CPU.
    Memory(Tensor),
    File(KeptTokens),
}

impl Tokens {
    /// Returns the tokens of the images `index`, `[B, T, C]` on the CPU.
    fn select(&self, index: &Tensor) -> Result<Tensor> {
        match self {
            Tokens::Memory(tokens) => Ok(tokens.f_index_select(0, index)?),
            Tokens::File(kept) => kept.select(index),
        }
    }
}

/// A complete file of tokens. It is read and not mapped: if another process cuts it, that is an
/// error and not the end of this process.
#[derive(Debug)]
struct KeptTokens {
    file: OpenFile,
    path: PathBuf,
    shape: Vec<i64>,
    kind: Kind,
}

impl KeptTokens {
    fn open(path: &Path, shape: &[i64], kind: Kind) -> Result<Self> {
        let file = OpenFile::open(path).map_err(Error::io(path))?;
        Ok(KeptTokens { file, path: path.to_path_buf(), shape: shape.to_vec(), kind })
    }

    fn select(&self, index: &Tensor) -> Result<Tensor> {
        let index = Vec::<i64>::try_from(index)?;
        let size = bytes(&self.shape[1..], self.kind) as usize;
        let mut selected = vec![0; index.len() * size];
        for (image, to) in index.iter().zip(selected.chunks_exact_mut(size.max(1))) {
            let at = (*image as u64).saturating_mul(size as u64);
            self.file.read_at(at, to).map_err(|e| self.unread(e))?;
        }
        if !self.file.is_unchanged().map_err(Error::io(&self.path))? {
            return Err(self.unread(ErrorKind::UnexpectedEof.into()));
        }
        let mut shape = self.shape.clone();
        shape[0] = index.len() as i64;
        Ok(Tensor::f_from_data_size(&selected, &shape, self.kind)?)
    }

    /// Returns the error for tokens that were in the file when it was opened.
    fn unread(&self, error: io::Error) -> Error {
        if error.kind() == ErrorKind::UnexpectedEof {
            Error::corrupt(&self.path, "it was cut or written to while it was open")
        } else {
            Error::io(&self.path)(error)
        }
    }
}

/// Returns the number of bytes of a tensor.
fn bytes(shape: &[i64], kind: Kind) -> u64 {
    shape.iter().product::<i64>() as u64 * kind.elt_size_in_bytes() as u64
}

/// The output buffer of tokens that are being computed.
enum Store {
    Memory(Tensor),
    File(TokenFile),
}

/// A file of tokens that is being written under a temporary name.
struct TokenFile {
    file: NamedTempFile,
    /// The final path.
    path: PathBuf,
    digest: Sha256,
}

impl Store {
    fn new(path: Option<PathBuf>, shape: &[i64], kind: Kind) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Store::Memory(Tensor::f_empty(shape, (kind, Device::Cpu))?));
        };
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        remove_abandoned(folder);
        let file = Builder::new().prefix(PREFIX).suffix(UNFINISHED).tempfile_in(folder);
        let file = file.map_err(Error::io(folder))?;
        // Tells other processes that the file is being written.
        let _locked = file.as_file().try_lock_exclusive().map_err(Error::io(folder))?;
        Ok(Store::File(TokenFile { file, path, digest: Sha256::new() }))
    }

    /// Appends the tokens of the images after the first `done`.
    fn push(&mut self, done: i64, tokens: &Tensor) -> Result<()> {
        match self {
            Store::Memory(all) => all.f_narrow(0, done, tokens.size()[0])?.f_copy_(tokens)?,
            Store::File(TokenFile { file, path, digest }) => {
                let bytes = Bytes::of(tokens)?.data;
                digest.update(&bytes);
                return file.write_all(&bytes).map_err(Error::io(path));
            }
        };
        Ok(())
    }

    /// Returns the tokens. A complete file gets its digest and its final path.
    fn finish(self, shape: &[i64], kind: Kind) -> Result<Tokens> {
        let TokenFile { mut file, path, digest } = match self {
            Store::Memory(tokens) => return Ok(Tokens::Memory(tokens)),
            Store::File(file) => file,
        };
        let persist = || {
            file.write_all(&digest.finalize())?;
            file.as_file().sync_all()
        };
        persist().map_err(Error::io(&path))?;
        file.persist(&path).map_err(|e| Error::io(&path)(e.error))?;
        KeptTokens::open(&path, shape, kind).map(Tokens::File)
    }
}

/// How the name of a cache file begins.
const PREFIX: &str = "prefix-";
/// How the name of a cache file ends while it is written.
const UNFINISHED: &str = ".tmp";
/// Number of bytes of the digest behind the tokens.
const DIGEST_BYTES: u64 = 32;

/// Removes the files that killed processes left in `folder`. Their locks ended with the processes.
/// A file that cannot be removed is left there, as it does no harm.
fn remove_abandoned(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(PREFIX)
            && name.ends_with(UNFINISHED)
            && let Ok(file) = File::open(entry.path())
            && file.try_lock_exclusive().unwrap_or(false)
        {
            let _left_if_it_fails = std::fs::remove_file(entry.path());
        }
    }
}

/// Returns the tokens that an earlier run left at `path`; `None` if there is no readable file of
/// the right size whose digest is that of its tokens.
fn find(path: &Path, shape: &[i64], kind: Kind) -> Result<Option<Tokens>> {
    let tokens = bytes(shape, kind);
    let is_complete = || -> std::io::Result<bool> {
        let found = std::fs::metadata(path)?;
        if !found.is_file() || found.len() != tokens + DIGEST_BYTES {
            return Ok(false);
        }
        let (mut file, mut digest) = (File::open(path)?, Sha256::new());
        std::io::copy(&mut (&mut file).take(tokens), &mut digest)?;
        let mut kept = Vec::new();
        file.read_to_end(&mut kept)?;
        Ok(kept == digest.finalize().as_slice())
    };
    if is_complete().unwrap_or(false) {
        KeptTokens::open(path, shape, kind).map(|kept| Some(Tokens::File(kept)))
    } else {
        Ok(None)
    }
}

/// Returns the name of the cache file: a hash of everything that the tokens depend on.
fn file_name<B: Backbone>(
    model: &PetlModel<B>,
    dataset: &ImageDataset,
    config: BatchConfig,
    kind: Kind,
    shape: &[i64],
) -> Result<String> {
    let mut hash = Sha256::new();
    let (backbone, blocks) = (model.backbone().digest()?, model.frozen_blocks());
    let what = format!("2 {backbone} {blocks:?} {kind:?} {shape:?} {}\n", config.normalization);
    hash.update(what);
    if let Some(kind) = Autocast::name(model.backbone().device())? {
        hash.update(format!("autocast {kind}\n"));
    }
    for index in 0..dataset.len() {
        hash.update(dataset.pixels(index)?);
    }
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{PREFIX}{hex}.tokens"))
}
