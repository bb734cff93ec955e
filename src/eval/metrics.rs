//! The result of an evaluation: counts, and the metrics that follow from them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::loss::cross_entropy;
#[cfg(feature = "train")]
use super::team::Team;
use crate::error::{Error, Result};

/// Number of bins of the calibration error.
const BINS: usize = 15;

/// The result of an evaluation over the images of a dataset.
///
/// It holds counts, from which the metrics are computed. An image whose logits are not all finite
/// counts as a wrong answer, whatever its label.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// The number of evaluated images.
    pub images: usize,
    /// The number of images whose highest logit is that of their label.
    pub correct: usize,
    /// The number of images with a logit that is NaN or infinite.
    pub not_finite: usize,
    num_classes: usize,
    correct5: usize,
    loss: f64,
    /// Number of images of each class.
    support: Vec<usize>,
    /// Number of images by (label, predicted class), for images with finite logits.
    confusion: BTreeMap<(usize, usize), usize>,
    bins: [Bin; BINS],
}

/// The images whose confidence lies in one interval.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Bin {
    images: usize,
    correct: usize,
    confidence: f64,
}

/// The metrics of an [`Evaluation`] for a record. Percentages are in 0..=100.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Scores {
    /// Top-1 accuracy in percent.
    pub top1: f64,
    /// Top-5 accuracy in percent; `None` for up to 5 classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top5: Option<f64>,
    /// Mean recall of the classes that have images, in percent.
    pub balanced_accuracy: f64,
    /// Mean F1 score of the classes, in percent.
    pub macro_f1: f64,
    /// Expected calibration error in percent.
    pub ece: f64,
    /// Recall of each class in percent; `None` for a class without images.
    pub recall: Vec<Option<f64>>,
}

impl Evaluation {
    /// Adds a batch with logits `[B, K]` and labels `[B]` in `0..K`.
    ///
    /// # Errors
    /// [`Error::Input`] if the shapes differ from that, or K from that of earlier batches.
    pub fn add(&mut self, logits: &Tensor, labels: &Tensor) -> Result<()> {
        let classes = self.check(logits, labels)?;
        let logits = logits.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
        let labels = labels.f_to_device(Device::Cpu)?.f_to_kind(Kind::Int64)?.f_contiguous()?;
        let own = Vec::<i64>::try_from(&labels)?;
        if let Some(wrong) = own.iter().find(|&&label| !(0..classes as i64).contains(&label)) {
            let (argument, expected) = ("labels", format!("each in 0..{classes}"));
            return Err(Error::Input { argument, expected, found: wrong.to_string() });
        }
        self.num_classes = classes;
        self.support.resize(classes, 0);
        self.loss += cross_entropy(&logits, &labels)?.f_double_value(&[])? * own.len() as f64;
        let values = Vec::<f64>::try_from(logits.f_contiguous()?.f_view([-1])?)?;
        for (row, label) in values.chunks_exact(classes).zip(own) {
            self.add_row(row, label as usize);
        }
        Ok(())
    }

    /// Checks the shapes of a batch and returns K.
    fn check(&self, logits: &Tensor, labels: &Tensor) -> Result<usize> {
        let size = logits.size();
        let classes = usize::try_from(size.get(1).copied().unwrap_or(0)).unwrap_or(0);
        let is_first = self.images == 0;
        let fits = size.len() == 2
            && classes > 0
            && size[0] == labels.numel() as i64
            && (is_first || classes == self.num_classes);
        if fits {
            return Ok(classes);
        }
        let known = if is_first { "K".to_owned() } else { self.num_classes.to_string() };
        Err(Error::Input {
            argument: "logits",
            expected: format!("[{}, {known}]", labels.numel()),
            found: format!("{size:?}"),
        })
    }

    /// Adds the logits of one image.
    fn add_row(&mut self, row: &[f64], label: usize) {
        self.images += 1;
        self.support[label] += 1;
        if !row.iter().all(|logit| logit.is_finite()) {
            self.not_finite += 1;
            return;
        }
        // The first of several equal logits, as argmax returns it.
        let mut best = 0;
        for (class, &logit) in row.iter().enumerate() {
            if logit > row[best] {
                best = class;
            }
        }
        let own = row[label];
        let is_before = |class: usize| row[class] > own || row[class] == own && class < label;
        self.correct5 += usize::from((0..row.len()).filter(|&c| is_before(c)).count() < 5);
        self.correct += usize::from(best == label);
        *self.confusion.entry((label, best)).or_default() += 1;
        let confidence = 1.0 / row.iter().map(|logit| (logit - row[best]).exp()).sum::<f64>();
        // Bin i holds the confidences in (i / BINS, (i + 1) / BINS].
        let bin = ((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1;
        let bin = &mut self.bins[bin];
        bin.images += 1;
        bin.correct += usize::from(best == label);
        bin.confidence += confidence;
    }

    /// Returns the top-1 accuracy in percent.
    pub fn top1(&self) -> f64 {
        percent(self.correct as f64, self.images as f64)
    }

    /// Returns the percentage of images whose label is among the five highest logits. Of equal
    /// logits, those of lower classes come first.
    pub fn top5(&self) -> f64 {
        percent(self.correct5 as f64, self.images as f64)
    }

    /// Returns the mean cross entropy, which is NaN if a logit was.
    pub fn loss(&self) -> f64 {
        self.loss / self.images.max(1) as f64
    }

    /// Returns the recall of each class in percent: the percentage of its images that are predicted
    /// as this class. It is `None` for a class without images.
    pub fn recall(&self) -> Vec<Option<f64>> {
        let recall = |(class, &images): (usize, &usize)| {
            (images > 0).then(|| percent(self.predicted(class, class) as f64, images as f64))
        };
        self.support.iter().enumerate().map(recall).collect()
    }

    /// Returns the mean recall of the classes that have images, in percent (scikit-learn's
    /// `balanced_accuracy_score`).
    pub fn balanced_accuracy(&self) -> f64 {
        mean(self.recall().into_iter().flatten())
    }

    /// Returns the mean F1 score in percent of the classes that have an image or a prediction
    /// (scikit-learn's `f1_score` with `average="macro"`).
    pub fn macro_f1(&self) -> f64 {
        let mut predictions = vec![0; self.num_classes];
        for (&(_, class), count) in &self.confusion {
            predictions[class] += count;
        }
        let f1 = |(class, (&images, &predictions)): (usize, (&usize, &usize))| {
            let hits = 2.0 * self.predicted(class, class) as f64;
            (images + predictions > 0).then(|| percent(hits, (images + predictions) as f64))
        };
        mean(self.support.iter().zip(&predictions).enumerate().filter_map(f1))
    }

    /// Returns the expected calibration error in percent (Guo et al., arXiv 1706.04599): the mean
    /// gap between confidence and accuracy over 15 bins of equal width, weighted by the number of
    /// images. Images without finite logits have no confidence and are left out.
    pub fn ece(&self) -> f64 {
        let gap = |bin: &Bin| (bin.confidence - bin.correct as f64).abs();
        let gaps: f64 = self.bins.iter().map(gap).sum();
        percent(gaps, (self.images - self.not_finite) as f64)
    }

    /// Returns the number of images of class `label` that are predicted as `class`.
    pub fn predicted(&self, label: usize, class: usize) -> usize {
        self.confusion.get(&(label, class)).copied().unwrap_or_default()
    }

    /// Returns the evaluation over the images of all processes of `team`.
    #[cfg(feature = "train")]
    pub(super) fn over(self, team: Team) -> Result<Self> {
        if team.is_alone() {
            return Ok(self);
        }
        let mut sum = Evaluation::default();
        for numbers in team.gather(self.to_numbers())? {
            sum.add_numbers(&numbers);
        }
        Ok(sum)
    }

    /// Returns everything that is summed over images. Every count is exact in f64.
    #[cfg(feature = "train")]
    fn to_numbers(&self) -> Vec<f64> {
        let counts = [self.images, self.correct, self.not_finite, self.correct5, self.num_classes];
        let mut numbers: Vec<f64> = counts.map(|count| count as f64).into();
        numbers.push(self.loss);
        for bin in &self.bins {
            numbers.extend([bin.images as f64, bin.correct as f64, bin.confidence]);
        }
        numbers.extend(self.support.iter().map(|&images| images as f64));
        for (&(label, class), &count) in &self.confusion {
            numbers.extend([label, class, count].map(|number| number as f64));
        }
        numbers
    }

    /// Adds the numbers of [`Evaluation::to_numbers`].
    #[cfg(feature = "train")]
    fn add_numbers(&mut self, numbers: &[f64]) {
        let mut numbers = numbers.iter().copied();
        let mut next = || numbers.next().unwrap_or_default();
        self.images += next() as usize;
        self.correct += next() as usize;
        self.not_finite += next() as usize;
        self.correct5 += next() as usize;
        let classes = next() as usize;
        self.loss += next();
        for bin in &mut self.bins {
            bin.images += next() as usize;
            bin.correct += next() as usize;
            bin.confidence += next();
        }
        self.num_classes = self.num_classes.max(classes);
        self.support.resize(self.num_classes, 0);
        for images in self.support.iter_mut().take(classes) {
            *images += next() as usize;
        }
        let rest: Vec<usize> = numbers.map(|number| number as usize).collect();
        for cell in rest.chunks_exact(3) {
            *self.confusion.entry((cell[0], cell[1])).or_default() += cell[2];
        }
    }

    /// Returns all metrics for a record.
    pub fn scores(&self) -> Scores {
        Scores {
            top1: self.top1(),
            top5: (self.num_classes > 5).then(|| self.top5()),
            balanced_accuracy: self.balanced_accuracy(),
            macro_f1: self.macro_f1(),
            ece: self.ece(),
            recall: self.recall(),
        }
    }
}

fn percent(part: f64, whole: f64) -> f64 {
    100.0 * part / whole.max(1.0)
}

/// Returns the mean, or 0 if there are no values.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), value| (sum + value, count + 1));
    sum / count.max(1) as f64
}

#[cfg(all(test, feature = "train"))]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up_to_the_whole() {
        let logits = (Tensor::arange(44, (Kind::Float, Device::Cpu)) * 1.7).sin().view([11, 4]);
        let _nan = logits.narrow(0, 3, 1).fill_(f64::NAN);
        let labels = Tensor::arange(11, (Kind::Int64, Device::Cpu)).remainder(3);
        let part = |first, length| {
            let mut sum = Evaluation::default();
            sum.add(&logits.narrow(0, first, length), &labels.narrow(0, first, length)).unwrap();
            sum
        };
        let mut sum = Evaluation::default();
        for part in [part(0, 4), part(4, 6), Evaluation::default(), part(10, 1)] {
            sum.add_numbers(&part.to_numbers());
        }
        let whole = part(0, 11);
        // The NaN makes the losses unequal to themselves.
        assert!(sum.loss.is_nan() && whole.loss.is_nan());
        let count = |e: &Evaluation| (e.images, e.correct, e.not_finite, e.correct5, e.num_classes);
        assert_eq!(count(&sum), count(&whole));
        assert_eq!((&sum.support, &sum.confusion), (&whole.support, &whole.confusion));
        for (sum, whole) in sum.bins.iter().zip(&whole.bins) {
            assert_eq!((sum.images, sum.correct), (whole.images, whole.correct));
            assert!((sum.confidence - whole.confidence).abs() < 1e-12);
        }
    }
}
