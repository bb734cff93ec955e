//! Checkpoints as training programs write them: prefixes, containers, objects beside the weights.

use std::path::{Path, PathBuf};

use convpass::checkpoint::{LoadReport, TensorFile};
use convpass::{AnyBackbone, Error, OpenOptions};
use tch::Tensor;

use crate::golden::{Case, cases, fixtures};
use crate::support::device;

fn file(name: &str) -> PathBuf {
    fixtures().join("wrappers").join(name)
}

fn golden() -> Case {
    cases("wrappers").remove(0)
}

/// Opens a ViT with one head, which its width does not tell.
fn open(path: &Path) -> convpass::Result<(AnyBackbone, LoadReport)> {
    let options = OpenOptions { num_heads: Some(1), ..OpenOptions::default() };
    AnyBackbone::open_reported(path, &options, device())
}

/// Each wrapper, the keys that lead to its weights, and what is taken off their names.
const WRAPPERS: [(&str, &str, &str); 16] = [
    ("timm_train.pth", "state_dict", ""),
    ("model_and_optimizer.pth", "model", ""),
    ("scalars_beside.pth", "model", ""),
    ("module.pth", "", "module."),
    ("module.safetensors", "", "module."),
    ("compiled.pth", "model_state_dict", "_orig_mod. module."),
    ("lightning.pth", "state_dict", "model."),
    ("teacher.pth", "teacher", "backbone."),
    ("nested.pth", "model state_dict net", ""),
    ("box.pth", "params", ""),
    ("ema.pth", "ema", "module."),
    ("averaged.pth", "", "module."),
    ("same_twice.pth", "state_dict", ""),
    ("chunked.pth", "", "the chunk in blocks.*"),
    ("mae.pth", "model", ""),
    ("old.pth", "state_dict", ""),
];

#[test]
fn weights_open_in_every_wrapper() {
    let case = golden();
    for (name, keys, taken_off) in WRAPPERS {
        let path = file(name);
        let (opened, report) = open(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        case.compare("features", &opened.features(case.tensor("images")).unwrap())
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(report.keys.join(" "), keys, "{name}");
        assert_eq!(report.taken_off.join(" "), taken_off, "{name}");
        // Names in the report are those of the file.
        let tensors = TensorFile::open(&path).unwrap();
        assert!(report.applied.iter().all(|tensor| tensors.contains(tensor)), "{name}");
        let told = report.applied.len() + report.skipped.len();
        assert_eq!(told, tensors.names().count(), "{name}: each tensor is accounted for");
    }
    let text = open(&file("lightning.pth")).unwrap().1.to_string();
    assert!(text.contains("key state_dict") && text.contains("model."), "{text}");
}

#[test]
fn several_state_dicts_are_listed() {
    for (name, keys) in [("two.pth", ["student", "teacher"]), ("both.pth", ["state_dict", "model"])]
    {
        let error = AnyBackbone::open(file(name), device()).unwrap_err();
        assert!(matches!(error, Error::UnknownFormat { .. }), "{error}");
        assert!(keys.iter().all(|key| error.to_string().contains(key)), "{error}");
    }
}

#[test]
fn a_pickle_without_weights_says_what_it_holds() {
    let error = AnyBackbone::open(file("nothing.pth"), device()).unwrap_err();
    assert!(matches!(&error, Error::UnknownFormat { reason, .. } if reason.contains("epoch, lr")));
    let error = AnyBackbone::open(file("whole.pth"), device()).unwrap_err();
    assert!(matches!(&error, Error::PickleGlobal { global, .. } if global.contains("Settings")));
}

/// Writes the tensors of a file under other names.
fn renamed(from: &Path, to: &Path, rename: impl Fn(&str) -> Option<String>) {
    let file = TensorFile::open(from).unwrap();
    let tensors: Vec<(String, Tensor)> =
        file.names().filter_map(|name| Some((rename(name)?, file.tensor(name).unwrap()))).collect();
    Tensor::write_safetensors(&tensors, to).unwrap();
}

#[test]
fn errors_use_the_names_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let wrapped = file("module.safetensors");
    renamed(&wrapped, &path, |name| (!name.contains("blocks.1.norm2.bias")).then(|| name.into()));
    let error = open(&path).unwrap_err();
    assert!(
        matches!(&error, Error::MissingTensor { name, .. } if name == "module.blocks.1.norm2.bias")
    );
    renamed(&wrapped, &path, |name| Some(name.replace("norm2.bias", "norm2.bais")));
    let error = open(&path).unwrap_err().to_string();
    assert!(
        error.contains("is module.blocks.0.norm2.bais meant to be module.blocks.0.norm2.bias"),
        "{error}"
    );
}

#[test]
fn a_file_says_what_it_is_if_it_is_not_a_backbone() {
    let folder = tempfile::tempdir().unwrap();
    let wrapped = file("module.safetensors");
    for (name, marks, rename) in [
        (
            "model-00001-of-00002.safetensors",
            &["shard 1 of 2", "index"][..],
            &(|name: &str| Some(name.to_owned())) as &dyn Fn(&str) -> Option<String>,
        ),
        ("odd.safetensors", &["module.blocks.0.attn.proj.bias", "(32 in all)"], &|name| {
            Some(name.replace("norm1", "n1"))
        }),
        ("norm.safetensors", &["module.norm.", "final norm"], &|name| {
            (!name.starts_with("module.norm.")).then(|| name.to_owned())
        }),
        ("clip.safetensors", &["timm's Swin", "its place in the file"], &|name| {
            Some(match name {
                "module.head.bias" => "text.token_embedding.weight".to_owned(),
                name => name
                    .replace("module.blocks", "module.layers.0.blocks")
                    .replace("module", "visual.trunk"),
            })
        }),
        ("cr.safetensors", &["Swin V2 CR", "cosine attention"], &|name| {
            Some(name.replace("module.blocks.0.attn", "stages.0.blocks.0.attn.meta_mlp"))
        }),
    ] {
        let path = folder.path().join(name);
        renamed(&wrapped, &path, rename);
        let error = open(&path).unwrap_err().to_string();
        for mark in marks {
            assert!(error.contains(mark), "{name}: {error}");
        }
    }
}

#[test]
fn windows_that_are_not_square_must_be_given() {
    let case = cases("swin").into_iter().find(|case| case.name == "rectangular_window").unwrap();
    let path = case.file("file");
    let error = AnyBackbone::open(&path, device()).unwrap_err();
    let text = error.to_string();
    assert!(matches!(&error, Error::FileField { field, .. } if field == "window_sizes"), "{text}");
    assert!(text.contains("2x3") && text.contains("image_size"), "{text}");
    let options = OpenOptions {
        window_size: Some((2, 3)),
        image_size: Some((24, 32)),
        ..OpenOptions::default()
    };
    let swin = AnyBackbone::open_with(&path, &options, device()).unwrap();
    case.compare("features", &swin.features(case.tensor("images")).unwrap()).unwrap();
    let vit = file("module.pth");
    let error = AnyBackbone::open_with(&vit, &options, device()).unwrap_err();
    assert!(matches!(&error, Error::Config { field, .. } if field == "window_size"), "{error}");
}
