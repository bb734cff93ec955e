//! One run of a plan, and whether a record is of it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::PlanMethod;
use convpass::data::vtab::{self, PublishedInit};
use convpass::model::PetlConfig;
use convpass::petl::{ConvInit, Method, SubLayers};
use convpass::train::{RunRecord, TrainConfig};

/// All that decides the weights a run ends with, and its figures, under the names that they have
/// in a [`RunRecord`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedRun {
    /// The task's name.
    pub task: String,
    /// Method, classes, drop path and seed.
    pub model: PetlConfig,
    /// The hyper-parameters.
    pub train: TrainConfig,
    /// The backbone's digest.
    pub backbone_digest: String,
    /// How the backbone is kept and computed with, where not in f32: the digest tells no autocast.
    pub precision: Option<String>,
    /// (rows, columns) of the images.
    pub image_size: (i64, i64),
    /// What the shorter side of a test image becomes before its centre is cut out; `None` where
    /// its aspect ratio is not kept.
    pub test_shorter_side: Option<i64>,
    /// Hash of the training images' list.
    pub train_split: String,
    /// Hash of the validation images' list: of a trial alone.
    pub val_split: Option<String>,
    /// Hash of the test images' list; `None` for a trial, which never sees them.
    pub test_split: Option<String>,
    /// Digest of the adapter file whose head it starts from.
    pub head_digest: Option<String>,
}

impl PlannedRun {
    /// In what `record` is of another run, field by field: `train.schedule.lr: 0.001, planned is
    /// 0.002`. Empty for a record of this run. What changes no weights makes no difference: how the
    /// gradients were computed, and how often the run was looked at.
    pub fn differences(&self, record: &RunRecord) -> Vec<String> {
        let mut found = Vec::new();
        if let (Ok(planned), Ok(record)) =
            (serde_json::to_value(self), serde_json::to_value(record))
        {
            compare(&planned, &record, "", &mut found);
        }
        found
    }
}

fn compare(planned: &Value, found: &Value, path: &str, out: &mut Vec<String>) {
    if matches!(path, "train.recompute" | "train.validate_every") {
        return;
    }
    let (Value::Object(planned), Value::Object(fields)) = (planned, found) else {
        if planned != found {
            out.push(format!("{path}: {found}, planned is {planned}"));
        }
        return;
    };
    // What only the record has at its top is how the run went; further down it is a difference.
    let extra = fields.keys().filter(|key| !path.is_empty() && !planned.contains_key(*key));
    for key in planned.keys().chain(extra) {
        let value = |of: &serde_json::Map<_, _>| of.get(key).cloned().unwrap_or(Value::Null);
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        compare(&value(planned), &value(fields), &path, out);
    }
}

/// The scale s and the init that were published for Convpass beside these sub-layers on a task of
/// VTAB-1k ([`vtab::TASKS`]); beside the MLP alone those for both.
pub fn published_choice(task: &str, sub_layers: SubLayers) -> Option<(f64, ConvInit)> {
    let row = vtab::task(task)?;
    let choice = match sub_layers {
        SubLayers::Attention => row.convpass_attention,
        SubLayers::Both | SubLayers::Mlp => row.convpass,
    };
    let init = match choice.conv_init {
        PublishedInit::Identity => ConvInit::Identity,
        PublishedInit::XavierUniform => ConvInit::XavierUniform,
    };
    Some((choice.scale, init))
}

/// The method of a plan with what was published for the task, if it wants that.
pub(super) fn on_task(method: &PlanMethod, task: &str) -> Method {
    let mut config = method.method.clone();
    if let Method::ConvBypass(bypass) = &mut config
        && method.published
        && let Some(choice) = published_choice(task, bypass.sub_layers)
    {
        (bypass.scale, bypass.conv_init) = choice;
    }
    config
}
