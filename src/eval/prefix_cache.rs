//! What leaves the frozen blocks of a model, computed once for each image of a dataset.

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

/// Where that is kept, `[N, T, C]` for N images.
///
/// For ViT-B/16 at 224x224 an image takes 605 kB in f32. Tokens computed in a batch of other images
/// may differ in the last bit from those of a pass over whole images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrefixCache {
    /// A folder for files that are memory-mapped and that later runs find again: of the same
    /// backbone, blocks, pixels, normalization and kind, autocast's too. In memory if none.
    pub folder: Option<PathBuf>,
    /// Keeps tokens in bf16: half the size, and rounded. Else as the backbone computes them.
    pub bf16: bool,
}

/// The tokens of a dataset.
#[derive(Debug)]
pub(crate) struct Prefix {
    /// `[N, T, C]` on the CPU.
    tokens: Tensor,
    layout: TokenLayout,
    /// That the backbone computes in.
    kind: Kind,
}

impl Prefix {
    /// Computes the tokens of every image, or finds them. `None` if `watch`, which is told how many
    /// images are done of how many, ends the work; nothing is left of it then.
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

    /// Those of some images, on `device`.
    pub(crate) fn select(&self, index: &Tensor, device: Device) -> Result<Tensor> {
        let tokens = self.tokens.f_index_select(0, &index.f_to_device(Device::Cpu)?)?;
        Ok(tokens.f_to_device(device)?.f_to_kind(self.kind)?)
    }

    /// What [`Prefix::select`] gave, for a pass.
    pub(crate) fn stream(&self, tokens: &Tensor) -> Stream {
        Stream { tokens: tokens.shallow_clone(), layout: self.layout }
    }
}

/// Tokens that are being computed.
struct Store {
    tokens: Tensor,
    /// The file under its temporary name, and its own.
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

    /// The tokens; a file gets its own name, and is whole.
    fn finish(self) -> Result<Tensor> {
        if let Some((file, path)) = self.file {
            file.persist(&path).map_err(|e| Error::io(&path)(e.error))?;
        }
        Ok(self.tokens)
    }
}

/// The tokens that an earlier run left at `path`.
fn find(path: &Path, shape: &[i64], kind: Kind) -> Result<Option<Tensor>> {
    let expected = shape.iter().product::<i64>() as u64 * kind.elt_size_in_bytes() as u64;
    match std::fs::metadata(path) {
        Ok(file) if file.is_file() && file.len() == expected => {
            map(path, shape, kind, false).map(Some)
        }
        _ => Ok(None),
    }
}

/// The bytes of a file as a tensor. Writing to a `shared` one writes to the file, which grows to
/// the size of the tensor.
fn map(path: &Path, shape: &[i64], kind: Kind, shared: bool) -> Result<Tensor> {
    let Some(name) = path.to_str() else {
        return Err(Error::config("folder", "a path in UTF-8", path.display()));
    };
    let count = shape.iter().product::<i64>();
    let flat = Tensor::f_from_file(name, shared, count, (kind, Device::Cpu))?;
    Ok(flat.f_view(shape)?)
}

/// The name of the file for these tokens: of all that they depend on.
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
