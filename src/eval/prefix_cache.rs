//! The tokens behind the frozen blocks of a model, computed once for each image of a dataset.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};
use tempfile::TempPath;

use crate::backbone::{Backbone, Stream};
use crate::data::{BatchConfig, Batches, ImageDataset, Order, PartialBatch};
use crate::error::{Error, Result};
use crate::ffi::autocast::Autocast;
use crate::model::PetlModel;
use crate::seam::TokenLayout;

/// Where and in which dtype the tokens behind the frozen blocks are kept, `[N, T, C]` for N images.
///
/// For ViT-B/16 at 224x224, an image takes 605 kB in f32. Cached tokens are computed in other
/// batches than those of a pass over the images, so they may differ from it in the last bit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrefixCache {
    /// The folder of the cache files, which are memory-mapped. A later run uses a file again if it
    /// has the same backbone, frozen blocks, pixels, normalization, dtype and autocast dtype. If
    /// `None`, the tokens are kept in memory.
    pub folder: Option<PathBuf>,
    /// Keeps the tokens rounded to bf16, which halves their size compared to f32. If `false`, they
    /// keep the dtype that the backbone computes in.
    pub bf16: bool,
}

/// The tokens behind the frozen blocks, for every image of a dataset.
#[derive(Debug)]
pub(crate) struct Prefix {
    /// `[N, T, C]` on the CPU.
    tokens: Tensor,
    layout: TokenLayout,
    /// The dtype that the backbone computes in.
    kind: Kind,
}

impl Prefix {
    /// Computes the tokens of every image, or opens the file in which an earlier run left them.
    ///
    /// `watch` is called with the number of processed images and the number of all images. If it
    /// returns `Break`, the result is `None` and no file is left behind.
    pub(crate) fn new<B: Backbone>(
        model: &PetlModel<B>,
        dataset: &ImageDataset,
        config: BatchConfig,
        cache: &PrefixCache,
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
        let store = Store::new(path, &shape, kind)?;
        let mut done = 0;
        for batch in Batches::new(dataset, config)? {
            let tokens = model.frozen_prefix(&batch?.0)?.tokens;
            store.tokens.f_narrow(0, done, tokens.size()[0])?.f_copy_(&tokens)?;
            done += tokens.size()[0];
            if watch(done as usize, dataset.len()).is_break() {
                return Ok(None);
            }
        }
        Ok(Some(Prefix { tokens: store.finish()?, layout, kind: own }))
    }

    /// Returns the tokens of the images `index` on `device`, in the dtype that the backbone
    /// computes in.
    pub(crate) fn select(&self, index: &Tensor, device: Device) -> Result<Tensor> {
        let tokens = self.tokens.f_index_select(0, &index.f_to_device(Device::Cpu)?)?;
        Ok(tokens.f_to_device(device)?.f_to_kind(self.kind)?)
    }

    /// Wraps tokens from [`Prefix::select`] as the input of the first block that is not frozen.
    pub(crate) fn stream(&self, tokens: &Tensor) -> Stream {
        Stream { tokens: tokens.shallow_clone(), layout: self.layout }
    }
}

/// The output buffer of tokens that are being computed: in memory, or a memory-mapped file.
struct Store {
    tokens: Tensor,
    /// The file under its temporary name, and its final path.
    file: Option<(TempPath, PathBuf)>,
}

impl Store {
    fn new(path: Option<PathBuf>, shape: &[i64], kind: Kind) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Store { tokens: Tensor::f_empty(shape, (kind, Device::Cpu))?, file: None });
        };
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let file = tempfile::NamedTempFile::new_in(folder).map_err(Error::io(folder))?;
        let tokens = map(file.path(), shape, kind, true)?;
        Ok(Store { tokens, file: Some((file.into_temp_path(), path)) })
    }

    /// Renames a complete file to its final path and returns the tokens.
    fn finish(self) -> Result<Tensor> {
        if let Some((file, path)) = self.file {
            file.persist(&path).map_err(|e| Error::io(&path)(e.error))?;
        }
        Ok(self.tokens)
    }
}

/// Returns the tokens that an earlier run left at `path`; `None` if there is no file of the right
/// size.
fn find(path: &Path, shape: &[i64], kind: Kind) -> Result<Option<Tensor>> {
    let expected = shape.iter().product::<i64>() as u64 * kind.elt_size_in_bytes() as u64;
    match std::fs::metadata(path) {
        Ok(file) if file.is_file() && file.len() == expected => {
            map(path, shape, kind, false).map(Some)
        }
        _ => Ok(None),
    }
}

/// Maps a file into memory as a tensor. If `shared`, the file grows to the size of the tensor, and
/// writing to the tensor writes to the file.
fn map(path: &Path, shape: &[i64], kind: Kind, shared: bool) -> Result<Tensor> {
    let Some(name) = path.to_str() else {
        return Err(Error::config("folder", "a path in UTF-8", path.display()));
    };
    let count = shape.iter().product::<i64>();
    let flat = Tensor::f_from_file(name, shared, count, (kind, Device::Cpu))?;
    Ok(flat.f_view(shape)?)
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
    let what = format!("1 {backbone} {blocks:?} {kind:?} {shape:?} {}\n", config.normalization);
    hash.update(what);
    if let Some(kind) = Autocast::active(model.backbone().device())? {
        hash.update(format!("autocast {kind}\n"));
    }
    for index in 0..dataset.len() {
        hash.update(dataset.pixels(index)?);
    }
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("prefix-{hex}.tokens"))
}
