//! Compares the distribution of the drawn operations with that of timm.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::*;

const DRAWS: u64 = 40_000;

fn golden() -> Value {
    let file = "tests/integration/fixtures/augment/draws.json";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Returns the name of an operation, and its argument, or 0 if it has none.
fn parts(op: ImageOp) -> (String, f64) {
    let text = format!("{op:?}");
    let (name, rest) = text.split_once('(').unwrap_or((&text, "0)"));
    (name.to_owned(), rest.trim_end_matches(')').parse().unwrap())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn std(values: &[f64]) -> f64 {
    let mean = mean(values);
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}

#[test]
fn operations_are_drawn_as_often_and_as_strong_as_in_timm() {
    let golden = golden();
    for text in ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8-mstd101"] {
        let augment: RandAugment = text.parse().unwrap();
        let mut seen: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for index in 0..DRAWS {
            for (op, _) in augment.draw(&mut generator(3, 1, index as usize)) {
                let (name, argument) = parts(op);
                seen.entry(name).or_default().push(argument);
            }
        }
        let rows = golden[text].as_object().unwrap();
        assert_eq!(seen.keys().collect::<Vec<_>>(), rows.keys().collect::<Vec<_>>());
        for (name, values) in &seen {
            let expected = |key: &str| rows[name][key].as_f64().unwrap();
            // The tolerance is six standard errors. The golden values come from 5 times as many
            // draws.
            let near = |what: &str, found: f64, key: &str, spread: f64| {
                let allowed = 6.0 * spread / (values.len() as f64).sqrt() + 1e-9;
                let off = (found - expected(key)).abs();
                assert!(off <= allowed, "{text} {name} {what}: {found} off by {off}");
            };
            let rate = values.len() as f64 / DRAWS as f64;
            assert!((rate - expected("rate")).abs() < 0.005, "{text} {name}: {rate}");
            let absolute: Vec<f64> = values.iter().map(|v| v.abs()).collect();
            near("mean", mean(values), "mean", std(values));
            near("mean of the size", mean(&absolute), "mean_abs", std(&absolute));
            let (spread, center) = (std(values), mean(values));
            let fourth: Vec<f64> = values.iter().map(|v| (v - center).powi(4)).collect();
            // The standard error of the standard deviation. It is large if a rare value differs
            // from all others.
            let error = (mean(&fourth) - spread.powi(4)).max(0.0).sqrt() / 2.0 / spread.max(1e-9);
            near("standard deviation", spread, "std", error);
            // Fewer draws may miss the rarest values, but no value may be outside the golden range.
            let allowed = 0.05 * (expected("max") - expected("min"));
            let low = values.iter().copied().fold(f64::INFINITY, f64::min);
            let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert!(low >= expected("min") - allowed, "{text} {name} from {low}");
            assert!(high <= expected("max") + allowed, "{text} {name} to {high}");
        }
    }
}

#[test]
fn parts_are_drawn_as_in_timm() {
    for (size, expected) in golden()["crops"].as_object().unwrap() {
        let (rows, columns) = size.split_once('x').unwrap();
        let size = (rows.parse().unwrap(), columns.parse().unwrap());
        let windows: Vec<_> = (0..DRAWS)
            .map(|index| {
                RandomResizedCrop::default().draw(size, &mut generator(5, 0, index as usize))
            })
            .collect();
        for w in &windows {
            assert!(w.rows > 0 && w.columns > 0);
            assert!(w.top + w.rows <= size.0 && w.left + w.columns <= size.1);
        }
        let column = |get: fn(&crop::Window) -> usize| -> Vec<f64> {
            windows.iter().map(|w| get(w) as f64).collect()
        };
        let found =
            [column(|w| w.top), column(|w| w.left), column(|w| w.rows), column(|w| w.columns)];
        for (at, values) in found.iter().enumerate() {
            let golden = |key: &str| expected[key][at].as_f64().unwrap();
            // The tolerance is six standard errors of the difference of two means over the same
            // number of draws.
            let allowed = 6.0 * std(values) * (2.0 / DRAWS as f64).sqrt() + 1e-9;
            assert!((mean(values) - golden("mean")).abs() <= allowed, "{size:?} {at}");
            assert!(
                (std(values) - golden("std")).abs() <= 0.03 * std(values) + 1e-9,
                "{size:?} {at}"
            );
        }
    }
}

#[test]
fn jitter_draws_each_factor_in_its_range_and_any_order() {
    let jitter = ColorJitter { hue: 0.1, ..ColorJitter::default() };
    let mut orders: BTreeMap<Vec<String>, usize> = BTreeMap::new();
    let mut factors: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for index in 0..DRAWS {
        let ops: Vec<_> =
            jitter.draw(&mut generator(1, 2, index as usize)).into_iter().map(parts).collect();
        *orders.entry(ops.iter().map(|(name, _)| name.clone()).collect()).or_default() += 1;
        ops.into_iter().for_each(|(name, factor)| factors.entry(name).or_default().push(factor));
    }
    assert_eq!(orders.len(), 24);
    assert!(orders.values().all(|&count| count.abs_diff(DRAWS as usize / 24) < 250), "{orders:?}");
    for (name, values) in &factors {
        let (center, range) = if name == "Hue" { (0.0, 0.1) } else { (1.0, 0.4) };
        assert!(values.iter().all(|v| (center - range..=center + range).contains(v)), "{name}");
        assert!((mean(values) - center).abs() < 0.02 * range, "{name}");
        assert!((std(values) - range / 3.0_f64.sqrt()).abs() < 0.02 * range, "{name}");
    }
    let none = ColorJitter { brightness: 0.0, contrast: 0.0, saturation: 0.0, hue: 0.0 };
    assert!(none.draw(&mut generator(1, 2, 3)).is_empty());
}

#[test]
fn seed_epoch_and_image_decide() {
    let noise = Array3::from_shape_fn((20, 24, 3), |(y, x, c)| (y * 91 + x * 57 + c * 33) as u8);
    let resize = Resize::bicubic((16, 16)).unwrap();
    let augment =
        Augment { crop: Some(RandomResizedCrop::default()), flip: 0.5, ..Augment::few_shot() };
    let apply = |key| augment.apply(noise.view(), resize, key).unwrap();
    let first = apply((7, 3, 5));
    assert_eq!(first, apply((7, 3, 5)));
    for other in [(8, 3, 5), (7, 4, 5), (7, 3, 6), (3, 7, 5), (5, 3, 7)] {
        assert_ne!(first, apply(other), "{other:?}");
    }
    // The value is fixed here so that a new version of a dependency cannot change runs unnoticed.
    let sum: u64 = first.iter().zip(1..).map(|(&value, place)| u64::from(value) * place).sum();
    assert_eq!(sum, 42_372_456);
}

#[test]
fn nothing_asked_for_is_the_resize_and_a_sure_flip_mirrors_it() {
    let image = Array3::from_shape_fn((5, 7, 3), |(y, x, c)| (y * 40 + x * 9 + c * 70) as u8);
    let resize = Resize::bicubic((4, 6)).unwrap();
    let plain = resize.apply(image.view()).unwrap();
    assert_eq!(Augment::default().apply(image.view(), resize, (1, 2, 3)).unwrap(), plain);
    let flipped = Augment { flip: 1.0, ..Augment::default() };
    let flipped = flipped.apply(image.view(), resize, (1, 2, 3)).unwrap();
    for ((y, x, c), &value) in flipped.indexed_iter() {
        assert_eq!(value, plain[(y, 5 - x, c)]);
    }
}
