//! Domain generalization: a model on other sets of images of its classes, or of some of them.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

use tch::Tensor;

use super::evaluate::{Evaluation, cross_entropy};
use crate::clip::read_class_names;
use crate::data::{BatchConfig, Batches, ImageDataset};
use crate::error::{Error, Result};

/// Which of a model's classes a set of images has: of each label of the set, the model's class.
///
/// ImageNet-A and -R, for instance, have 200 of ImageNet's 1,000. A model is measured on such a set
/// by the logits of its classes alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassSubset {
    classes: Vec<i64>,
    num_classes: i64,
}

/// What is wrong with the class of a label.
type Wrong = (usize, String);

impl ClassSubset {
    /// The model's `classes` in the order of the set's labels; the model has `num_classes`.
    ///
    /// # Errors
    /// [`Error::Config`] if there is none, one is outside `0..num_classes` or there twice.
    pub fn new(classes: Vec<i64>, num_classes: i64) -> Result<Self> {
        if classes.is_empty() {
            return Err(Error::config("classes", "at least one", 0));
        }
        let found = |at: usize| classes[at];
        check(&classes, num_classes)
            .map_err(|(at, wrong)| Error::config(format!("classes[{at}]"), wrong, found(at)))?;
        Ok(ClassSubset { classes, num_classes })
    }

    /// The classes of these `names` among the names of `all` of the model's classes.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that `all` does not have, or has twice; as [`ClassSubset::new`].
    pub fn by_name<S: AsRef<str>, T: AsRef<str>>(names: &[S], all: &[T]) -> Result<Self> {
        let classes = find(names, all).map_err(|(at, wrong)| {
            Error::config(format!("names[{at}]"), wrong, names[at].as_ref())
        })?;
        Self::new(classes, all.len() as i64)
    }

    /// Reads a file of one class a line, in the order of the set's labels: all by name, or all by
    /// index from 0.
    ///
    /// # Errors
    /// As [`read_class_names`]; [`Error::ListLine`] for a class that the model does not have, has
    /// twice under that name, or that another line names.
    pub fn read<S: AsRef<str>>(path: impl AsRef<Path>, all: &[S]) -> Result<Self> {
        let (path, num_classes) = (path.as_ref(), all.len() as i64);
        let lines = read_class_names(path)?;
        let is_name = |line: &String| all.iter().any(|name| name.as_ref() == line);
        let indices: Option<Vec<i64>> = lines.iter().map(|line| line.parse().ok()).collect();
        let classes = match indices {
            // Names of digits ("0" to "9") are names.
            Some(indices) if !lines.iter().all(is_name) => Ok(indices),
            _ => find(&lines, all),
        };
        let checked = classes.and_then(|classes| check(&classes, num_classes).map(|()| classes));
        // No line before the last is blank.
        let classes = checked.map_err(|(at, wrong)| Error::ListLine {
            file: path.to_path_buf(),
            line: at + 1,
            reason: format!("expected {wrong}, found {:?}", lines[at]),
        })?;
        Ok(ClassSubset { classes, num_classes })
    }

    /// The model's class of each label.
    pub fn classes(&self) -> &[i64] {
        &self.classes
    }

    /// Logits of the model, `[B, K]`, to those of the classes, `[B, len]`, in the order of the
    /// labels.
    ///
    /// # Errors
    /// [`Error::Input`] if the model has another number of classes.
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

/// What each class has to be that is none of `num_classes`, or there a second time.
fn check(classes: &[i64], num_classes: i64) -> Result<(), Wrong> {
    let mut seen = HashMap::new();
    for (label, class) in classes.iter().enumerate() {
        if !(0..num_classes).contains(class) {
            return Err((label, format!("a class within 0..{num_classes}")));
        }
        if let Some(other) = seen.insert(*class, label) {
            return Err((label, format!("another class than that of label {other}")));
        }
    }
    Ok(())
}

/// The places of `names` in `all`.
fn find<S: AsRef<str>, T: AsRef<str>>(names: &[S], all: &[T]) -> Result<Vec<i64>, Wrong> {
    // -1 for a name of several classes.
    let mut places: HashMap<&str, i64> = HashMap::new();
    for (class, name) in all.iter().enumerate() {
        places.entry(name.as_ref()).and_modify(|place| *place = -1).or_insert(class as i64);
    }
    let place = |(label, name): (usize, &S)| match places.get(name.as_ref()) {
        Some(-1) => Err((label, "a name of one class alone (indices tell them apart)".to_owned())),
        Some(&class) => Ok(class),
        None => Err((label, "the name of one of the model's classes".to_owned())),
    };
    names.iter().enumerate().map(place).collect()
}

/// As [`evaluate`](crate::eval::evaluate), of whatever gives `logits` `[B, K]` of images `[B, 3, H, W]`,
/// and over a subset of the classes: a zero-shot classifier, or one model on several sets.
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
/// [`Error::Config`] for a batch size of 0 or labels beyond the classes; [`Error::Input`] if the
/// logits are not of the classes that the subset is one of; as `logits`.
pub fn evaluate_logits(
    logits: &mut dyn FnMut(&Tensor) -> Result<Tensor>,
    dataset: &ImageDataset,
    subset: Option<&ClassSubset>,
    config: BatchConfig,
    watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Evaluation> {
    let mut sum = Evaluation::default();
    for batch in Batches::new(dataset, config)? {
        let (images, labels) = batch?;
        let logits = tch::no_grad(|| match (logits(&images)?, subset) {
            (logits, Some(subset)) => subset.select(&logits),
            (logits, None) => Ok(logits),
        })?;
        check_logits(&logits, &labels, dataset.num_classes())?;
        sum.add(&logits, &labels, &cross_entropy(&logits, &labels)?)?;
        if watch(sum.images, dataset.len()).is_break() {
            break;
        }
    }
    Ok(sum)
}

/// The dimensions of logits of the caller's; none where they are not defined.
fn size(logits: &Tensor) -> Vec<i64> {
    if logits.defined() { logits.size() } else { Vec::new() }
}

/// Checks that there is a logit for every label: on a GPU one beyond them ends the process.
fn check_logits(logits: &Tensor, labels: &Tensor, needed: i64) -> Result<()> {
    let (size, count) = (size(logits), labels.numel() as i64);
    match size[..] {
        [images, classes] if images == count && classes >= needed => Ok(()),
        [images, classes] if images == count => {
            Err(Error::config("classes", format!("at least the data's {needed}"), classes))
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

    /// Images of one pixel, whose red is the highest class of the "model".
    #[test]
    fn a_set_is_measured_over_its_own_classes() {
        let reds = [3u8, 1, 0, 3];
        let pixels = reds.iter().flat_map(|&red| [red, 0, 0]).collect();
        let pixels = ndarray::Array4::from_shape_vec((4, 1, 1, 3), pixels).unwrap();
        let images = ImageDataset::from_arrays(pixels, vec![0, 1, 1, 1], 2).unwrap();
        // Class 0 is out of the subset, and next to it comes 1.
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
