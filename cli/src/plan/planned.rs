//! One run of a plan, and the comparison of a record with it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::PlanMethod;
use convpass::data::vtab::{self, PublishedInit};
use convpass::model::PetlConfig;
use convpass::petl::{ConvInit, Method, SubLayers};
use convpass::train::{CrossValidation, RunRecord, TrainConfig};

/// Everything that determines the final weights and the results of a run. The fields have the names
/// that they have in a [`RunRecord`].
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
    /// The precision of the backbone; `None` for f32. The digest does not tell whether autocast is
    /// used.
    pub precision: Option<String>,
    /// (rows, columns) of the images.
    pub image_size: (i64, i64),
    /// The pixels that the shorter side of a test image is resized to before its centre is cut out;
    /// `None` if its aspect ratio is not kept.
    pub test_shorter_side: Option<i64>,
    /// Hash of the training images' list.
    pub train_split: String,
    /// Hash of the validation images' list; only a trial has it.
    pub val_split: Option<String>,
    /// Hash of the test images' list; `None` for a trial, which never sees them.
    pub test_split: Option<String>,
    /// Digest of the adapter file whose head the run starts from.
    pub head_digest: Option<String>,
    /// The cross-validation that chose the learning rates.
    #[serde(default)]
    pub cross_validation: Option<CrossValidation>,
}

impl PlannedRun {
    /// Returns the fields in which `record` differs from this run, such as `train.schedule.lr:
    /// 0.001, planned is 0.002`. It is empty for a record of this run. Fields that do not change
    /// the weights are not compared: `train.recompute`, `train.cuda_graph` and
    /// `train.validate_every`.
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
    if matches!(path, "train.recompute" | "train.cuda_graph" | "train.validate_every") {
        return;
    }
    let (Value::Object(planned), Value::Object(fields)) = (planned, found) else {
        if planned != found {
            out.push(format!("{path}: {found}, planned is {planned}"));
        }
        return;
    };
    // A top-level field that only the record has is a result of the run. A nested one is a
    // difference.
    let extra = fields.keys().filter(|key| !path.is_empty() && !planned.contains_key(*key));
    for key in planned.keys().chain(extra) {
        let value = |of: &serde_json::Map<_, _>| of.get(key).cloned().unwrap_or(Value::Null);
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        compare(&value(planned), &value(fields), &path, out);
    }
}

/// Returns the scale s and the init that were published for Convpass beside these sub-layers on a
/// task of VTAB-1k ([`vtab::TASKS`]). For the MLP alone they are those for both sub-layers.
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

/// Returns the method of a plan, with the published choices for the task if `published` is set.
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
