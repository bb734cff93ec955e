//! Reads the named tensors of a checkpoint from any container and from one or several files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use super::content::{Content, start};
use super::entry::{ElementType, Entry};
use super::pickle::PickleError;
use super::{folder, npy, npz, safetensors, shards, torch_legacy, torch_zip, zip_index};
use crate::error::{Error, Result, list};
use crate::files::OpenFile;

/// The file format of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Container {
    /// A `.safetensors` file.
    Safetensors,
    /// A `.npz` file: a zip archive of NumPy arrays, stored or deflated.
    Npz,
    /// The format of `torch.save` since PyTorch 1.6: a zip archive of a pickle and its storages.
    Torch,
    /// The format of `torch.save` before PyTorch 1.6: pickles, followed by the storages.
    TorchLegacy,
}

/// The named tensors of a checkpoint, which is one file or the shards that an index lists.
///
/// Opening reads only the indexes of the files, which stay open; [`TensorFile::tensor`] reads one
/// tensor. A file that is written to or cut in the meantime is an error, because its tensors may be
/// parts of two models. A file that is replaced or removed under its name may still be read: it is
/// the old one.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    container: Container,
    metadata: BTreeMap<String, String>,
    /// The single file, or all shards.
    files: Vec<OneFile>,
    /// For each tensor, the number of the file that holds it.
    places: BTreeMap<String, usize>,
}

/// One file of a checkpoint.
#[derive(Debug)]
struct OneFile {
    path: PathBuf,
    content: OpenFile,
    index: Index,
}

/// The entries and the metadata of one file.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) entries: BTreeMap<String, Entry>,
    pub(super) metadata: BTreeMap<String, String>,
    /// The keys from the outermost dict of a pickle to the state dict; empty for other containers.
    pub(super) keys: Vec<String>,
}

impl TensorFile {
    /// Opens a checkpoint and reads its index.
    ///
    /// `path` is a file, a folder that holds one checkpoint (Hugging Face's `model.safetensors` is
    /// preferred), or an index of shards (`model.safetensors.index.json`). With the feature `hub` it
    /// may be `hf:OWNER/NAME[@REVISION][:FILE]`, which names a checkpoint on the Hugging Face hub.
    /// The content of a file determines its container; its name does not matter. No code in a pickle
    /// is run. In a training checkpoint, the tensors are those of the one state dict in it, below any
    /// keys.
    ///
    /// # Errors
    /// [`Error::Io`] if the file does not exist or is not a regular file; [`Error::UnknownFormat`]
    /// if the file is not in a supported container, or if a folder does not hold exactly one
    /// checkpoint, or a pickle not exactly one state dict; [`Error::Hub`] if a checkpoint of the hub
    /// cannot be fetched; [`Error::CorruptFile`] if an index does not match its files;
    /// [`Error::PickleGlobal`] if a pickle holds an object of another class in place of a state dict.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = folder::checkpoint_in(path.as_ref())?;
        if shards::is_index(&path) { Self::open_shards(path) } else { Self::open_file(path) }
    }

    /// Opens one file. A folder is an error.
    ///
    /// # Errors
    /// The errors of [`TensorFile::open`].
    pub(crate) fn open_file(path: PathBuf) -> Result<Self> {
        let (container, file) = OneFile::open(path.clone())?;
        let places = file.index.entries.keys().map(|name| (name.clone(), 0)).collect();
        let metadata = file.index.metadata.clone();
        Ok(TensorFile { path, container, metadata, files: vec![file], places })
    }

    /// Opens all shards that the index at `path` lists.
    fn open_shards(path: PathBuf) -> Result<Self> {
        let (shards, places) = shards::read(&path)?;
        let mut files = Vec::with_capacity(shards.len());
        let mut container = Container::Safetensors;
        for shard in shards {
            let (found, file) = OneFile::open(shard)?;
            container = found;
            files.push(file);
        }
        let found: BTreeMap<&String, usize> = (files.iter().enumerate())
            .flat_map(|(number, file)| file.index.entries.keys().map(move |name| (name, number)))
            .collect();
        for (name, number) in &places {
            if found.get(name) != Some(number) {
                let shard = files[*number].path.display();
                return Err(Error::corrupt(&path, format!("{shard} does not hold {name}")));
            }
        }
        if let Some((name, number)) =
            found.into_iter().find(|(name, _)| !places.contains_key(*name))
        {
            let reason = format!("{name} of {} is not listed", files[number].path.display());
            return Err(Error::corrupt(&path, reason));
        }
        Ok(TensorFile { path, container, metadata: BTreeMap::new(), files, places })
    }

    /// Returns the path of the file or of the index of shards.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the container of the file.
    pub fn container(&self) -> Container {
        self.container
    }

    /// Returns the metadata strings of a safetensors file; empty for other containers and for
    /// shards.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Returns the keys from the outermost dict of a pickle to the state dict, such as `model`.
    pub(super) fn keys(&self) -> &[String] {
        self.files.first().map_or(&[], |file| &file.index.keys)
    }

    /// Returns the names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Returns whether there is a tensor with this name.
    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Returns the shape of a tensor, or `None` if there is no tensor with this name.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        let file = &self.files[*self.places.get(name)?];
        file.index.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Reads a tensor to the CPU, contiguous and in f32. The conversion is exact from f16 and bf16;
    /// f64 is rounded.
    ///
    /// # Errors
    /// [`Error::Input`] if no tensor has this name, [`Error::ElementType`] if its dtype is not
    /// floating point, [`Error::CorruptFile`] if its bytes do not inflate or do not match their
    /// checksum, or if the file was changed after it was opened.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        Ok(self.read(name)?.0)
    }

    /// Does the same as [`TensorFile::tensor`], and refuses a tensor of which an element is NaN or
    /// infinite.
    ///
    /// # Errors
    /// The errors of [`TensorFile::tensor`], and [`Error::NotFinite`].
    pub(crate) fn finite_tensor(&self, name: &str) -> Result<Tensor> {
        let (tensor, finite) = self.read(name)?;
        if !finite {
            check_finite(&self.path, name, &tensor)?;
        }
        Ok(tensor)
    }

    /// Reads a tensor, and returns with it whether all its elements are known to be finite.
    fn read(&self, name: &str) -> Result<(Tensor, bool)> {
        let file = self.file_of(name);
        let read = read_tensor(&file.path, &file.content, &file.index, name);
        file.check_unchanged()?;
        read
    }

    /// Reads the bytes of a u8 tensor in order.
    ///
    /// # Errors
    /// [`Error::Input`] if no tensor has this name, [`Error::CorruptFile`] if its dtype is not u8.
    pub(crate) fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let file = self.file_of(name);
        let entry = entry(&file.path, &file.index, name)?;
        let bytes = if entry.element == ElementType::Other("U8".to_owned(), None) {
            entry.stored.bytes(&file.content)
        } else {
            Err(format!("expected u8, found {}", entry.element))
        };
        file.check_unchanged()?;
        bytes.map_err(|reason| Error::corrupt(&file.path, format!("tensor {name}: {reason}")))
    }

    /// Returns the file that holds the tensor. If there is none, returns the first file; looking up
    /// the tensor in it then gives the error.
    fn file_of(&self, name: &str) -> &OneFile {
        &self.files[self.places.get(name).copied().unwrap_or_default()]
    }
}

/// Checks that no element of `tensor`, which is called `name` in `file`, is NaN or infinite. One
/// pass over the elements sums them; only a sum that is not finite needs another one.
///
/// # Errors
/// [`Error::NotFinite`] with the number of such elements.
pub(crate) fn check_finite(file: &Path, name: &str, tensor: &Tensor) -> Result<()> {
    if tensor.f_sum(Kind::Float)?.f_double_value(&[])?.is_finite() {
        return Ok(());
    }
    let finite = tensor.f_isfinite()?;
    let count = finite.f_logical_not()?.f_sum(Kind::Int64)?.f_int64_value(&[])?;
    if count == 0 {
        return Ok(());
    }
    Err(Error::NotFinite { file: file.to_path_buf(), name: name.to_owned(), count })
}

impl OneFile {
    fn open(path: PathBuf) -> Result<(Container, Self)> {
        let content = OpenFile::open(&path).map_err(Error::io(&path))?;
        let (container, index) = read_index(&path, &content)?;
        let file = OneFile { path, content, index };
        file.check_unchanged()?;
        Ok((container, file))
    }

    /// Checks that nothing was written to the file since it was opened.
    fn check_unchanged(&self) -> Result<()> {
        if self.content.is_unchanged().map_err(Error::io(&self.path))? {
            return Ok(());
        }
        let reason = "it was changed while it was open; open it again once it is complete";
        Err(Error::corrupt(&self.path, reason))
    }
}

/// The bytes at the start of a file that show its format.
const SIGNATURE: usize = 512;

/// Recognizes the container of `file`, reads its index and checks each entry.
pub(super) fn read_index(path: &Path, file: &dyn Content) -> Result<(Container, Index)> {
    let first = start(file, SIGNATURE).map_err(|reason| Error::corrupt(path, reason))?;
    let (container, index) = if zip_index::recognizes(&first) {
        read_zip(path, file)?
    } else if torch_legacy::recognizes(&first) {
        let index = torch_legacy::read(file).map_err(|error| refused(path, error))?;
        (Container::TorchLegacy, index)
    } else if safetensors::recognizes(&first) {
        let index = safetensors::read(file).map_err(|reason| Error::corrupt(path, reason))?;
        (Container::Safetensors, index)
    } else {
        return Err(unknown(path, what_else(&first)));
    };
    for (name, entry) in &index.entries {
        let in_tensor = |reason| Error::corrupt(path, format!("tensor {name}: {reason}"));
        entry.check(file.len()).map_err(in_tensor)?;
    }
    Ok((container, index))
}

fn read_zip(path: &Path, file: &dyn Content) -> Result<(Container, Index)> {
    let corrupt = |reason| Error::corrupt(path, reason);
    let zip = zip_index::read(file).map_err(corrupt)?;
    if let Some(folder) = torch_zip::recognizes(&zip) {
        let index = torch_zip::read(file, &zip, &folder).map_err(|error| refused(path, error))?;
        return Ok((Container::Torch, index));
    }
    if npz::recognizes(&zip) {
        return Ok((Container::Npz, npz::read(file, zip).map_err(corrupt)?));
    }
    Err(unknown(path, "a zip archive with neither .npy arrays nor a data.pkl"))
}

/// Returns the error for a pickle that is refused.
fn refused(path: &Path, error: PickleError) -> Error {
    match error {
        PickleError::Corrupt(reason) => Error::corrupt(path, reason),
        PickleError::Global(global) => Error::PickleGlobal { file: path.to_path_buf(), global },
        PickleError::NoTensors(keys) if keys.is_empty() => {
            unknown(path, "its pickle holds no tensor with a name")
        }
        PickleError::NoTensors(keys) => unknown(
            path,
            format!("its pickle holds no tensor with a name, but the keys {}", list(&keys)),
        ),
        PickleError::Several(keys) => {
            let reason = format!(
                "it holds several state dicts, under the keys {}; save the one that is meant in a \
                 file of its own",
                list(&keys)
            );
            unknown(path, reason)
        }
    }
}

fn unknown(path: &Path, reason: impl Into<String>) -> Error {
    Error::UnknownFormat { file: path.to_path_buf(), reason: reason.into() }
}

/// Describes a file that is in no supported container, as far as its first bytes show what it is.
fn what_else(file: &[u8]) -> &'static str {
    match file {
        [] => "an empty file",
        [0x80, 1..=5, ..] => {
            "a plain pickle, not a file of torch.save; in Python, torch.save the state dict in it"
        }
        _ if is_tar(file) => {
            "a tar archive, as torch.save wrote before PyTorch 0.1.10; in Python, torch.load it and \
             torch.save it again"
        }
        [b'{', ..] => {
            "a JSON file; name the folder that it is in, or the file of the weights beside it"
        }
        _ if file.starts_with(b"\x89HDF\r\n\x1a\n") => "an HDF5 file",
        _ if file.starts_with(npy::MAGIC) => "a single .npy array, which stores no tensor name",
        _ if file.starts_with(b"version https://git-lfs") => {
            "a Git LFS pointer; the file itself was not fetched"
        }
        _ => "neither safetensors, nor .npz, nor a file of torch.save",
    }
}

fn is_tar(file: &[u8]) -> bool {
    file.get(257..262) == Some(b"ustar")
}

fn entry<'a>(path: &Path, index: &'a Index, name: &str) -> Result<&'a Entry> {
    index.entries.get(name).ok_or_else(|| {
        let expected = format!("the name of a tensor in {}", path.display());
        Error::Input { argument: "name", expected, found: name.to_owned() }
    })
}

/// Reads a tensor, and returns with it whether all its elements are known to be finite.
pub(super) fn read_tensor(
    path: &Path,
    file: &dyn Content,
    index: &Index,
    name: &str,
) -> Result<(Tensor, bool)> {
    let entry = entry(path, index, name)?;
    match entry.read(file) {
        Ok(Some(read)) => Ok(read),
        Ok(None) => {
            let (file, name) = (path.to_path_buf(), name.to_owned());
            Err(Error::ElementType { file, name, found: entry.element.to_string() })
        }
        Err(reason) => Err(Error::corrupt(path, format!("tensor {name}: {reason}"))),
    }
}
