//! Domain generalization: evaluation on other datasets that have all or some of a model's classes.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

use tch::Tensor;

use super::metrics::Evaluation;
use crate::clip::read_class_names;
use crate::data::{BatchConfig, Batches, ImageDataset};
use crate::error::{Error, Result};

/// A subset of a model's classes: maps each label of a dataset to a class of the model.
///
/// For example, ImageNet-A and ImageNet-R have 200 of ImageNet's 1,000 classes. On such a dataset,
/// the prediction is the highest logit among the classes of the dataset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassSubset {
    classes: Vec<i64>,
    num_classes: i64,
}

/// An invalid entry: its label, and the value expected in its place.
type Wrong = (usize, String);

impl ClassSubset {
    /// Creates a subset of the classes of a model with `num_classes` classes. `classes[label]` is
    /// the model's class of a label.
    ///
    /// # Errors
    /// [`Error::Config`] if `classes` is empty or if a class is outside `0..num_classes` or
    /// repeated.
    pub fn new(classes: Vec<i64>, num_classes: i64) -> Result<Self> {
        if classes.is_empty() {
            return Err(Error::config("classes", "at least one class", 0));
        }
        let found = |at: usize| classes[at];
        check(&classes, num_classes)
            .map_err(|(at, wrong)| Error::config(format!("classes[{at}]"), wrong, found(at)))?;
        Ok(ClassSubset { classes, num_classes })
    }

    /// Creates a subset from the class `names` of the dataset, in the order of its labels. `all`
    /// are the names of the model's classes.
    ///
    /// # Errors
    /// [`Error::Config`] if a name is missing from `all` or occurs there twice; also the errors of
    /// [`ClassSubset::new`].
    pub fn by_name<S: AsRef<str>, T: AsRef<str>>(names: &[S], all: &[T]) -> Result<Self> {
        let classes = find(names, all).map_err(|(at, wrong)| {
            Error::config(format!("names[{at}]"), wrong, names[at].as_ref())
        })?;
        Self::new(classes, all.len() as i64)
    }

    /// Reads a file with one class a line, in the order of the dataset's labels. Either every line
    /// is a name in `all`, the names of the model's classes, or every line is an index from 0.
    ///
    /// # Errors
    /// The errors of [`read_class_names`]; [`Error::ListLine`] if a line is not a class of the
    /// model, names several classes of the model, or repeats the class of an earlier line.
    pub fn read<S: AsRef<str>>(path: impl AsRef<Path>, all: &[S]) -> Result<Self> {
        let (path, num_classes) = (path.as_ref(), all.len() as i64);
        let lines = read_class_names(path)?;
        let is_name = |line: &String| all.iter().any(|name| name.as_ref() == line);
        let indices: Option<Vec<i64>> = lines.iter().map(|line| line.parse().ok()).collect();
        let classes = match indices {
            // Class names may be numbers, such as the digits "0" to "9".
            Some(indices) if !lines.iter().all(is_name) => Ok(indices),
            _ => find(&lines, all),
        };
        let checked = classes.and_then(|classes| check(&classes, num_classes).map(|()| classes));
        // No line before the last name is blank, so an entry's position gives its line.
        let classes = checked.map_err(|(at, wrong)| Error::ListLine {
            file: path.to_path_buf(),
            line: at + 1,
            reason: format!("expected {wrong}, found {:?}", lines[at]),
        })?;
        Ok(ClassSubset { classes, num_classes })
    }

    /// Returns the model's class of each label.
    pub fn classes(&self) -> &[i64] {
        &self.classes
    }

    /// Selects the logits of the subset, `[B, len]` in the order of the labels, from the logits
    /// `[B, K]` of the model.
    ///
    /// # Errors
    /// [`Error::Input`] if K is not the `num_classes` of the subset.
    pub fn select(&self, logits: &Tensor) -> Result<Tensor> {
        let size = size(logits);
        if size.len() != 2 || size[1] != self.num_classes {
            return Err(Error::Input {
                argument: "logits",
                expected: format!("[B, {}]", self.num_classes),
                found: format!("{size:?}"),
            });
        }
        let index = Tensor::f_from_slice(&self.classes)?.f_to_device(logits.device())?;
        Ok(logits.f_index_select(1, &index)?)
    }
}

/// Checks that every class is in `0..num_classes` and occurs once.
fn check(classes: &[i64], num_classes: i64) -> Result<(), Wrong> {
    let mut seen = HashMap::new();
    for (label, class) in classes.iter().enumerate() {
        if !(0..num_classes).contains(class) {
            return Err((label, format!("a class within 0..{num_classes}")));
        }
        if let Some(other) = seen.insert(*class, label) {
            return Err((label, format!("a class that label {other} does not have")));
        }
    }
    Ok(())
}

/// Returns the position of each of `names` in `all`.
fn find<S: AsRef<str>, T: AsRef<str>>(names: &[S], all: &[T]) -> Result<Vec<i64>, Wrong> {
    // -1 marks a name of several classes.
    let mut places: HashMap<&str, i64> = HashMap::new();
    for (class, name) in all.iter().enumerate() {
        places.entry(name.as_ref()).and_modify(|place| *place = -1).or_insert(class as i64);
    }
    let place = |(label, name): (usize, &S)| match places.get(name.as_ref()) {
        Some(-1) => Err((label, "the name of only one class (indices are unique)".to_owned())),
        Some(&class) => Ok(class),
        None => Err((label, "the name of one of the model's classes".to_owned())),
    };
    names.iter().enumerate().map(place).collect()
}

/// Evaluates a function that returns the logits `[B, K]` of images `[B, 3, H, W]`, on every image
/// of `dataset`.
///
/// Use it instead of [`evaluate`](crate::eval::evaluate) for a zero-shot classifier, or for
/// datasets that have only a `subset` of the model's classes. `watch` works as in `evaluate`.
///
/// ```no_run
/// # use convpass::data::BatchConfig;
/// # use convpass::eval::{ClassSubset, evaluate_logits};
/// # use convpass::{ImageDataset, PetlModel, Result};
/// # fn f(model: PetlModel, sketches: ImageDataset, config: BatchConfig, rendered: ImageDataset, subset: ClassSubset) -> Result<()> {
/// let mut logits = |images: &tch::Tensor| model.forward(images, false);
/// let go_on = &mut |_, _| std::ops::ControlFlow::Continue(());
/// let all = evaluate_logits(&mut logits, &sketches, None, config, go_on)?;
/// let some = evaluate_logits(&mut logits, &rendered, Some(&subset), config, go_on)?;
/// println!("{:.2} {:.2}", all.top1(), some.top1());
/// # Ok(()) }
/// ```
///
/// # Errors
/// [`Error::Config`] if the batch size is 0 or there are fewer logits than classes in the dataset;
/// [`Error::Input`] if the logits are not `[B, K]` with the K of the subset; also the errors of
/// `logits` and of decoding an image.
pub fn evaluate_logits(
    logits: &mut dyn FnMut(&Tensor) -> Result<Tensor>,
    dataset: &ImageDataset,
    subset: Option<&ClassSubset>,
    config: BatchConfig,
    watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Evaluation> {
    let indices = config.indices(dataset.len())?;
    evaluate_indices(logits, dataset, subset, config, indices, watch)
}

/// Evaluates like [`evaluate_logits`] on the images at `indices`. `watch` is called with the number
/// of these.
pub(super) fn evaluate_indices(
    logits: &mut dyn FnMut(&Tensor) -> Result<Tensor>,
    dataset: &ImageDataset,
    subset: Option<&ClassSubset>,
    config: BatchConfig,
    indices: Vec<usize>,
    watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Evaluation> {
    let mut sum = Evaluation::default();
    let count = indices.len();
    for batch in Batches::over(dataset, config, None, indices)? {
        let (images, labels) = batch?;
        let logits = tch::no_grad(|| match (logits(&images)?, subset) {
            (logits, Some(subset)) => subset.select(&logits),
            (logits, None) => Ok(logits),
        })?;
        check_logits(&logits, &labels, dataset.num_classes())?;
        sum.add(&logits, &labels)?;
        if watch(sum.images, count).is_break() {
            break;
        }
    }
    Ok(sum)
}

/// Returns the dimensions of the logits, or an empty list if the tensor is undefined.
fn size(logits: &Tensor) -> Vec<i64> {
    if logits.defined() { logits.size() } else { Vec::new() }
}

/// Checks that there is a logit for every class of the dataset. On a GPU, a label beyond the logits
/// ends the process.
fn check_logits(logits: &Tensor, labels: &Tensor, needed: i64) -> Result<()> {
    let (size, count) = (size(logits), labels.numel() as i64);
    match size[..] {
        [images, classes] if images == count && classes >= needed => Ok(()),
        [images, classes] if images == count => {
            Err(Error::config("classes", format!("at least the dataset's {needed}"), classes))
        }
        _ => Err(Error::Input {
            argument: "logits",
            expected: format!("[{count}, K]"),
            found: format!("{size:?}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Normalization, Order, PartialBatch};
    use tch::{Device, Kind};

    fn field(error: Error) -> String {
        match error {
            Error::Config { field, .. } => field,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn classes_are_found_by_name_and_by_index() {
        let all = ["cat", "crane", "dog", "crane", "7"];
        let subset = ClassSubset::by_name(&["dog", "cat"], &all).unwrap();
        assert_eq!(subset.classes(), [2, 0]);
        let logits = Tensor::from_slice(&[0.0f32, 1.0, 2.0, 3.0, 4.0]).view([1, 5]);
        let selected = subset.select(&logits).unwrap();
        assert_eq!(selected, Tensor::from_slice(&[2.0f32, 0.0]).view([1, 2]));
        assert!(matches!(subset.select(&selected), Err(Error::Input { .. })));

        let refused = |names: &[&str]| field(ClassSubset::by_name(names, &all).unwrap_err());
        assert_eq!(refused(&["cat", "cow"]), "names[1]");
        assert_eq!(refused(&["crane"]), "names[0]");
        assert_eq!(refused(&["cat", "dog", "cat"]), "classes[2]");
        assert_eq!(refused(&[]), "classes");
        assert_eq!(field(ClassSubset::new(vec![0, 5], 5).unwrap_err()), "classes[1]");
        assert_eq!(field(ClassSubset::new(vec![-1], 5).unwrap_err()), "classes[0]");
    }

    #[test]
    fn a_file_has_names_or_indices() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("classes.txt");
        let read = |text: &str, all: &[&str]| {
            std::fs::write(&path, text).unwrap();
            ClassSubset::read(&path, all).map(|subset| subset.classes().to_vec())
        };
        let all = ["cat", "dog", "cow"];
        assert_eq!(read("cow\ncat\n", &all).unwrap(), [2, 0]);
        assert_eq!(read("2\n1\n", &all).unwrap(), [2, 1]);
        assert_eq!(read("2\n1\n", &["3", "2", "1"]).unwrap(), [1, 2]);
        for (text, bad) in [("2\n3\n", 2), ("2\ndog\n", 1), ("cat\ndog\ncat\n", 3), ("-1", 1)] {
            let error = read(text, &all).unwrap_err();
            assert!(matches!(error, Error::ListLine { line, .. } if line == bad), "{error}");
        }
    }

    /// The images have one pixel. Its red value is the class with the highest logit.
    #[test]
    fn a_set_is_measured_over_its_own_classes() {
        let reds = [3u8, 1, 0, 3];
        let pixels = reds.iter().flat_map(|&red| [red, 0, 0]).collect();
        let pixels = ndarray::Array4::from_shape_vec((4, 1, 1, 3), pixels).unwrap();
        let images = ImageDataset::from_arrays(pixels, vec![0, 1, 1, 1], 2).unwrap();
        // Class 0 is not in the subset, and the next highest logit is that of class 1.
        let mut logits = |images: &Tensor| {
            let red = (images.select(1, 0).flatten(0, -1) * 255.0).round().unsqueeze(1);
            Ok(-(red - Tensor::arange(4, (Kind::Float, Device::Cpu))).abs())
        };
        let config = BatchConfig {
            batch_size: 3,
            partial: PartialBatch::Keep,
            order: Order::Sequential,
            normalization: Normalization::Unit,
            device: Device::Cpu,
        };
        let go_on = &mut |_, _| ControlFlow::Continue(());
        let subset = ClassSubset::new(vec![3, 1], 4).unwrap();
        let sum = evaluate_logits(&mut logits, &images, Some(&subset), config, go_on).unwrap();
        assert_eq!((sum.images, sum.correct), (4, 3));
        let sum = evaluate_logits(&mut logits, &images, None, config, go_on).unwrap();
        assert_eq!((sum.images, sum.correct), (4, 1));
        let stop = &mut |_, _| ControlFlow::Break(());
        let sum = evaluate_logits(&mut logits, &images, None, config, stop).unwrap();
        assert_eq!(sum.images, 3);

        let mut refused = |logits: &dyn Fn() -> Tensor, subset| {
            let mut logits = |_: &Tensor| Ok(logits());
            evaluate_logits(&mut logits, &images, subset, config, go_on).unwrap_err()
        };
        let zeros = |shape: [i64; 2]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        assert_eq!(field(refused(&|| zeros([3, 1]), None)), "classes");
        assert!(matches!(refused(&|| zeros([2, 4]), None), Error::Input { .. }));
        assert!(matches!(refused(&|| zeros([3, 5]), Some(&subset)), Error::Input { .. }));
        assert!(matches!(refused(&Tensor::new, None), Error::Input { .. }));
    }
}
