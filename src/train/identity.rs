//! What tells one run from another.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::Value;

use super::config::TrainConfig;
use super::state::{bytes, checksum, sorted_variables};
use crate::backbone::Backbone;
use crate::data::ImageDataset;
use crate::error::{Error, Result};
use crate::eval::PrefixCache;
use crate::ffi::autocast::Autocast;
use crate::model::{PetlConfig, PetlModel};

/// The version of a state file's content.
const FORMAT: u32 = 1;

/// What tells one run from another. A state file resumes only a run with an equal identity.
#[derive(Serialize)]
struct Identity<'a> {
    format: u32,
    model: &'a PetlConfig,
    train: TrainConfig,
    backbone: String,
    /// The dtype of autocast, if it is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    autocast: Option<&'static str>,
    train_images: Images<'a>,
    val_images: Option<Images<'a>>,
    /// Whether the optimizer is the caller's.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    own_optimizer: bool,
    /// Whether the schedule is the caller's.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    own_schedule: bool,
    /// Checksum of the initial trainables. Fields are compared in the order of their names, so this
    /// one comes last: it is reported only if no other field explains the difference.
    weights_at_start: u32,
}

#[derive(Serialize)]
struct Images<'a> {
    split: &'a str,
    count: usize,
    size: (i64, i64),
    /// Hash of the pixels, if they are in memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    split_pixels: Option<&'a str>,
}

impl<'a> Images<'a> {
    fn of(set: &'a ImageDataset) -> Self {
        let (split, split_pixels) = (set.split_hash(), set.pixel_hash());
        Images { split, count: set.len(), size: set.image_size(), split_pixels }
    }
}

/// Which parts of a run are the caller's own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owned {
    pub(super) optimizer: bool,
    pub(super) schedule: bool,
}

impl Owned {
    /// Checks that no setting of `config` is for an optimizer that is not used.
    pub(super) fn check(self, config: &TrainConfig) -> Result<()> {
        if !self.optimizer || config.head_lr_factor == 1.0 {
            return Ok(());
        }
        let expected = "1 with an optimizer of the caller's, which has its own rates";
        let error = Error::config("head_lr_factor", expected, config.head_lr_factor);
        Err(error.in_config("TrainConfig"))
    }
}

/// Returns what tells a run from another; `model` still holds its initial weights.
pub(super) fn identity<B: Backbone>(
    owned: Owned,
    model: &PetlModel<B>,
    train: &ImageDataset,
    validation: Option<&ImageDataset>,
    config: &TrainConfig,
) -> Result<Value> {
    // The folder of the prefix cache does not change its tokens.
    let prefix = config.prefix.as_ref().map(|cache| PrefixCache { folder: None, ..cache.clone() });
    let identity = Identity {
        format: FORMAT,
        model: model.config(),
        train: TrainConfig { prefix, ..config.clone() },
        backbone: model.backbone().digest()?,
        autocast: Autocast::name(model.backbone().device())?,
        own_optimizer: owned.optimizer,
        own_schedule: owned.schedule,
        weights_at_start: checksum(&bytes(&sorted_variables(model))?),
        train_images: Images::of(train),
        val_images: validation.map(Images::of),
    };
    serde_json::to_value(identity).map_err(|e| Error::io("the settings of the run")(e.into()))
}

/// Adds the hashes of the pixels to the run of a file of an earlier version, which had none.
pub(super) fn keep_known_pixels(found: &mut Value, expected: &Value) {
    for set in ["train_images", "val_images"] {
        let known = expected.get(set).and_then(|images| images.get("split_pixels"));
        if let (Some(known), Some(images)) =
            (known, found.get_mut(set).and_then(Value::as_object_mut))
        {
            images.entry("split_pixels").or_insert_with(|| known.clone());
        }
    }
}

/// Returns the first field below `path` in which two JSON values differ, and both values as text.
pub(super) fn difference(
    path: String,
    found: &Value,
    expected: &Value,
) -> Option<(String, String, String)> {
    let (Value::Object(a), Value::Object(b)) = (found, expected) else {
        return (found != expected).then(|| (path, found.to_string(), expected.to_string()));
    };
    let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    names.into_iter().find_map(|name| {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let field = |map: &serde_json::Map<_, _>| map.get(name).cloned().unwrap_or_default();
        difference(path, &field(a), &field(b))
    })
}
