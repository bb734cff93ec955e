//! Reads the cases under `fixtures/` and compares with their golden values.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::{Kind, Tensor};

/// One folder below `fixtures/<family>/`: its `case.json`, and the tensors of `golden.safetensors`.
pub struct Case {
    pub name: String,
    pub facts: Map<String, Value>,
    pub tensors: BTreeMap<String, Tensor>,
    tolerance: f64,
}

impl Case {
    fn read(folder: PathBuf) -> Self {
        let facts = std::fs::read(folder.join("case.json")).expect("case.json is readable");
        let facts: Map<String, Value> = serde_json::from_slice(&facts).expect("case.json is JSON");
        let tensors = Tensor::read_safetensors(folder.join("golden.safetensors"))
            .expect("golden.safetensors is readable");
        Case {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            tolerance: facts["tolerance"].as_f64().expect("a tolerance"),
            facts,
            tensors: tensors.into_iter().collect(),
        }
    }

    /// A fact, as the type that the crate reads it as.
    pub fn fact<T: for<'de> Deserialize<'de>>(&self, key: &str) -> T {
        serde_json::from_value(self.facts[key].clone())
            .unwrap_or_else(|e| panic!("{}: {key}: {e}", self.name))
    }

    pub fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no golden {name}", self.name))
    }

    /// Checks that `found` is the golden tensor `name`: the greatest absolute difference within
    /// the case's tolerance of the greatest absolute golden value.
    pub fn compare(&self, name: &str, found: &Tensor) -> Result<(), String> {
        let expected = self.tensor(name);
        if found.size() != expected.size() {
            return Err(format!("{name}: shape {:?}, not {:?}", found.size(), expected.size()));
        }
        let expected = expected.to_kind(Kind::Double);
        let difference = f64::try_from((found.to_kind(Kind::Double) - &expected).abs().max());
        let difference = difference.unwrap() / f64::try_from(expected.abs().max()).unwrap();
        // NaN is a failure too.
        if difference <= self.tolerance {
            Ok(())
        } else {
            Err(format!("{name}: off by {difference:.2e} relative, {:.0e} allowed", self.tolerance))
        }
    }
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/integration/fixtures")
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
    folders.into_iter().map(Case::read).collect()
}

/// Runs `check` on every case of a family and names each one that fails.
pub fn check_all<E: Display>(family: &str, check: impl Fn(&Case) -> Result<(), E>) {
    let failures: Vec<String> = cases(family)
        .iter()
        .filter_map(|case| check(case).err().map(|e| format!("{family}/{}: {e}", case.name)))
        .collect();
    assert!(failures.is_empty(), "{} cases fail:\n{}", failures.len(), failures.join("\n"));
}
