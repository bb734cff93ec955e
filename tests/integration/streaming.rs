//! Images that are decoded and changed while a model works: the same results as from memory.

use std::ops::ControlFlow;

use convpass::data::{Augment, Resize};
use convpass::eval::{PrefixCache, evaluate};
use convpass::train::Silent;
use convpass::{
    ConvBypassConfig, Error, FileList, ImageDataset, Method, Normalization, PetlConfig, PetlModel,
    TrainConfig, fit,
};
use image::{Rgb, RgbImage};

use crate::support::small_vit;

/// `count` PNG files of 20x15 in two classes, and their list.
fn photos(count: usize) -> (tempfile::TempDir, FileList) {
    let folder = tempfile::tempdir().unwrap();
    let mut text = String::new();
    for i in 0..count {
        let photo = RgbImage::from_fn(20, 15, |x, y| {
            let lit = (x < 10) == (i % 2 == 0);
            let noise = (i as u32 * 31 + x * 17 + y * 7) % 64;
            Rgb([noise as u8 + if lit { 160 } else { 0 }, noise as u8, (x * y) as u8])
        });
        photo.save(folder.path().join(format!("{i}.png"))).unwrap();
        text += &format!("{i}.png {}\n", i % 2);
    }
    std::fs::write(folder.path().join("list.txt"), text).unwrap();
    let list = FileList::read(folder.path(), folder.path().join("list.txt"), None).unwrap();
    (folder, list)
}

fn resize() -> Resize {
    Resize::center_crop(18, (16, 16)).unwrap()
}

/// Draws nothing in training, so that two of them can run in one process.
fn model(method: Method) -> PetlModel {
    let backbone = small_vit();
    let config = PetlConfig { seed: 5, drop_path: 0.0, ..PetlConfig::new(method, 2) };
    PetlModel::new(backbone, &config).unwrap()
}

fn bypass() -> Method {
    Method::ConvBypass(ConvBypassConfig { dropout: 0.0, ..Default::default() })
}

fn config(augment: Option<Augment>) -> TrainConfig {
    TrainConfig {
        epochs: 4,
        batch_size: 5,
        normalization: Normalization::Half,
        augment,
        ..TrainConfig::default()
    }
}

/// The bytes of the adapter after a run.
fn trained(method: Method, data: &ImageDataset, config: &TrainConfig) -> Vec<u8> {
    let mut model = model(method);
    fit(&mut model, data, None, config, &mut Silent).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    model.save_adapter(file.path()).unwrap();
    std::fs::read(file.path()).unwrap()
}

#[test]
fn evaluation_of_streamed_images_is_that_of_loaded_ones() {
    let (_folder, list) = photos(23);
    let (loaded, streamed) = (
        ImageDataset::load_resized(&list, resize()).unwrap(),
        ImageDataset::stream(&list, resize()),
    );
    let model = model(bypass());
    for batch_size in [1, 4, 23, 100] {
        let run = |data: &ImageDataset| {
            let mut told = Vec::new();
            let watch = &mut |done, images| {
                told.push((done, images));
                ControlFlow::Continue(())
            };
            let sums = evaluate(&model, data, Normalization::Half, batch_size, watch).unwrap();
            (sums, told)
        };
        assert_eq!(run(&loaded), run(&streamed));
    }
    let end = &mut |_, _| ControlFlow::Break(());
    let sums = evaluate(&model, &streamed, Normalization::Half, 4, end).unwrap();
    assert_eq!(sums.images, 4);
}

#[test]
fn an_image_that_cannot_be_decoded_ends_an_evaluation_with_its_line() {
    let (folder, list) = photos(12);
    std::fs::write(folder.path().join("7.png"), b"no image").unwrap();
    let streamed = ImageDataset::stream(&list, resize());
    let go_on = &mut |_, _| ControlFlow::Continue(());
    let error = evaluate(&model(bypass()), &streamed, Normalization::Half, 3, go_on).unwrap_err();
    let Error::Image { list: Some((file, 8)), .. } = error else { panic!("{error}") };
    assert_eq!(file, list.file());
}

#[test]
fn training_on_streamed_images_is_that_on_loaded_ones() {
    let (_folder, list) = photos(12);
    let (loaded, streamed) = (
        ImageDataset::load_resized(&list, resize()).unwrap(),
        ImageDataset::stream(&list, resize()),
    );
    // A part cut out of the file's image is another one.
    for augment in [None, Some(Augment { flip: 0.5, ..Augment::few_shot() })] {
        let config = config(augment);
        let first = trained(bypass(), &loaded, &config);
        assert!(first == trained(bypass(), &streamed, &config));
        assert!(first == trained(bypass(), &loaded, &config));
    }
}

#[test]
fn augmented_images_are_never_computed_once_for_all() {
    let (_folder, list) = photos(12);
    let data = ImageDataset::load_resized(&list, resize()).unwrap();
    // The features of a linear probe are kept otherwise.
    let plain = trained(Method::LinearProbe, &data, &config(None));
    let first = trained(Method::LinearProbe, &data, &config(Some(Augment::few_shot())));
    assert!(plain != first);
    let flips = Augment { flip: 1.0, ..Augment::default() };
    assert!(first != trained(Method::LinearProbe, &data, &config(Some(flips))));

    let prefix = Some(PrefixCache::default());
    let both = TrainConfig { prefix, ..config(Some(Augment::few_shot())) };
    let refused = fit(&mut model(bypass()), &data, None, &both, &mut Silent);
    assert!(matches!(refused, Err(Error::Config { field, .. }) if field == "prefix"));
    let bad = config(Some(Augment { flip: 2.0, ..Augment::default() }));
    let refused = fit(&mut model(bypass()), &data, None, &bad, &mut Silent);
    assert!(matches!(refused, Err(Error::Config { field, .. }) if field == "flip"));
}

#[test]
fn a_configuration_of_before_augmentation_is_read() {
    let mut config = serde_json::to_value(TrainConfig::default()).unwrap();
    config.as_object_mut().unwrap().remove("augment");
    assert_eq!(serde_json::from_value::<TrainConfig>(config).unwrap(), TrainConfig::default());
}
