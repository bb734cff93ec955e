//! Tests of a whole search: it stays within its budget, is repeatable, and ends when it is asked
//! to.

use std::ops::ControlFlow;

use convpass::data::{ImageDataset, Normalization};
use convpass::eval::evaluate;
use convpass::train::{CosineSchedule, Observer, Silent, StepReport, Stepped, TrainConfig};
use convpass::{Backbone, FrozenViT, Method, PetlConfig, PetlModel, ViTConfig};
use ndarray::Array4;
use tch::Device;

use super::{EvolutionConfig, SearchModule, SearchSpace, Supernet, Widths, evolve};

/// A ViT for images of 16x16 with 16 patches and two blocks of width 32; its weights never change.
fn small_vit() -> FrozenViT {
    let config = ViTConfig {
        image_size: (16, 16),
        patch_size: 4,
        embed_dim: 32,
        depth: 2,
        num_heads: 2,
        mlp_dim: 64,
        ..ViTConfig::default()
    };
    FrozenViT::random(&config, 3, Device::Cpu).unwrap()
}

/// Two classes of 16x16 images: bright in the upper half or in the lower one.
fn halves(count: usize) -> ImageDataset {
    let images = Array4::from_shape_fn((count, 16, 16, 3), |(n, row, column, channel)| {
        let lit = (row < 8) == (n % 2 == 0);
        let noise = ((n * 29 + row * 13 + column * 5 + channel * 3) % 64) as u8;
        if lit { 160 + noise } else { noise }
    });
    ImageDataset::from_arrays(images, (0..count).map(|n| (n % 2) as i64).collect(), 2).unwrap()
}

fn supernet() -> Supernet {
    let backbone = small_vit();
    let space = SearchSpace::new(SearchModule::noah(), &backbone.shape()).unwrap();
    Supernet::new(backbone, space, 2, 5).unwrap()
}

fn config(epochs: usize) -> TrainConfig {
    TrainConfig {
        epochs,
        batch_size: 8,
        schedule: CosineSchedule {
            lr: 1e-2,
            warmup_epochs: 1,
            stepped: Stepped::EachStep,
            ..CosineSchedule::default()
        },
        normalization: Normalization::Half,
        seed: 9,
        ..TrainConfig::default()
    }
}

/// Supernet, evolution, and the best mix's method, within half of the supernet's weights.
fn search() -> (Supernet, Method) {
    let mut supernet = supernet();
    supernet.train(&halves(40), &config(3), &mut Silent).unwrap();
    let val = halves(20);
    let mut score = |widths: &Widths| {
        let go_on = &mut |_, _| ControlFlow::Continue(());
        let sums = evaluate(&supernet.subnet(widths)?, &val, Normalization::Half, 20, go_on)?;
        Ok(ControlFlow::Continue(-sums.loss()))
    };
    let space = supernet.space();
    let budget = space.num_params(&space.widest()).unwrap() / 2;
    let config =
        EvolutionConfig { generations: 3, population: 8, parents: 3, ..EvolutionConfig::default() };
    let history = evolve(space, budget, &config, &mut score).unwrap();
    assert_eq!(history.generations.iter().map(Vec::len).collect::<Vec<_>>(), [8, 8, 8]);
    assert!(history.generations.iter().flatten().all(|candidate| candidate.params <= budget));
    let method = space.method(&history.best().unwrap().widths).unwrap();
    (supernet, method)
}

/// Each search is a process of its own, as in `training::a_seed_repeats_a_run_byte_for_byte`.
#[test]
fn a_seed_repeats_a_search_byte_for_byte() {
    const OUT: &str = "CONVPASS_TEST_SEARCH_TO";
    if let Some(out) = std::env::var_os(OUT) {
        // More threads only wait for each other on matrix products this small.
        tch::set_num_threads(1);
        let (supernet, method) = search();
        let config = PetlConfig::new(method.clone(), 2);
        let found = PetlModel::new(supernet.model().backbone().clone(), &config).unwrap();
        assert!(found.trainable_params().method <= supernet.model().trainable_params().method / 2);
        supernet.model().save_adapter(&out).unwrap();
        let mut bytes = std::fs::read(&out).unwrap();
        bytes.extend(serde_json::to_vec(&method).unwrap());
        return std::fs::write(out, bytes).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str| {
        let out = folder.path().join(name);
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "search::tests::a_seed_repeats_a_search_byte_for_byte"])
            .env(OUT, &out)
            .status()
            .unwrap();
        assert!(status.success());
        std::fs::read(out).unwrap()
    };
    assert!(run("first") == run("second"));
}

/// Ends the run in its second epoch.
struct StopInSecondEpoch;

impl Observer for StopInSecondEpoch {
    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        match step.epoch {
            1 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }
}

#[test]
fn an_observer_ends_the_supernets_training() {
    let run = supernet().train(&halves(40), &config(6), &mut StopInSecondEpoch).unwrap();
    assert_eq!((run.epochs.len(), run.selected_epoch, run.stopped), (1, None, true));
}
