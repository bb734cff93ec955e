//! A person's own images: folders and lists, photos that cannot be read, and names of classes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use convpass::data::Orientation;
use convpass::model::AdapterInfo;
use convpass::train::RunRecord;

use crate::process::{BACKBONE, convpass, photos, run};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/integration/fixtures/photos").join(name)
}

/// `finetune` of a linear probe on own images.
fn finetune(images: &Path, out: &Path) -> Command {
    let mut command = convpass("finetune");
    command.arg("--images").arg(images).arg("--out").arg(out);
    command.args(["--backbone", BACKBONE, "--normalization", "half", "--method", "linear"]);
    command.args(["--epochs", "40", "--lr", "1e-1"]);
    command
}

/// Classes 1, 2, 10 and 11, whose order by name is not that of the numbers, in `folder`/photos.
fn numbered_classes(folder: &Path) -> PathBuf {
    let root = folder.join("photos");
    photos(&root, &["east", "north", "south", "west"], 15, 0);
    for (name, number) in [("east", "1"), ("north", "2"), ("south", "10"), ("west", "11")] {
        fs::rename(root.join(name), root.join(number)).unwrap();
    }
    root
}

#[test]
fn a_folder_of_photos_becomes_a_classifier_by_two_commands() {
    let folder = tempfile::tempdir().unwrap();
    let (root, out) = (numbered_classes(folder.path()), folder.path().join("run"));
    // A photo in another format, one without an extension, and files that are no photos.
    fs::copy(fixture("lossless.webp"), root.join("10/new.WebP")).unwrap();
    fs::copy(fixture("photo.jpg"), root.join("2/no_extension")).unwrap();
    fs::write(root.join("2/notes.txt"), "no photo").unwrap();
    let (status, text) = run(&mut finetune(&root, &out));
    assert_eq!(status, Some(0), "{text}");
    for part in [
        "notes.txt: not an image",
        "    10      2      3  1\n",
        "    11      2      3  10\n",
        "    42      8     12  all 4 classes",
        "photos: top-1 ",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let names = ["1", "10", "11", "2"];
    let info = AdapterInfo::read(out.join("adapter.safetensors")).unwrap();
    assert_eq!(info.class_names.unwrap(), names);
    assert_eq!(info.backbone.unwrap().preprocessing.unwrap().orientation, Orientation::Exif);
    assert_eq!(fs::read_to_string(out.join("classes.txt")).unwrap(), "1\n10\n11\n2\n");
    let record = RunRecord::load(out.join("run.json")).unwrap();
    assert_eq!(
        (&*record.task, record.images.class_names.as_slice()),
        ("photos", &names.map(str::to_owned)[..])
    );
    assert!(record.train.batch_size == 16 && record.test_top1.unwrap() > 50.0, "{text}");

    let new = folder.path().join("new");
    photos(&new, &["south"], 4, 0);
    let mut predict = convpass("predict");
    predict.arg("--adapter").arg(&out).args(["--top", "1", "--format", "csv"]).arg(&new);
    let (status, text) = run(&mut predict);
    assert_eq!(status, Some(0), "{text}");
    let right = text.lines().filter(|line| line.contains(",1,1,10,")).count();
    assert!(right >= 3, "{text}");

    let (status, text) = run(predict.args(["--resize", "40", "--interpolation", "bilinear"]));
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("shorter side 40 pixels, then the centre, bilinear, by flag"), "{text}");

    // The report looks at the same test images, and calls their classes by name.
    let mut report = convpass("report");
    report.arg(&out).args(["--backbone", BACKBONE, "--no-png", "--data"]).arg(&root);
    let (status, text) = run(&mut report);
    assert_eq!(status, Some(0), "{text}");
    let found = fs::read(out.join("predictions.json")).unwrap();
    let found: serde_json::Value = serde_json::from_slice(&found).unwrap();
    assert_eq!(found["class_names"], serde_json::json!(names));
    let images = found["images"].as_array().unwrap();
    let right = images.iter().filter(|image| image["label"] == image["predicted"]).count();
    assert_eq!(100.0 * right as f64 / images.len() as f64, record.test_top1.unwrap());

    // The lists that the run wrote are the same images.
    let again = folder.path().join("again");
    let mut command = finetune(&out, &again);
    let (status, text) = run(command.arg("--root").arg(&root));
    assert_eq!(status, Some(0), "{text}");
    let second = RunRecord::load(again.join("run.json")).unwrap();
    assert_eq!(
        (&second.train_split, &second.test_split),
        (&record.train_split, &record.test_split)
    );
    assert_eq!(second.test_top1, record.test_top1);
}

#[test]
fn photos_that_cannot_be_read_are_named_before_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let (root, out) = (folder.path().join("photos"), folder.path().join("run"));
    photos(&root, &["east", "west"], 8, 0);
    for name in ["cut.jpg", "palette_of_4_bytes.png", "photo.avif"] {
        fs::copy(fixture("bad").join(name), root.join("west").join(name)).unwrap();
    }
    let (status, text) = run(finetune(&root, &out).arg("--verify-images"));
    assert_eq!(status, Some(1), "{text}");
    for part in [
        "cut.jpg: the file is truncated",
        "palette_of_4_bytes.png: ",
        "AVIF is not supported",
        "3 of 19 images cannot be read",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("panicked") && !out.join("run.json").exists(), "{text}");
    let (status, text) = run(finetune(&root, &out).args(["--verify-images", "--skip-unreadable"]));
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("skipped 3 of 19 images"), "{text}");
    assert_eq!(RunRecord::load(out.join("run.json")).unwrap().images.skipped, 3);
    // A bad photo does not take the others with it.
    let mut predict = convpass("predict");
    predict.arg("--adapter").arg(&out).args(["--threads", "1"]).arg(&root);
    let (status, text) = run(&mut predict);
    assert_eq!((status, text.matches("0.png\t").count()), (Some(1), 2), "{text}");
    assert_eq!(text.lines().filter(|line| line.contains('\t')).count(), 16, "{text}");
}

#[test]
fn a_list_with_names_and_a_turned_photo_that_is_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (root, out) = (folder.path().join("photos"), folder.path().join("run"));
    photos(&root, &["east", "west"], 6, 0);
    let mut list = "file;species\n".to_owned();
    for (class, name) in [("east", "zebra"), ("west", "ant, red")] {
        list += &(0..6).map(|i| format!("{class}/{i}.png;{name}\n")).collect::<String>();
    }
    let file = root.join("list.csv");
    fs::write(&file, &list).unwrap();
    let (status, text) = run(&mut finetune(&file, &out));
    assert_eq!(status, Some(1), "{text}");
    assert!(
        text.contains("list.csv:1: the header") && text.contains("names no column `label`"),
        "{text}"
    );
    fs::write(&file, list.replace("species", "class")).unwrap();
    let mut command = finetune(&file, &out);
    let (status, text) =
        run(command.args(["--ignore-exif", "--select", "val", "--batch-size", "500"]));
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("--batch-size 500: there are 8 training images"), "{text}");
    let record = RunRecord::load(out.join("run.json")).unwrap();
    assert_eq!(record.images.class_names, ["ant, red", "zebra"]);
    assert_eq!(record.images.orientation, Orientation::Stored);
    let mut predict = convpass("predict");
    predict.arg("--adapter").arg(&out).arg(root.join("east/0.png"));
    let (status, text) = run(&mut predict);
    assert!(status == Some(0) && text.contains("their EXIF orientation is ignored"), "{text}");
}

#[test]
fn parts_that_share_an_image_and_odd_labels_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let (root, out) = (folder.path().join("set"), folder.path().join("run"));
    photos(&root.join("train"), &["east", "west"], 6, 0);
    photos(&root.join("test"), &["east", "west"], 3, 1);
    fs::copy(root.join("train/east/0.png"), root.join("test/east/copy.png")).unwrap();
    let (status, text) = run(finetune(&root, &out).args(["--epochs", "1"]));
    assert_eq!(status, Some(0), "{text}");
    let told = "1 test images are training images too";
    assert!(text.contains(told) && text.contains("test/east/copy.png = "), "{text}");
    // A head whose classes are called otherwise is refused.
    let other = folder.path().join("other");
    photos(&other, &["east", "north"], 6, 0);
    let mut command = finetune(&other, &folder.path().join("run2"));
    let (status, text) = run(command.arg("--head").arg(&out));
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("lacks north, and the model lacks west"), "{text}");
    for (images, reason) in [
        (root.join("train/east"), "it contains no folder, but 6 images"),
        (folder.path().join("nothing"), "No such file"),
    ] {
        let (status, text) = run(&mut finetune(&images, &out));
        assert!(status == Some(1) && text.contains(reason), "{text}");
    }
    let mut command = convpass("finetune");
    assert_eq!(run(command.args(["--backbone", BACKBONE])).0, Some(2));
}
