//! Augmentation against what Pillow, timm and torchvision make of the same images.

use std::fs;
use std::path::PathBuf;

use convpass::Error;
use convpass::data::{Augment, ImageOp, RandAugment, Resize, decode_image};
use ndarray::{Array3, ArrayView3, s};

use crate::golden::fixtures;

const FILL: [u8; 3] = [124, 116, 104];

fn fixture(name: &str) -> PathBuf {
    fixtures().join("augment").join(name)
}

fn image(name: &str) -> Array3<u8> {
    decode_image(fixture(&format!("{name}.png"))).unwrap()
}

/// Each line of a list with its strip of the image of that name.
fn strips(name: &str) -> Vec<(Vec<String>, Array3<u8>)> {
    let text = fs::read_to_string(fixture(&format!("{name}.txt"))).unwrap();
    let lines: Vec<Vec<String>> =
        text.lines().map(|line| line.split(' ').map(str::to_owned).collect()).collect();
    let strips = image(name);
    let rows = strips.dim().0 / lines.len();
    let strip =
        |index: usize| strips.slice(s![index * rows..(index + 1) * rows, .., ..]).to_owned();
    lines.into_iter().enumerate().map(|(index, line)| (line, strip(index))).collect()
}

fn worst(found: ArrayView3<u8>, expected: ArrayView3<u8>) -> u8 {
    assert_eq!(found.dim(), expected.dim());
    found.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

/// The operation of that name in the golden files.
fn op(name: &str, argument: f64) -> ImageOp {
    match name {
        "AutoContrast" => ImageOp::AutoContrast,
        "Equalize" => ImageOp::Equalize,
        "Invert" => ImageOp::Invert,
        "Rotate" => ImageOp::Rotate(argument),
        "Posterize" => ImageOp::Posterize(argument as u32),
        "Solarize" => ImageOp::Solarize(argument as u16),
        "SolarizeAdd" => ImageOp::SolarizeAdd(argument as u8),
        "Color" => ImageOp::Color(argument),
        "Contrast" => ImageOp::Contrast(argument),
        "Brightness" => ImageOp::Brightness(argument),
        "Sharpness" => ImageOp::Sharpness(argument),
        "ShearX" => ImageOp::ShearX(argument),
        "ShearY" => ImageOp::ShearY(argument),
        "TranslateX" => ImageOp::TranslateX(argument),
        "TranslateY" => ImageOp::TranslateY(argument),
        "Hue" => ImageOp::Hue(argument),
        other => panic!("{other}"),
    }
}

#[test]
fn every_operation_equals_pillow() {
    let cases = strips("ops");
    assert_eq!(cases.len(), 133);
    let mut off = Vec::new();
    for (line, expected) in cases {
        let [source, name, argument, sampling] = &line[..] else { panic!("{line:?}") };
        let op = op(name, argument.parse().unwrap());
        let found = op.apply(image(source).view(), sampling == "bicubic", FILL).unwrap();
        let worst = worst(found.view(), expected.view());
        if worst > 0 {
            off.push(format!("{source} {op:?} {sampling}: {worst}"));
        }
    }
    assert!(off.is_empty(), "{}", off.join("\n"));
    let equalized = ImageOp::Equalize.apply(image("large").view(), true, FILL).unwrap();
    assert_eq!(equalized, image("large_equalize"));
}

#[test]
fn a_part_resized_equals_torchvision() {
    for (line, expected) in strips("crops") {
        let [top, left, rows, columns] =
            std::array::from_fn(|at| line[at + 1].parse::<usize>().unwrap());
        let resize = match line[5].as_str() {
            "bilinear" => Resize::bilinear((9, 11)),
            _ => Resize::bicubic((9, 11)),
        };
        let source = image(&line[0]);
        let part = source.slice(s![top..top + rows, left..left + columns, ..]);
        assert_eq!(resize.unwrap().apply(part).unwrap(), expected, "{line:?}");
    }
}

#[test]
fn resize_and_center_crop_equal_torchvision() {
    let large = image("large");
    let tall = large.view().permuted_axes([1, 0, 2]);
    for (name, shorter, size) in
        [("wide", 16, (14, 14)), ("tall", 9, (8, 5)), ("up", 70, (19, 22)), ("same", 40, (17, 16))]
    {
        let resize = Resize::center_crop(shorter, size).unwrap();
        let source = if name == "tall" { tall } else { large.view() };
        let golden = format!("center_{name}_{shorter}_{}x{}", size.0, size.1);
        assert_eq!(resize.apply(source).unwrap(), image(&golden), "{golden}");
    }
    for shorter in [15, 0, -1, 65_536] {
        let refused = Resize::center_crop(shorter, (16, 9));
        assert!(matches!(refused, Err(Error::Config { .. })), "{shorter}");
    }
    let thin = Array3::zeros((1, 60_000, 3));
    let refused = Resize::center_crop(256, (224, 224)).unwrap().apply(thin.view());
    assert!(matches!(refused, Err(Error::Input { .. })));
}

#[test]
fn odd_arguments_and_images_do_not_panic() {
    let names = ["Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"];
    let more = ["Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Hue"];
    for shape in [(1, 1, 3), (1, 7, 3), (5, 1, 3), (2, 2, 3)] {
        let image = Array3::from_shape_fn(shape, |(y, x, c)| (y * 71 + x * 40 + c * 90) as u8);
        for name in names.iter().chain(&more).chain(&["AutoContrast", "Equalize", "Invert"]) {
            for argument in [f64::NAN, f64::INFINITY, -1e300, 1e300, -3.0, 0.0, 1e9] {
                let changed = op(name, argument).apply(image.view(), true, FILL).unwrap();
                assert_eq!(changed.dim(), shape);
            }
        }
    }
    for shape in [(0, 4, 3), (4, 0, 3), (4, 4, 1)] {
        let image = Array3::zeros(shape);
        let refused = ImageOp::Invert.apply(image.view(), true, FILL);
        assert!(matches!(refused, Err(Error::Input { .. })), "{shape:?}");
        let resize = Resize::bicubic((4, 4)).unwrap();
        for augment in [Augment::few_shot(), Augment::domain_generalization()] {
            let refused = augment.apply(image.view(), resize, (0, 0, 0));
            assert!(matches!(refused, Err(Error::Input { .. })), "{shape:?}");
        }
    }
    let black = ImageOp::Posterize(0).apply(Array3::from_elem((2, 2, 3), 255).view(), true, FILL);
    assert!(black.unwrap().iter().all(|&value| value == 0));
}

#[test]
fn timm_texts_are_read() {
    let default: RandAugment = "rand-m9-mstd0.5-inc1".parse().unwrap();
    assert_eq!(default, RandAugment::default());
    let other: RandAugment = "rand-m7-n3-p0.8-mstd101-mmax15".parse().unwrap();
    assert_eq!((other.magnitude, other.num_ops, other.prob), (7.0, 3, 0.8));
    assert_eq!((other.magnitude_std, other.magnitude_max, other.increasing), (101.0, 15.0, false));
    for text in [
        "",
        "rand-x3",
        "original-mstd0.5",
        "rand-m",
        "rand-n-1",
        "rand-p1.5",
        "rand--",
        "rand-\u{e9}1",
    ] {
        assert!(matches!(text.parse::<RandAugment>(), Err(Error::Config { .. })), "{text}");
    }
}

#[test]
fn a_configuration_survives_json_and_bad_ones_are_refused() {
    for augment in [Augment::few_shot(), Augment::domain_generalization(), Augment::default()] {
        augment.validate().unwrap();
        let text = serde_json::to_string(&augment).unwrap();
        assert_eq!(serde_json::from_str::<Augment>(&text).unwrap(), augment);
    }
    for text in [
        r#"{"flip": 1.5}"#,
        r#"{"crop": {"scale": [0.0, 1.0]}}"#,
        r#"{"crop": {"scale": [0.5, 0.4]}}"#,
        r#"{"crop": {"ratio": [0.0, 1.0]}}"#,
        r#"{"rand_augment": {"prob": -0.1}}"#,
        r#"{"rand_augment": {"magnitude": -1}}"#,
        r#"{"rand_augment": {"num_ops": 101}}"#,
        r#"{"color_jitter": {"brightness": -0.1}}"#,
        r#"{"color_jitter": {"hue": 0.6}}"#,
    ] {
        let augment: Augment = serde_json::from_str(text).unwrap();
        assert!(matches!(augment.validate(), Err(Error::Config { .. })), "{text}");
        let image = Array3::zeros((4, 4, 3));
        let refused = augment.apply(image.view(), Resize::bicubic((4, 4)).unwrap(), (0, 0, 0));
        assert!(matches!(refused, Err(Error::Config { .. })), "{text}");
    }
}
