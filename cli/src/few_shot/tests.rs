//! Nothing is selected on test images: they are not even there.

use std::path::Path;

use clap::Parser;

use super::*;
use crate::failure::chain;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: FewShotArgs,
}

/// Six images for each of two classes, of which one is brighter.
fn photos(folder: &Path) {
    for (class, light) in [("dark", 20), ("light", 180)] {
        std::fs::create_dir_all(folder.join(class)).unwrap();
        for at in 0..6u8 {
            let pixel = image::Rgb([light, light + 9 * at, light]);
            let file = folder.join(class).join(format!("{at}.png"));
            image::RgbImage::from_pixel(12, 12, pixel).save(file).unwrap();
        }
    }
}

#[test]
fn rates_are_chosen_and_members_trained_without_a_test_image() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    photos(&folder.path().join("train"));
    for select in ["cross-validation", "ensemble"] {
        photos(&folder.path().join("test"));
        let (train, test, out) = (path("train"), path("test"), path(select));
        let backbone =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/vit_fashion_mnist.safetensors");
        let line = ["few-shot", "--data", &train, "--test", &test, "--backbone", backbone];
        let select = ["--select", select, "--out", &out, "--shots", "4", "--seeds", "0"];
        let train = ["--method", "linear", "--augment", "none", "--epochs", "2"];
        let Line { args } = Line::parse_from([&line[..], &select, &train].concat());
        let method = args.method.chosen("").unwrap();
        let sets = Sets::read(&args).unwrap();
        let draws = Draw::all(&args, &sets.data, Path::new(&out)).unwrap();
        let opened = args.backbone.open(Path::new(backbone)).unwrap();
        let job = FewShotJob::new(&args, method, sets, opened).unwrap();
        std::fs::remove_dir_all(&test).unwrap();
        match args.select {
            args::Select::Ensemble => assert_eq!(job.members(&draws[0]).unwrap().len(), 3),
            _ => assert_eq!(job.cross_validated(&draws[0]).unwrap().1.folds, 4),
        }
        let error = job.run_all(&draws, &folder.path().join("results.csv")).unwrap_err();
        assert!(chain(&error).contains("0.png"), "{}", chain(&error));
    }
}
