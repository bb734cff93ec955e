//! Every reader of the library, called through its public interface with bytes of anybody's making.
//!
//! The fuzz targets call these functions, and so does `tests/integration/hostile.rs` with the
//! committed corpus. A reader may return any error and may not panic. Each function returns whether
//! the input was read.

use std::collections::{BTreeMap, HashMap};
use std::io::{Cursor, Write};
use std::ops::ControlFlow;
use std::path::Path;

use convpass::checkpoint::TensorFile;
use convpass::clip::ClipTokenizer;
use convpass::data::{FileList, ImageDataset, decode_image};
use convpass::model::HeadSource;
use convpass::train::{CosineSchedule, Observer, RunCheckpoint, StepReport, fit_resumable};
use convpass::{
    AdapterInfo, AnyBackbone, FrozenViT, Method, OpenOptions, PetlConfig, PetlModel, TrainConfig,
    ViTConfig,
};
use ndarray::Array4;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize};
use tch::{Device, Kind, Tensor};
use zip::CompressionMethod;
use zip::write::SimpleFileOptions;

/// A reader, which is given the bytes of a file or a part of them.
pub type Reader = fn(&[u8]) -> bool;

/// Each reader by the name of its fuzz target and of its folder in `fuzz/corpus`.
pub const READERS: [(&str, Reader); 11] = [
    ("npz", npz),
    ("safetensors", safetensors),
    ("torch", torch),
    ("torch_legacy", torch_legacy),
    ("checkpoint", checkpoint),
    ("adapter", adapter),
    ("peft", peft),
    ("state", state),
    ("list", list),
    ("image", image),
    ("tokenizer", tokenizer),
];

/// Writes the bytes to a file of this name and calls `f` with its path.
fn with_file<T>(name: &str, bytes: &[u8], f: impl FnOnce(&Path) -> T) -> T {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).expect("a temporary file can be written");
    f(&path)
}

/// Reads every tensor of a file of any container.
fn tensors(bytes: &[u8]) -> bool {
    with_file("weights", bytes, |path| {
        let Ok(file) = TensorFile::open(path) else { return false };
        for name in file.names() {
            let Ok(tensor) = file.tensor(name) else { continue };
            assert_eq!(Some(&*tensor.size()), file.shape(name), "{name}");
            // The highest ratio by which deflate expands.
            assert!(tensor.numel() <= 1032 * bytes.len(), "{name}");
        }
        assert!(file.tensor("no such tensor").is_err());
        true
    })
}

/// A zip archive, or else the bytes of one array in such an archive.
pub fn npz(input: &[u8]) -> bool {
    if input.starts_with(b"PK") { tensors(input) } else { tensors(&zipped(&[("x.npy", input)])) }
}

/// A zip archive, or else the pickle in such an archive with storages of 1 KiB.
pub fn torch(input: &[u8]) -> bool {
    if input.starts_with(b"PK") {
        return tensors(input);
    }
    let names = [0, 1, 2, 3, 4, 5, 6, 7].map(|key| format!("archive/data/{key}"));
    let storages = names.iter().map(|name| (name.as_str(), &[0; 1024][..]));
    let entries: Vec<_> = [("archive/data.pkl", input)].into_iter().chain(storages).collect();
    tensors(&zipped(&entries))
}

/// A file of `torch.save` before PyTorch 1.6.
pub fn torch_legacy(input: &[u8]) -> bool {
    tensors(input)
}

/// A whole file, or else a JSON header up to the first zero byte, and the data after it.
pub fn safetensors(input: &[u8]) -> bool {
    if !input.starts_with(b"{") {
        return tensors(input);
    }
    let (header, data) = split(input);
    tensors(&[&(header.len() as u64).to_le_bytes(), header, data].concat())
}

/// Shapes, then the texts of `config.json`, `preprocessor_config.json` and `open_clip_config.json`
/// beside the weights, with zero bytes between them.
pub fn checkpoint(input: &[u8]) -> bool {
    let (shapes, rest) = split(input);
    let (config, rest) = split(rest);
    let (preprocessor, open_clip) = split(rest);
    let Some(weights) = of_shapes(shapes, None) else { return false };
    with_file("model.safetensors", &weights, |path| {
        for (name, text) in [
            ("config.json", config),
            ("preprocessor_config.json", preprocessor),
            ("open_clip_config.json", open_clip),
        ] {
            if !text.is_empty() {
                let written = std::fs::write(path.with_file_name(name), text);
                written.expect("a temporary file can be written");
            }
        }
        let folder = path.parent().expect("the file is in a folder");
        let Ok(backbone) = AnyBackbone::open(folder, Device::Cpu) else { return false };
        let (height, width) = backbone.preprocessing().image_size;
        if height.saturating_mul(width) <= 64 * 64 {
            let images = Tensor::zeros([1, 3, height, width], (Kind::Float, Device::Cpu));
            let _result = backbone.features(&images);
        }
        true
    })
}

/// A whole adapter file, or else its metadata and its shapes with a zero byte between them.
pub fn adapter(input: &[u8]) -> bool {
    thread_local! {
        static BACKBONE: AnyBackbone =
            opened(include_bytes!("../tests/integration/fixtures/adapter_0_1/vit.safetensors"));
    }
    let file = if input.starts_with(b"{") {
        let (info, shapes) = split(input);
        of_shapes(shapes, Some(("convpass", info)))
    } else {
        Some(input.to_vec())
    };
    let Some(file) = file else { return false };
    let backbone = BACKBONE.with(Clone::clone);
    with_file("adapter.safetensors", &file, |path| {
        let _info = AdapterInfo::read(path);
        let Ok(mut model) = PetlModel::load_adapter(backbone, path) else { return false };
        let images = Tensor::zeros([1, 3, 12, 12], (Kind::Float, Device::Cpu));
        let _result = model.forward(&images, false);
        let _merged = model.merged_backbone();
        let again = path.with_file_name("again.safetensors");
        if model.save_adapter(&again).is_ok() {
            model.load_weights(&again).expect("what was saved is loaded");
            let from: HeadSource = model.load_head(&again).expect("the head is of this model");
            drop(from);
        }
        true
    })
}

/// Opens a backbone of two heads.
fn opened(file: &[u8]) -> AnyBackbone {
    let options = OpenOptions { num_heads: Some(2), ..OpenOptions::default() };
    let open = |path: &Path| AnyBackbone::open_with(path, &options, Device::Cpu);
    with_file("vit.safetensors", file, open).expect("a backbone of the fixtures opens")
}

/// The text of `adapter_config.json` and the shapes of a PEFT adapter, with a zero byte between.
pub fn peft(input: &[u8]) -> bool {
    thread_local! {
        static BACKBONE: AnyBackbone = opened(include_bytes!(
            "../tests/integration/fixtures/peft_adapter/bases/vit.safetensors"
        ));
    }
    let (config, shapes) = split(input);
    let Some(file) = of_shapes(shapes, None) else { return false };
    with_file("adapter_model.safetensors", &file, |path| {
        let written = std::fs::write(path.with_file_name("adapter_config.json"), config);
        written.expect("a temporary file can be written");
        let folder = path.parent().expect("the file is in a folder");
        PetlModel::load_peft(BACKBONE.with(Clone::clone), folder).is_ok()
    })
}

/// A whole state file, or else what it says in JSON about the progress of a run.
pub fn state(input: &[u8]) -> bool {
    thread_local! {
        static RUN: TinyRun = TinyRun::new();
    }
    RUN.with(|run| {
        let file = if input.starts_with(b"{") { run.state(input) } else { Some(input.to_vec()) };
        let Some(file) = file else { return false };
        with_file("state", &file, |path| run.fit(path, usize::MAX))
    })
}

/// A run of a few steps over images of 8x8 pixels, and the file that it leaves after one step.
struct TinyRun {
    backbone: FrozenViT,
    images: ImageDataset,
    metadata: serde_json::Map<String, serde_json::Value>,
    tensors: BTreeMap<String, Stored>,
}

impl TinyRun {
    fn new() -> Self {
        let vit = ViTConfig {
            image_size: (8, 8),
            patch_size: 4,
            embed_dim: 8,
            depth: 1,
            num_heads: 1,
            mlp_dim: 8,
            ..ViTConfig::default()
        };
        let images = Array4::from_shape_fn((4, 8, 8, 3), |(n, row, ..)| (n * 60 + row) as u8);
        let mut run = TinyRun {
            backbone: FrozenViT::random(&vit, 0, Device::Cpu).expect("the config is valid"),
            images: ImageDataset::from_arrays(images, vec![0, 1, 0, 1], 2).expect("labels fit"),
            metadata: serde_json::Map::new(),
            tensors: BTreeMap::new(),
        };
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let path = folder.path().join("state");
        assert!(run.fit(&path, 1), "the run starts");
        let bytes = std::fs::read(&path).expect("the run left a state");
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("it is valid");
        let metadata = header.metadata().as_ref().expect("it has metadata");
        run.metadata = serde_json::from_str(&metadata["convpass_run"]).expect("it is JSON");
        let file = SafeTensors::deserialize(&bytes).expect("it is valid");
        let stored =
            |tensor: TensorView| (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec());
        run.tensors = file.tensors().into_iter().map(|(n, t)| (n, stored(t))).collect();
        run
    }

    /// Trains from the state at `path`, at most `steps` steps. Returns whether this was no error.
    fn fit(&self, path: &Path, steps: usize) -> bool {
        let config = PetlConfig::new(Method::Lora(Default::default()), 2);
        let mut model =
            PetlModel::new(self.backbone.clone(), &config).expect("the method fits the backbone");
        let schedule = CosineSchedule { warmup_epochs: 1, ..CosineSchedule::default() };
        let train = TrainConfig { epochs: 2, batch_size: 2, schedule, ..TrainConfig::default() };
        let checkpoint = RunCheckpoint { path: path.to_path_buf(), every: 1 };
        let mut stop = StopAfter(steps);
        fit_resumable(&mut model, &self.images, None, &train, &checkpoint, &mut stop).is_ok()
    }

    /// Returns the state file with another progress of the run.
    fn state(&self, reached: &[u8]) -> Option<Vec<u8>> {
        let reached = std::str::from_utf8(reached).ok()?;
        let value = |key| self.metadata.get(key).map(ToString::to_string).unwrap_or_default();
        let text = format!(
            r#"{{"run":{},"reached":{reached},"without_gradient":{},"checksum":{}}}"#,
            value("run"),
            value("without_gradient"),
            value("checksum")
        );
        encoded(&self.tensors, Some(("convpass_run", text.as_bytes())))
    }
}

struct StopAfter(usize);

impl Observer for StopAfter {
    fn step(&mut self, _step: &StepReport) -> ControlFlow<()> {
        self.0 = self.0.saturating_sub(1);
        if self.0 == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// A list of images whose first byte chooses the format. What is saved reads as it was.
pub fn list(input: &[u8]) -> bool {
    let Some((format, text)) = input.split_first() else { return false };
    const NAMES: [&str; 5] = ["l.txt", "l.csv", "l.tsv", "l.json", "l.jsonl"];
    let name = NAMES[usize::from(*format) % NAMES.len()];
    with_file(name, text, |path| {
        let _some = FileList::read("", path, Some(3));
        let _named = FileList::read_of("", path, &["cat".to_owned(), "dog".to_owned()]);
        let Ok(list) = FileList::read("", path, None) else { return false };
        assert_eq!(list.class_counts().iter().sum::<usize>(), list.entries().len());
        for name in NAMES {
            let saved = path.with_file_name(format!("saved_{name}"));
            if list.save(&saved).is_err() {
                continue;
            }
            let known = list.class_names();
            let again = if known.is_empty() || name == "l.txt" {
                FileList::read("", &saved, Some(list.num_classes()))
            } else {
                FileList::read_of("", &saved, known)
            };
            let again = again.expect("what was saved is read");
            let images = |list: &FileList| {
                let entries = list.entries().iter();
                entries.map(|entry| (entry.path.clone(), entry.label)).collect::<Vec<_>>()
            };
            assert_eq!(images(&list), images(&again), "{name}");
        }
        true
    })
}

/// An image file of any format.
pub fn image(input: &[u8]) -> bool {
    with_file("image", input, |path| {
        let Ok(pixels) = decode_image(path) else { return false };
        let (height, width, channels) = pixels.dim();
        assert!(height > 0 && width > 0 && channels == 3);
        true
    })
}

/// `tokenizer.json`, or the merges of OpenAI's tokenizer.
pub fn tokenizer(input: &[u8]) -> bool {
    with_file("tokenizer.json", input, |path| {
        let Ok(tokenizer) = ClipTokenizer::open(path) else { return false };
        let texts = ["", "a photo of a cat.", "\u{e9}\u{0}\n1,000 <|endoftext|> \u{1F600}"];
        let _result = tokenizer.batch(&texts, 8);
        true
    })
}

/// Splits at the first zero byte.
fn split(input: &[u8]) -> (&[u8], &[u8]) {
    match input.iter().position(|&byte| byte == 0) {
        Some(at) => (&input[..at], &input[at + 1..]),
        None => (input, &[]),
    }
}

/// The most elements that [`of_shapes`] makes.
const MOST_ELEMENTS: usize = 1 << 17;

/// The dtype, the shape and the bytes of a tensor.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// Returns a safetensors file of zeros. Each line is a name, a space and the dimensions with commas
/// between them; `u8` and a space in front of the name make bytes of it.
fn of_shapes(lines: &[u8], metadata: Option<(&str, &[u8])>) -> Option<Vec<u8>> {
    let mut tensors = BTreeMap::new();
    let mut left = MOST_ELEMENTS;
    for line in std::str::from_utf8(lines).ok()?.lines() {
        let (name, dims) = line.rsplit_once(' ')?;
        let dims = dims.split(',').filter(|dim| !dim.is_empty()).map(|dim| dim.parse().ok());
        let dims = dims.collect::<Option<Vec<usize>>>()?;
        let count = dims.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim))?;
        left = left.checked_sub(count)?;
        let (dtype, name, size) = match name.strip_prefix("u8 ") {
            Some(name) => (Dtype::U8, name, count),
            None => (Dtype::F32, name, 4 * count),
        };
        tensors.insert(name.to_owned(), (dtype, dims, vec![0; size]));
    }
    encoded(&tensors, metadata)
}

/// Returns a safetensors file of these tensors and one metadata entry.
fn encoded(tensors: &BTreeMap<String, Stored>, metadata: Option<(&str, &[u8])>) -> Option<Vec<u8>> {
    let mut views = Vec::new();
    for (name, (dtype, shape, data)) in tensors {
        views.push((name, TensorView::new(*dtype, shape.clone(), data).ok()?));
    }
    let metadata = match metadata {
        Some((key, text)) => {
            Some(HashMap::from([(key.to_owned(), std::str::from_utf8(text).ok()?.to_owned())]))
        }
        None => None,
    };
    serialize(views, metadata).ok()
}

/// Returns a zip archive of entries that are not compressed.
fn zipped(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::STORE);
    for &(name, content) in entries {
        zip.start_file(name, stored).expect("the name is valid");
        zip.write_all(content).expect("memory takes what is written");
    }
    zip.finish().expect("memory takes what is written").into_inner()
}
