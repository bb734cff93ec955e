//! Synthetic records for tests.

use super::runs::FoundRun;
use convpass::model::{PetlConfig, TrainableParams};
use convpass::train::{EpochReport, Fit, RunRecord, TrainConfig};

pub(super) fn record(task: &str, method: &str, seed: i64, top1: f64) -> RunRecord {
    let method = serde_json::from_value(serde_json::json!({ "name": method })).unwrap();
    let epoch = |epoch: usize| EpochReport {
        epoch,
        lr: 1e-3,
        loss: 2.0 / (1.0 + epoch as f64),
        accuracy: 40.0 + 5.0 * epoch as f64,
        val_top1: None,
        seconds: 1.0,
    };
    RunRecord {
        version: "0".to_owned(),
        task: task.to_owned(),
        model: PetlConfig { seed, ..PetlConfig::new(method, 10) },
        train: TrainConfig { seed, epochs: 3, ..TrainConfig::default() },
        backbone: "/somewhere/vit.npz".to_owned(),
        backbone_digest: "00ff".to_owned(),
        precision: None,
        image_size: Some((224, 224)),
        test_shorter_side: None,
        shots: None,
        train_split: "t".to_owned(),
        val_split: None,
        test_split: Some(format!("test of {task}")),
        head_digest: None,
        adapter_digest: None,
        cross_validation: None,
        trainable_params: TrainableParams::new(1_000, 650, 100_000),
        fit: Fit {
            epochs: (0..3).map(epoch).collect(),
            selected_epoch: Some(2),
            stopped: false,
            seconds: 3.0,
        },
        test_top1: Some(top1),
        test: None,
        best_on_test: None,
        test_seconds: Some(1.0),
        peak_rss_mb: None,
        images: Default::default(),
    }
}

pub(super) fn run(task: &str, method: &str, seed: i64, top1: f64) -> FoundRun {
    let folder = std::path::PathBuf::from(format!("{task}-{method}-{seed}"));
    let record = record(task, method, seed, top1);
    FoundRun { name: folder.clone(), folder, record, predictions: None, bypass_view: None }
}
