//! The predictions of an adapter for each test image, and statistics of them.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use ndarray::{Array3, Array4, ArrayView3, Axis};
use serde::{Deserialize, Serialize};
use tch::Kind;

use super::picture::Thumbnail;
use crate::error::{Error, Result};
use crate::files::{read_json, write_json};
use convpass::backbone::Backbone;
use convpass::data::{
    BatchConfig, Batches, FileEntry, FileList, ImageDataset, Normalization, Order, PartialBatch,
    Resize,
};
use convpass::model::PetlModel;

/// Number of images that are decoded at a time.
const CHUNK: usize = 256;
/// Number of mistakes that are stored with their picture.
const GALLERY: usize = 16;
/// The longer side of a picture, in pixels.
const THUMBNAIL: u32 = 72;

/// One image of a test list, and the model's prediction for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// The path as written in the list.
    pub path: String,
    /// The class of the image.
    pub label: i64,
    /// The class with the highest logit.
    pub predicted: i64,
    /// The softmax probability of the predicted class.
    pub confidence: f64,
    /// The picture, for the most confident mistakes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub picture: Option<Thumbnail>,
}

/// Predictions for a list of images. They are saved beside the record of the run, so that a page can
/// be written again without the model and the data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Predictions {
    /// Number of classes.
    pub num_classes: i64,
    /// Names of the classes in the order of the labels, or none.
    #[serde(default)]
    pub class_names: Vec<String>,
    /// The images in the order of the list.
    pub images: Vec<Prediction>,
}

impl Predictions {
    /// The file beside `run.json`.
    pub const FILE: &str = "predictions.json";

    /// Runs `model` on every image of `list`, resized to `image_size` = (rows, columns); a few
    /// hundred are in memory at a time. `watch` receives the number of images done and of all
    /// images. It may end the pass; the result then has only the images done.
    ///
    /// # Errors
    /// [`Error::Config`] for a batch size of 0 or labels beyond the head;
    /// [`convpass::Error::Image`] for an image that cannot be decoded; [`Error::Input`] if the
    /// images do not fit the backbone.
    pub fn compute<B: Backbone>(
        model: &PetlModel<B>,
        list: &FileList,
        resize: Resize,
        normalization: Normalization,
        batch_size: usize,
        watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Self> {
        let num_classes = model.config().num_classes;
        if list.num_classes() > num_classes {
            let expected = format!("at least the data's {}", list.num_classes());
            return Err(Error::config("num_classes", expected, num_classes));
        }
        let mut all = Predictions { num_classes, ..Predictions::default() };
        let config = BatchConfig {
            batch_size,
            partial: PartialBatch::Keep,
            order: Order::Sequential,
            normalization,
            device: model.var_store().device(),
        };
        let mut worst = Vec::new();
        for entries in list.entries().chunks(CHUNK) {
            let mut pixels = Vec::with_capacity(entries.len());
            for entry in entries {
                pixels.push(read(list, entry, resize)?);
            }
            let labels = entries.iter().map(|entry| entry.label).collect();
            let chunk = ImageDataset::from_arrays(stack(&pixels)?, labels, num_classes)?;
            let start = all.images.len();
            for batch in Batches::new(&chunk, config)? {
                all.add(model, list, &batch?.0)?;
                if watch(all.images.len(), list.entries().len()).is_break() {
                    return Ok(all);
                }
            }
            all.keep_pictures(&mut worst, start, &pixels)?;
        }
        Ok(all)
    }

    /// Adds predictions for the next images of the list, `[B, 3, H, W]`.
    fn add<B: Backbone>(
        &mut self,
        model: &PetlModel<B>,
        list: &FileList,
        images: &tch::Tensor,
    ) -> Result<()> {
        let logits = tch::no_grad(|| model.forward(images, false))?;
        let (confidence, predicted) = logits.f_softmax(-1, Kind::Double)?.f_max_dim(-1, false)?;
        let confidence = Vec::<f64>::try_from(&confidence)?;
        let predicted = Vec::<i64>::try_from(&predicted)?;
        let entries = &list.entries()[self.images.len()..];
        for ((entry, confidence), predicted) in entries.iter().zip(confidence).zip(predicted) {
            self.images.push(Prediction {
                path: entry.path.clone(),
                label: entry.label,
                predicted,
                confidence,
                picture: None,
            });
        }
        Ok(())
    }

    /// Stores pictures of the most confident mistakes so far and removes the others. `worst` are the
    /// images that have a picture; `pixels` are the pixels of the images from `start` on.
    fn keep_pictures(
        &mut self,
        worst: &mut Vec<usize>,
        start: usize,
        pixels: &[Array3<u8>],
    ) -> Result<()> {
        let new = start..self.images.len();
        let mut ranked: Vec<usize> =
            worst.iter().copied().chain(new).filter(|&i| self.images[i].is_mistake()).collect();
        ranked.sort_by(|&a, &b| self.images[b].confidence.total_cmp(&self.images[a].confidence));
        let dropped = ranked.split_off(ranked.len().min(GALLERY));
        for index in dropped {
            self.images[index].picture = None;
        }
        for &index in ranked.iter().filter(|&&index| index >= start) {
            let picture = Thumbnail::new(pixels[index - start].view(), THUMBNAIL)?;
            self.images[index].picture = Some(picture);
        }
        *worst = ranked;
        Ok(())
    }

    /// Writes the predictions as JSON. The file is written atomically.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        write_json(path.as_ref(), self)
    }

    /// Reads a file of [`Predictions::save`].
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::CorruptFile`] if it is cut off or has
    /// a class that does not exist.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let found: Predictions = read_json(path)?;
        let classes = 0..found.num_classes;
        let wrong =
            |p: &&Prediction| !classes.contains(&p.label) || !classes.contains(&p.predicted);
        if let Some(wrong) = found.images.iter().find(wrong) {
            let reason = format!(
                "{}: class {} or {} of {}",
                wrong.path, wrong.label, wrong.predicted, found.num_classes
            );
            return Err(Error::corrupt(path, reason));
        }
        if found.images.is_empty() {
            return Err(Error::corrupt(path, "no predictions"));
        }
        Ok(found)
    }

    /// Returns the top-1 accuracy in percent.
    pub fn top1(&self) -> f64 {
        let right = self.images.iter().filter(|image| !image.is_mistake()).count();
        100.0 * right as f64 / self.images.len().max(1) as f64
    }

    /// Returns the number of images for each (class, predicted class).
    pub(super) fn confusion(&self) -> BTreeMap<(i64, i64), usize> {
        self.images.iter().fold(BTreeMap::new(), |mut counts, image| {
            *counts.entry((image.label, image.predicted)).or_default() += 1;
            counts
        })
    }

    /// Returns for each class that has images: the class, the number of right predictions, and the
    /// number of images.
    pub(super) fn per_class(&self) -> Vec<(i64, usize, usize)> {
        let mut classes: BTreeMap<i64, (usize, usize)> = BTreeMap::new();
        for image in &self.images {
            let (right, all) = classes.entry(image.label).or_default();
            *right += usize::from(!image.is_mistake());
            *all += 1;
        }
        classes.into_iter().map(|(class, (right, all))| (class, right, all)).collect()
    }

    /// Returns the mistakes, with the most confident first.
    pub(super) fn mistakes(&self) -> Vec<&Prediction> {
        let mut mistakes: Vec<_> = self.images.iter().filter(|image| image.is_mistake()).collect();
        mistakes.sort_by(|a, b| b.confidence.total_cmp(&a.confidence));
        mistakes
    }

    /// Returns the name of a class, or its number.
    pub(super) fn class_name(&self, class: i64) -> String {
        let name = usize::try_from(class).ok().and_then(|class| self.class_names.get(class));
        name.map_or_else(|| class.to_string(), |name| super::palette::short(name, 40))
    }
}

impl Prediction {
    pub(super) fn is_mistake(&self) -> bool {
        self.label != self.predicted
    }
}

fn read(list: &FileList, entry: &FileEntry, resize: Resize) -> Result<Array3<u8>> {
    let image = resize.read(list.root().join(&entry.path));
    Ok(image.map_err(|error| match error {
        convpass::Error::Image { path, reason, .. } => {
            let list = (entry.line > 0).then(|| (list.file().to_path_buf(), entry.line));
            convpass::Error::Image { path, reason, list }
        }
        other => other,
    })?)
}

/// Returns images of one size as `[N, H, W, 3]`.
fn stack(images: &[Array3<u8>]) -> Result<Array4<u8>> {
    let views: Vec<ArrayView3<u8>> = images.iter().map(|image| image.view()).collect();
    ndarray::stack(Axis(0), &views).map_err(|e| Error::config("image_size", "one size", e))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use convpass::backbone::{FrozenViT, ViTConfig};
    use convpass::eval::evaluate;
    use convpass::model::PetlConfig;
    use convpass::petl::Method;
    use tch::Device;

    pub(in super::super) fn of(pairs: &[(i64, i64, f64)], num_classes: i64) -> Predictions {
        let image =
            |(index, &(label, predicted, confidence)): (usize, &(i64, i64, f64))| Prediction {
                path: format!("images/{index}.png"),
                label,
                predicted,
                confidence,
                picture: None,
            };
        let images = pairs.iter().enumerate().map(image).collect();
        Predictions { num_classes, images, ..Predictions::default() }
    }

    #[test]
    fn counts_are_of_the_predictions() {
        let p = of(&[(0, 0, 0.9), (0, 2, 0.6), (2, 0, 0.8), (2, 0, 0.5)], 4);
        assert_eq!(p.top1(), 25.0);
        assert_eq!(p.per_class(), [(0, 1, 2), (2, 0, 2)]);
        assert_eq!(p.confusion()[&(2, 0)], 2);
        let confident: Vec<_> = p.mistakes().iter().map(|m| m.confidence).collect();
        assert_eq!(confident, [0.8, 0.6, 0.5]);
        assert_eq!(p.class_name(2), "2");
    }

    /// More images than are decoded at a time.
    #[test]
    fn they_are_what_an_evaluation_counts() {
        let folder = tempfile::tempdir().unwrap();
        let mut text = String::new();
        for i in 0..CHUNK as u32 + 40 {
            let pixel = |x, y| image::Rgb([(i * 7) as u8, (x * 16) as u8, (i * y) as u8]);
            let image = image::RgbImage::from_fn(16, 16, pixel);
            image.save(folder.path().join(format!("{i}.png"))).unwrap();
            text += &format!("{i}.png {}\n", i % 3);
        }
        std::fs::write(folder.path().join("list.txt"), text).unwrap();
        let list = FileList::read(folder.path(), folder.path().join("list.txt"), None).unwrap();
        let vit = ViTConfig {
            image_size: (16, 16),
            patch_size: 4,
            embed_dim: 32,
            depth: 1,
            num_heads: 2,
            mlp_dim: 32,
            ..ViTConfig::default()
        };
        let backbone = FrozenViT::random(&vit, 3, Device::Cpu).unwrap();
        let model = |classes| {
            PetlModel::new(backbone.clone(), &PetlConfig::new(Method::LinearProbe, classes))
                .unwrap()
        };
        let run = |classes, batch, watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>| {
            Predictions::compute(
                &model(classes),
                &list,
                Resize::bicubic((16, 16)).unwrap(),
                Normalization::Half,
                batch,
                watch,
            )
        };
        let go_on = &mut |_, _| ControlFlow::Continue(());
        let found = run(3, 50, go_on).unwrap();
        let data = ImageDataset::load(&list, (16, 16)).unwrap();
        let sums = evaluate(&model(3), &data, Normalization::Half, 64, go_on).unwrap();
        assert_eq!((found.images.len(), found.top1()), (data.len(), sums.top1()));
        assert_eq!(found.images[290].path, "290.png");
        assert!(found.images.iter().all(|p| (1.0 / 3.0..=1.0).contains(&p.confidence)));
        // The most confident mistakes, and they alone, have a picture.
        let mistakes = found.mistakes();
        let pictured: Vec<_> = mistakes.iter().map(|mistake| mistake.picture.is_some()).collect();
        assert!(pictured[..GALLERY].iter().all(|p| *p) && !pictured[GALLERY..].contains(&true));
        assert_eq!(found.images.iter().filter(|p| p.picture.is_some()).count(), GALLERY);

        let stopped = run(3, 50, &mut |_, _| ControlFlow::Break(())).unwrap();
        assert_eq!(stopped.images.len(), 50);
        assert!(run(2, 50, go_on).unwrap_err().is_config());
        assert!(run(3, 0, go_on).unwrap_err().is_config());
        std::fs::write(folder.path().join("7.png"), b"?").unwrap();
        let broken = run(3, 50, go_on).unwrap_err();
        assert!(
            matches!(broken, Error::Library(convpass::Error::Image { list: Some((_, 8)), .. })),
            "{broken}"
        );
    }

    #[test]
    fn a_file_is_read_back_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(Predictions::FILE);
        let predictions = of(&[(0, 1, 1.0 / 3.0)], 2);
        predictions.save(&path).unwrap();
        assert_eq!(Predictions::load(&path).unwrap(), predictions);
        let text = std::fs::read(&path).unwrap();
        for cut in 0..text.len() {
            std::fs::write(&path, &text[..cut]).unwrap();
            assert!(matches!(Predictions::load(&path), Err(Error::CorruptFile { .. })), "{cut}");
        }
        for wrong in [of(&[(0, 2, 0.5)], 2), of(&[(-1, 0, 0.5)], 2), of(&[], 2)] {
            wrong.save(&path).unwrap();
            assert!(matches!(Predictions::load(&path), Err(Error::CorruptFile { .. })));
        }
    }
}
