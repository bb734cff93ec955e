//! Photos as people have them: every format, turned ones, odd JPEGs and files that are no images.

use std::fs;
use std::path::{Path, PathBuf};

use convpass::data::{
    FileList, ImageDataset, Orientation, Resize, Survey, SurveyDepth, decode_image,
    decode_image_with,
};
use convpass::{Error, Preprocessing};

use crate::golden::fixtures;

fn photos() -> PathBuf {
    fixtures().join("photos")
}

/// The images of the folder, sorted.
fn images(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let is_script = |path: &Path| path.extension().is_some_and(|extension| extension == "py");
    let mut files: Vec<_> = files.filter(|path| path.is_file() && !is_script(path)).collect();
    files.sort();
    files
}

#[test]
fn every_photo_is_read_as_pillow_reads_it() {
    let files = images(&photos());
    assert_eq!(files.len(), 42);
    for file in files {
        let name = file.file_name().unwrap().to_str().unwrap();
        let expected = decode_image(photos().join(format!("golden/{name}.png"))).unwrap();
        let found = decode_image(&file).unwrap();
        assert_eq!(found.dim(), expected.dim(), "{name}");
        let worst = found.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        // JPEG and lossy WebP leave the rounding of their transforms to the decoder.
        let is_exact = ["bmp", "gif", "tif", "TIF", "tiff", "png", "webp"]
            .iter()
            .any(|known| name.ends_with(known) && name != "lossy.webp");
        assert!(worst <= if is_exact { 0 } else { 4 }, "{name}: off by {worst}");
    }
}

#[test]
fn a_turned_photo_is_honoured_unless_it_is_not_wanted() {
    let turned = photos().join("exif_6.jpg");
    let stored = decode_image(photos().join("golden/exif_stored.png")).unwrap();
    let found = decode_image_with(&turned, Orientation::Stored).unwrap();
    assert_eq!(found.dim(), stored.dim());
    assert!(found.iter().zip(&stored).all(|(a, b)| a.abs_diff(*b) <= 4));
    assert_eq!(decode_image(&turned).unwrap().dim(), (24, 17, 3));
    // The choice is part of the resize, of a dataset as of a single image.
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("list.txt"), format!("{} 0\n", turned.display())).unwrap();
    let list = FileList::read(folder.path(), folder.path().join("list.txt"), None).unwrap();
    let exif = Resize::bicubic((8, 8)).unwrap();
    let ignored = exif.with_orientation(Orientation::Stored);
    for resize in [exif, ignored] {
        let expected = decode_image_with(&turned, resize.orientation()).unwrap();
        let expected = resize.apply(expected.view()).unwrap();
        assert_eq!(resize.read(&turned).unwrap(), expected);
        let loaded = ImageDataset::load_resized(&list, resize).unwrap();
        assert_eq!(loaded.image(0).unwrap(), expected);
        assert_eq!(ImageDataset::stream(&list, resize).image(0).unwrap(), expected);
    }
    assert_ne!(exif.read(&turned).unwrap(), ignored.read(&turned).unwrap());
}

/// Adapters of earlier versions were trained on images that were never turned.
#[test]
fn a_preprocessing_without_the_choice_is_that_of_earlier_versions() {
    let text = r#"{"image_size": [8, 8], "resize": "squash", "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "source": "caller"}"#;
    let earlier: Preprocessing = serde_json::from_str(text).unwrap();
    assert_eq!(earlier.orientation, Orientation::Stored);
    assert_eq!(Resize::of(&earlier).unwrap().orientation(), Orientation::Stored);
    assert!(!serde_json::to_string(&earlier).unwrap().contains("orientation"));
    let now = Preprocessing { orientation: Orientation::Exif, ..earlier };
    let text = serde_json::to_string(&now).unwrap();
    assert!(text.contains(r#""orientation":"exif""#), "{text}");
    assert_eq!(serde_json::from_str::<Preprocessing>(&text).unwrap(), now);
}

#[test]
fn a_file_that_cannot_be_read_is_named_with_the_reason() {
    for (name, reason) in [
        ("palette_of_4_bytes.png", ""),
        ("photo.avif", "AVIF is not supported"),
        ("photo.heic", "HEIC is not supported"),
        ("page.jpg", "not an image in one of the formats JPEG"),
        ("cut.jpg", "truncated"),
    ] {
        let error = decode_image(photos().join("bad").join(name)).unwrap_err();
        let Error::Image { path, reason: found, .. } = &error else { panic!("{error:?}") };
        assert!(path.ends_with(name) && found.contains(reason), "{error}");
    }
}

/// A panic of a decoder is an error like any other, on every thread: the other images are read.
#[test]
fn a_decoder_that_panics_costs_one_image() {
    let folder = tempfile::tempdir().unwrap();
    let bad = photos().join("bad/palette_of_4_bytes.png").display().to_string();
    let good = photos().join("photo.jpg").display().to_string();
    let lines = format!("{bad} 0\n{bad} 0\n{bad} 0\n{}", format!("{good} 1\n").repeat(5));
    fs::write(folder.path().join("list.txt"), lines).unwrap();
    let list = FileList::read("/", folder.path().join("list.txt"), None).unwrap();
    let resize = Resize::bicubic((4, 4)).unwrap();
    let error = ImageDataset::load_resized(&list, resize).unwrap_err();
    let Error::Image { path, list: Some((_, 1)), .. } = &error else { panic!("{error:?}") };
    assert!(path.ends_with("palette_of_4_bytes.png"));
    let streamed = ImageDataset::stream(&list, resize);
    let read = (0..8).filter(|&index| streamed.image(index).is_ok()).count();
    assert_eq!(read, 5);
}

#[cfg(unix)]
#[test]
fn a_pipe_and_a_device_are_refused_and_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe.jpg");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for (path, kind) in [(pipe.as_path(), "a pipe"), (Path::new("/dev/zero"), "a device")] {
        let error = decode_image(path).unwrap_err();
        assert!(matches!(&error, Error::NotAFile { found, .. } if *found == kind), "{error}");
        let error = FileList::read(folder.path(), path, None).unwrap_err();
        assert!(matches!(error, Error::NotAFile { .. }), "{error}");
    }
    let list = folder.path().join("list.txt");
    fs::write(&list, "pipe.jpg 0\n").unwrap();
    let list = FileList::read(folder.path(), list, None).unwrap();
    let error = ImageDataset::load(&list, (4, 4)).unwrap_err().to_string();
    assert!(error.contains("found a pipe") && error.contains("list.txt:1"), "{error}");
}

#[test]
fn every_file_of_a_folder_is_listed_or_named() {
    let root = tempfile::tempdir().unwrap();
    let class = root.path().join("class");
    fs::create_dir(&class).unwrap();
    for file in images(&photos()).into_iter().chain([photos().join("make.py")]) {
        fs::copy(&file, class.join(file.file_name().unwrap())).unwrap();
    }
    let list = FileList::from_folders(root.path()).unwrap();
    assert_eq!((list.entries().len(), list.left_out().len()), (42, 1));
    assert!(list.left_out()[0].path.ends_with("class/make.py"));
    let threads = std::num::NonZeroUsize::MIN;
    for depth in [SurveyDepth::Headers, SurveyDepth::Pixels] {
        assert!(Survey::of(&list, depth, threads).unwrap().unreadable.is_empty());
    }
    for name in ["palette_of_4_bytes.png", "photo.avif", "photo.heic", "page.jpg", "cut.jpg"] {
        fs::copy(photos().join("bad").join(name), class.join(name)).unwrap();
    }
    let list = FileList::from_folders(root.path()).unwrap();
    let survey = Survey::of(&list, SurveyDepth::Pixels, threads).unwrap();
    assert_eq!((survey.images, survey.unreadable.len()), (47, 5));
    assert_eq!(list.without_unreadable(&survey).unwrap().entries().len(), 42);
}
