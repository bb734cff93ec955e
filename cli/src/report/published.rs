//! Published results of ViT-B/16 (ImageNet-21k) on VTAB-1k, for comparison.
//!
//! All averages are G, the mean of the three group means, and not A, the mean of the 19 tasks.

use convpass::data::vtab::TASKS;

/// C of ViT-B/16, the number of inputs of the published heads.
const EMBED_DIM: f64 = 768.0;

/// A published row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Published {
    pub(super) method: &'static str,
    /// Number of trained weights without the head; `None` if the source does not state it.
    pub(super) params: Option<f64>,
    /// G in percent.
    pub(super) g: f64,
    /// Whether [`TASKS`] has the result of this row on each task.
    pub(super) has_tasks: bool,
}

const fn row(method: &'static str, params: Option<f64>, g: f64) -> Published {
    Published { method, params, g, has_tasks: false }
}

/// Rows of arXiv 2207.07039, table 1 (h = r = 8). The published code keeps the best of every tenth
/// epoch on the test images.
pub(super) const PAPER: [Published; 9] = [
    row("Full", Some(85.8e6), 68.9),
    row("Linear probe", Some(0.0), 57.6),
    row("VPT-deep", Some(0.53e6), 72.0),
    row("Adapter", Some(0.16e6), 73.9),
    row("AdaptFormer", Some(0.16e6), 74.7),
    row("LoRA", Some(0.29e6), 74.5),
    row("NOAH", Some(0.36e6), 75.5),
    row("Convpass, attention only", Some(163_776.0), 75.8),
    Published { method: "Convpass", params: Some(327_552.0), g: 76.56, has_tasks: true },
];

/// Rows of a study that tuned 16 methods under one protocol (OSU-MLB, CVPR 2025); last epoch.
pub(super) const RETUNED: [Published; 9] = [
    row("Full", None, 61.85),
    row("VPT-deep", None, 73.40),
    row("BitFit", None, 74.54),
    row("SSF", None, 75.12),
    row("LoRA", None, 75.24),
    row("FacT-TT", None, 75.94),
    row("AdaptFormer", None, 75.97),
    row("Houlsby adapter", None, 76.27),
    row("Convpass", None, 76.35),
];

/// Returns the number of weights of a head on ViT-B/16, the mean over the 19 tasks.
pub(super) fn mean_head() -> f64 {
    let classes: i64 = TASKS.iter().map(|task| task.num_classes).sum();
    (EMBED_DIM + 1.0) * classes as f64 / TASKS.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tasks_of_the_row_that_has_them_give_its_average() {
        let groups = ["natural", "specialized", "structured"].map(|group| {
            let of: Vec<f64> = TASKS
                .iter()
                .filter(|task| task.group.to_string() == group)
                .map(|task| task.convpass_top1)
                .collect();
            of.iter().sum::<f64>() / of.len() as f64
        });
        let g = groups.iter().sum::<f64>() / 3.0;
        let row = PAPER.iter().find(|row| row.has_tasks).unwrap();
        assert!((g - row.g).abs() < 0.005, "{g}");
        assert!((mean_head() - 769.0 * 940.0 / 19.0).abs() < 1e-9, "{}", mean_head());
    }
}
