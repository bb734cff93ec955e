//! Reads the cases under `fixtures/` and compares with their golden values.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use convpass::backbone::BackboneConfig;
use convpass::{
    Backbone, ConvNeXtConfig, FrozenConvNeXt, FrozenSwin, FrozenViT, SwinConfig, ViTConfig,
};

use crate::support::{device, limit, root};

/// A kind of backbone, as a user opens it.
pub trait AnyFrozen: Backbone {
    type Config: BackboneConfig + Serialize + DeserializeOwned;

    fn infer(path: &Path) -> convpass::Result<Self::Config>;
    fn open(path: &Path) -> convpass::Result<Self>;
    fn open_with(path: &Path, config: &Self::Config) -> convpass::Result<Self>;
    fn random(config: &Self::Config, device: Device) -> Self;
    fn config(&self) -> &Self::Config;
    fn features(&self, images: &Tensor) -> Tensor;
}

macro_rules! frozen {
    ($backbone:ident, $config:ident) => {
        impl AnyFrozen for $backbone {
            type Config = $config;

            fn infer(path: &Path) -> convpass::Result<$config> {
                $config::infer(path)
            }

            fn open(path: &Path) -> convpass::Result<Self> {
                $backbone::open(path, device())
            }

            fn open_with(path: &Path, config: &$config) -> convpass::Result<Self> {
                $backbone::open_with(path, config, device())
            }

            fn random(config: &$config, device: Device) -> Self {
                $backbone::random(config, 1, device).unwrap()
            }

            fn config(&self) -> &$config {
                self.config()
            }

            fn features(&self, images: &Tensor) -> Tensor {
                self.features(images).unwrap()
            }
        }
    };
}

frozen!(FrozenViT, ViTConfig);
frozen!(FrozenSwin, SwinConfig);
frozen!(FrozenConvNeXt, ConvNeXtConfig);

/// One folder below `fixtures/<family>/`: its `case.json`, and the tensors of `golden.safetensors`.
pub struct Case {
    pub name: String,
    pub facts: Map<String, Value>,
    pub tensors: BTreeMap<String, Tensor>,
    family: PathBuf,
    folder: PathBuf,
    tolerance: f64,
}

impl Case {
    fn read(family: &Path, folder: PathBuf) -> Self {
        let facts = std::fs::read(folder.join("case.json")).expect("case.json is readable");
        let facts: Map<String, Value> = serde_json::from_slice(&facts).expect("case.json is JSON");
        let tensors = Tensor::read_safetensors(folder.join("golden.safetensors"))
            .expect("golden.safetensors is readable");
        Case {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            tolerance: facts["tolerance"].as_f64().expect("a tolerance"),
            facts,
            tensors: tensors.into_iter().map(|(name, t)| (name, t.to_device(device()))).collect(),
            family: family.to_path_buf(),
            folder,
        }
    }

    /// A fact, as the type that the crate reads it as.
    pub fn fact<T: for<'de> Deserialize<'de>>(&self, key: &str) -> T {
        serde_json::from_value(self.facts[key].clone())
            .unwrap_or_else(|e| panic!("{}: {key}: {e}", self.name))
    }

    /// The path of the file in the case's own folder that `key` names.
    pub fn file(&self, key: &str) -> PathBuf {
        self.folder.join(self.fact::<String>(key))
    }

    /// The path of the file in the family's folder that `key` names.
    pub fn shared_file(&self, key: &str) -> PathBuf {
        self.family.join(self.fact::<String>(key))
    }

    pub fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no golden {name}", self.name))
    }

    /// Opens the backbone at `path` as a user would: with `open` if the file tells all, else with the inferred config corrected by what `case.json` names.
    pub fn open<B: AnyFrozen>(&self, path: &Path) -> convpass::Result<B> {
        let corrections: Map<String, Value> = self.fact("config");
        if corrections.is_empty() {
            return B::open(path);
        }
        let mut config = serde_json::to_value(B::infer(path)?).expect("a config is JSON");
        for (field, value) in corrections {
            // A config denies fields that it does not have.
            config[field] = value;
        }
        let config = serde_json::from_value(config).expect("a corrected config is a config");
        B::open_with(path, &config)
    }

    /// Checks that `found` is the golden tensor `name`: the greatest absolute difference within
    /// the case's tolerance of the greatest absolute golden value.
    pub fn compare(&self, name: &str, found: &Tensor) -> Result<(), String> {
        let expected = self.tensor(name);
        if found.size() != expected.size() {
            return Err(format!("{name}: shape {:?}, not {:?}", found.size(), expected.size()));
        }
        let tolerance = match found.kind() {
            Kind::Double => self.tolerance,
            _ => limit(self.tolerance),
        };
        let difference = difference(found, expected);
        // NaN is a failure too.
        if difference <= tolerance {
            Ok(())
        } else {
            Err(format!("{name}: off by {difference:.2e} relative, {tolerance:.0e} allowed"))
        }
    }
}

/// The greatest absolute difference, relative to the greatest absolute value of `expected`.
pub fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    let [found, expected] =
        [found, expected].map(|t| t.to_device(Device::Cpu).to_kind(Kind::Double));
    (found - &expected).abs().max().double_value(&[]) / expected.abs().max().double_value(&[])
}

pub fn fixtures() -> PathBuf {
    root().join("tests/integration/fixtures")
}

/// The cases of a family in the order of their names.
pub fn cases(family: &str) -> Vec<Case> {
    let family = fixtures().join(family);
    let mut folders: Vec<PathBuf> = std::fs::read_dir(&family)
        .unwrap_or_else(|e| panic!("{}: {e}", family.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("case.json").exists())
        .collect();
    folders.sort();
    assert!(!folders.is_empty(), "{}: no cases", family.display());
    folders.into_iter().map(|folder| Case::read(&family, folder)).collect()
}

/// Runs `check` on every case of a family and names each one that fails.
pub fn check_all<E: Display>(family: &str, check: impl Fn(&Case) -> Result<(), E>) {
    let failures: Vec<String> = cases(family)
        .iter()
        .filter_map(|case| check(case).err().map(|e| format!("{family}/{}: {e}", case.name)))
        .collect();
    assert!(failures.is_empty(), "{} cases fail:\n{}", failures.len(), failures.join("\n"));
}
