//! Reads `adapter_config.json` of Hugging Face PEFT and defines the fields that are written.

use std::fmt;
use std::path::{Path, PathBuf};

use regex::{Regex, RegexBuilder};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::files::OpenFile;

pub(super) const FILE: &str = "adapter_config.json";

/// The largest file that is read. The file of a ViT-L with a rank for each module has 20 kB.
const MAX_BYTES: usize = 1 << 20;
/// The most patterns that are read. No ViT has as many modules.
const MAX_PATTERNS: usize = 1 << 10;
/// The largest size of a compiled pattern. A pattern that names modules has a few kB.
const MAX_PATTERN_BYTES: usize = 1 << 18;

/// Fields that change what the products compute, with the values that have no effect. An absent
/// field and `null` have no effect either. All other fields say how the adapter was trained or
/// where the base model is.
#[rustfmt::skip]
const PLAIN: [(&str, &str); 9] = [
    ("bias",                    "\"none\""),
    ("lora_bias",               "false"),
    ("layer_replication",       "null"),
    ("target_parameters",       "null or []"),
    ("trainable_token_indices", "null"),
    ("alora_invocation_tokens", "null"),
    ("arrow_config",            "null"),
    ("kasa_config",             "null"),
    ("monteclora_config",       "null"),
];

/// Initializations that leave the weights of the base model unchanged. The others (PiSSA, OLoRA,
/// CorDA, LoftQ, LoRA-GA) change these weights, so the products do not fit the original ones.
const PLAIN_INIT: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// The fields that describe the products.
#[derive(Debug)]
pub(super) struct PeftConfig {
    file: PathBuf,
    rank: i64,
    alpha: f64,
    rank_pattern: Patterns,
    alpha_pattern: Patterns,
    /// Whether the factor is `alpha / sqrt(r)` instead of `alpha / r`.
    rank_stabilized: bool,
    /// The class of the base model, if PEFT stored it.
    pub(super) base_class: Option<String>,
}

impl PeftConfig {
    /// Reads the config in `folder`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::CorruptFile`] if it is not a JSON object;
    /// [`Error::FileField`] for the first field that is invalid or needs an unsupported feature.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let file = folder.join(FILE);
        let opened = OpenFile::open(&file).map_err(Error::io(&file))?;
        if opened.len() > MAX_BYTES {
            let reason = format!("{} bytes, but a config has at most {MAX_BYTES}", opened.len());
            return Err(Error::corrupt(&file, reason));
        }
        let mut text = vec![0; opened.len()];
        opened.read_at(0, &mut text).map_err(Error::io(&file))?;
        Self::parse(&file, &text)
    }

    fn parse(file: &Path, text: &[u8]) -> Result<Self> {
        let corrupt = |e: serde_json::Error| Error::corrupt(file, e.to_string());
        let map: Map<String, Value> = serde_json::from_slice(text).map_err(corrupt)?;
        let fields = Fields { file, map };
        fields.check_plain()?;
        // Parses the text again: the first matching pattern counts, but a map does not keep the
        // order.
        let in_order: InOrder = serde_json::from_slice(text).map_err(corrupt)?;
        Ok(PeftConfig {
            rank: fields.get("r", "a positive integer", 8, |v| v.as_i64().filter(|&r| r > 0))?,
            alpha: fields.get("lora_alpha", "a number", 8.0, Value::as_f64)?,
            rank_pattern: fields.patterns("rank_pattern", in_order.rank_pattern)?,
            alpha_pattern: fields.patterns("alpha_pattern", in_order.alpha_pattern)?,
            rank_stabilized: fields.get("use_rslora", "true or false", false, Value::as_bool)?,
            base_class: fields.base_class(),
            file: file.to_path_buf(),
        })
    }

    /// Returns the rank and the factor of the product beside the module at `path` in the base
    /// model.
    ///
    /// # Errors
    /// [`Error::FileField`] if the rank is not a positive integer.
    pub(super) fn rank_and_scale(&self, path: &str) -> Result<(i64, f64)> {
        let rank = match self.rank_pattern.find(path) {
            None => self.rank,
            Some(rank) if rank >= 1.0 && rank.fract() == 0.0 && rank < i64::MAX as f64 => {
                rank as i64
            }
            Some(rank) => {
                return Err(field(&self.file, "rank_pattern", "positive integers", rank));
            }
        };
        let alpha = self.alpha_pattern.find(path).unwrap_or(self.alpha);
        let divisor = if self.rank_stabilized { (rank as f64).sqrt() } else { rank as f64 };
        Ok((rank, alpha / divisor))
    }

    /// Returns an error for a field that does not match the tensors.
    pub(super) fn wrong(&self, name: &str, expected: &str, found: &str) -> Error {
        field(&self.file, name, expected, found)
    }
}

/// Returns an error for a field.
fn field(file: &Path, field: &str, expected: &str, found: impl ToString) -> Error {
    let (file, found) = (file.to_path_buf(), found.to_string());
    Error::FileField { file, field: field.to_owned(), expected: expected.to_owned(), found }
}

/// The fields of the file, unordered.
struct Fields<'a> {
    file: &'a Path,
    map: Map<String, Value>,
}

impl Fields<'_> {
    /// Returns a field, or the default of PEFT if the field is absent or `null`.
    fn get<T>(
        &self,
        name: &str,
        expected: &str,
        default: T,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<T> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => read(value).ok_or_else(|| self.wrong(name, expected)),
        }
    }

    /// Checks that the products are those of LoRA and that nothing else is trained or computed.
    fn check_plain(&self) -> Result<()> {
        if self.map.get("peft_type").and_then(Value::as_str) != Some("LORA") {
            return Err(self.wrong("peft_type", "\"LORA\""));
        }
        for (name, expected) in PLAIN {
            let plain = match self.map.get(name) {
                Some(Value::String(text)) => name == "bias" && text == "none",
                value => is_off(value),
            };
            if !plain {
                return Err(self.wrong(name, expected));
            }
        }
        self.check_variants()?;
        match self.map.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => Ok(()),
            Some(Value::String(init)) if PLAIN_INIT.contains(&init.as_str()) => Ok(()),
            _ => {
                let expected = "one that leaves the base model's weights as they are (convert the \
                                adapter with `path_initial_model_for_weight_conversion`)";
                Err(self.wrong("init_lora_weights", expected))
            }
        }
    }

    /// Checks that no LoRA variant is on. PEFT turns a variant on with a field `use_...` (DoRA,
    /// QALoRA, ..), possibly also a future one. Only rsLoRA is supported.
    fn check_variants(&self) -> Result<()> {
        let unknown = |(name, value): &(&String, &Value)| {
            name.starts_with("use_") && *name != "use_rslora" && !is_off(Some(value))
        };
        match self.map.iter().find(unknown) {
            Some((name, _)) => Err(self.wrong(name, "false")),
            None => Ok(()),
        }
    }

    fn patterns(&self, name: &str, pairs: Option<Pairs>) -> Result<Patterns> {
        let pairs = pairs.unwrap_or_default().0;
        if pairs.len() > MAX_PATTERNS {
            let expected = format!("at most {MAX_PATTERNS} patterns");
            return Err(field(self.file, name, &expected, pairs.len()));
        }
        let mut patterns = Vec::with_capacity(pairs.len());
        for (pattern, value) in pairs {
            let Some(value) = value.as_f64() else {
                return Err(field(self.file, name, "numbers", format!("{pattern}: {value}")));
            };
            let expected = "regular expressions without look-around";
            let regex = compile(&pattern).map_err(|e| field(self.file, name, expected, e))?;
            patterns.push((regex, value));
        }
        Ok(Patterns(patterns))
    }

    fn base_class(&self) -> Option<String> {
        let class = self.map.get("auto_mapping")?.get("base_model_class")?.as_str()?;
        Some(class.to_owned())
    }

    fn wrong(&self, name: &str, expected: &str) -> Error {
        const SHOWN: usize = 80;
        let found = match self.map.get(name) {
            None => "nothing".to_owned(),
            Some(value) => value.to_string().chars().take(SHOWN).collect(),
        };
        field(self.file, name, expected, found)
    }
}

/// Returns whether a field with this value has no effect.
fn is_off(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Array(values)) => values.is_empty(),
        Some(Value::Object(values)) => values.is_empty(),
        _ => false,
    }
}

/// Numbers for patterns of module paths. The first pattern that matches counts.
#[derive(Debug)]
struct Patterns(Vec<(Regex, f64)>);

impl Patterns {
    fn find(&self, path: &str) -> Option<f64> {
        self.0.iter().find(|(pattern, _)| pattern.is_match(path)).map(|(_, value)| *value)
    }
}

/// Compiles a pattern with PEFT's meaning: it matches the whole path or its last segments.
fn compile(pattern: &str) -> Result<Regex, regex::Error> {
    let whole = format!(r"\A(?:(.*\.)?({pattern})$)");
    RegexBuilder::new(&whole).size_limit(MAX_PATTERN_BYTES).build()
}

/// The fields whose order matters.
#[derive(Deserialize)]
struct InOrder {
    rank_pattern: Option<Pairs>,
    alpha_pattern: Option<Pairs>,
}

/// A JSON object as an ordered list of pairs.
#[derive(Default)]
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from patterns to numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// The config that is written: the fields that PEFT needs, ordered by name.
#[derive(Debug, Serialize)]
pub(super) struct Written {
    pub(super) alpha_pattern: Map<String, Value>,
    pub(super) base_model_name_or_path: Option<String>,
    pub(super) bias: &'static str,
    pub(super) fan_in_fan_out: bool,
    pub(super) inference_mode: bool,
    pub(super) init_lora_weights: bool,
    pub(super) lora_alpha: Value,
    pub(super) lora_dropout: f64,
    pub(super) modules_to_save: Option<Vec<String>>,
    pub(super) peft_type: &'static str,
    pub(super) r: i64,
    pub(super) rank_pattern: Map<String, Value>,
    pub(super) target_modules: Vec<String>,
    pub(super) task_type: Option<String>,
    pub(super) use_dora: bool,
    pub(super) use_rslora: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<PeftConfig> {
        PeftConfig::parse(Path::new("f"), text.as_bytes())
    }

    #[test]
    fn the_first_pattern_that_matches_counts() {
        let config = parse(
            r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "some_new_field": {"a": 1},
                "rank_pattern": {"z.1.fc1": 2, "^fc1": 3, "fc1": 5, "vit.*fc2": 6},
                "alpha_pattern": {"\\d+\\.fc[13]": 9.5, "1.fc1": 1}}"#,
        )
        .unwrap();
        for (path, expected) in [
            ("z.1.fc1", (2, 4.75)),
            ("a.z.1.fc1", (2, 4.75)),
            ("a.1.fc1", (5, 1.9)),
            ("fc1", (3, 8.0 / 3.0)),
            ("a.xfc1", (4, 2.0)),
            ("vit.1.fc2", (6, 8.0 / 6.0)),
            ("vit.1.fc2.x", (4, 2.0)),
            ("q", (4, 2.0)),
        ] {
            assert_eq!(config.rank_and_scale(path).unwrap(), expected, "{path}");
        }
    }

    #[test]
    fn rank_stabilized_and_absent_fields() {
        let config = parse(r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": true}"#);
        assert_eq!(config.unwrap().rank_and_scale("q").unwrap(), (4, 3.0));
        let config = parse(r#"{"peft_type": "LORA", "rank_pattern": null}"#).unwrap();
        assert_eq!(config.rank_and_scale("q").unwrap(), (8, 1.0));
    }

    #[test]
    fn a_wrong_field_is_named() {
        for (fields, wrong) in [
            (r#""peft_type": "LOHA""#, "peft_type"),
            (r#""peft_type": null"#, "peft_type"),
            (r#""r": 0"#, "r"),
            (r#""r": 2.5"#, "r"),
            (r#""r": "8""#, "r"),
            (r#""lora_alpha": "16""#, "lora_alpha"),
            (r#""use_rslora": 1"#, "use_rslora"),
            (r#""use_dora": true"#, "use_dora"),
            (r#""use_bdlora": {"nblocks": 2}"#, "use_bdlora"),
            (r#""use_something_new": true"#, "use_something_new"),
            (r#""bias": "lora_only""#, "bias"),
            (r#""bias": true"#, "bias"),
            (r#""lora_bias": true"#, "lora_bias"),
            (r#""layer_replication": [[0, 1]]"#, "layer_replication"),
            (r#""target_parameters": ["w"]"#, "target_parameters"),
            (r#""init_lora_weights": "pissa_niter_4""#, "init_lora_weights"),
            (r#""rank_pattern": {"a(": 1}"#, "rank_pattern"),
            (r#""rank_pattern": {"(?=a)": 1}"#, "rank_pattern"),
            (r#""rank_pattern": {"a{1000}{1000}": 1}"#, "rank_pattern"),
            (r#""alpha_pattern": {"a": "1"}"#, "alpha_pattern"),
        ] {
            let peft_type = if wrong == "peft_type" { "" } else { r#""peft_type": "LORA", "# };
            match parse(&format!("{{{peft_type}{fields}}}")) {
                Err(Error::FileField { file, field, .. }) => {
                    assert_eq!((file, field.as_str()), (PathBuf::from("f"), wrong));
                }
                other => panic!("{fields}: {other:?}"),
            }
        }
        let config =
            parse(r#"{"peft_type": "LORA", "rank_pattern": {"q": 1.5, "k": -1}}"#).unwrap();
        assert!(matches!(config.rank_and_scale("q"), Err(Error::FileField { .. })));
        assert!(matches!(config.rank_and_scale("k"), Err(Error::FileField { .. })));
    }

    #[test]
    fn what_is_no_object_is_corrupt() {
        let text = r#"{"peft_type": "LORA", "r": 4, "rank_pattern": {"q": 2}}"#;
        for end in 0..text.len() {
            assert!(matches!(parse(&text[..end]), Err(Error::CorruptFile { .. })), "{end}");
        }
        for text in ["[]", r#"{"peft_type": "LORA", "rank_pattern": 3}"#, "{\"r\": NaN}"] {
            assert!(matches!(parse(text), Err(Error::CorruptFile { .. })), "{text}");
        }
        let nested = "[".repeat(1 << 18);
        assert!(matches!(parse(&nested), Err(Error::CorruptFile { .. })));
    }
}
