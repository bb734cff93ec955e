//! A frozen backbone out of a checkpoint.

use std::collections::HashSet;
use std::path::Path;

use tch::{Device, Tensor};

use super::infer::{infer, square_root, usual_prefix};
use super::plan::Plan;
use super::{LoadReport, TensorFile};
use crate::backbone::{FrozenViT, ViTConfig};
use crate::error::Result;
use crate::nn::resize_pos_embed;

impl FrozenViT {
    /// Opens a checkpoint on `device`: recognizes its format, takes the config that it tells
    /// ([`ViTConfig::infer`]) and loads it strictly, in f32.
    ///
    /// # Errors
    /// As [`FrozenViT::open_with`] and [`ViTConfig::infer`].
    pub fn open(path: impl AsRef<Path>, device: Device) -> Result<Self> {
        Ok(Self::open_reported(path, None, device)?.0)
    }

    /// Opens a checkpoint with a config of the caller's. A position table for another number of
    /// patches is resized (bicubic and antialiased, as timm does it), if it is for a square grid.
    /// A table of exactly the config's patches and the prefix rows that its family usually has is
    /// taken so, whatever `pos_embed_prefix` says: 16 rows are a class token and a grid of 3x5
    /// where the config says 3x5, though [`ViTConfig::infer`] read a grid of 4x4.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) if `config` is no model; with the name in the file:
    /// [`Error::MissingTensor`](crate::Error::MissingTensor),
    /// [`Error::ShapeMismatch`](crate::Error::ShapeMismatch) and
    /// [`Error::UnexpectedTensors`](crate::Error::UnexpectedTensors); and as [`TensorFile::open`].
    pub fn open_with(path: impl AsRef<Path>, config: &ViTConfig, device: Device) -> Result<Self> {
        Ok(Self::open_reported(path, Some(config), device)?.0)
    }

    /// As [`FrozenViT::open`] or, given a config, [`FrozenViT::open_with`], and what became of
    /// each tensor of the file.
    ///
    /// # Errors
    /// As those.
    pub fn open_reported(
        path: impl AsRef<Path>,
        config: Option<&ViTConfig>,
        device: Device,
    ) -> Result<(Self, LoadReport)> {
        let file = TensorFile::open(path)?;
        let plan = Plan::new(&file)?;
        plan.check_names()?;
        let config = match config {
            Some(config) => fit_prefix(&plan, config)?,
            None => infer(&plan)?,
        };
        let mut taken = HashSet::new();
        let backbone = Self::from_source(&config, &mut |name, shape| {
            let weight = match name {
                "pos_embed" => read_positions(&plan, shape, &config)?,
                _ => plan.read(name, shape, config.num_heads)?,
            };
            taken.insert(name.to_owned());
            Ok(weight.f_to_device(device)?)
        })?;
        let report = plan.report(|name| taken.contains(name))?;
        Ok((backbone, report))
    }
}

/// The config with the family's usual prefix rows where the position table fits it with those.
fn fit_prefix(plan: &Plan, config: &ViTConfig) -> Result<ViTConfig> {
    config.validate()?;
    let mut config = config.clone();
    let usual = usual_prefix(plan, config.class_token);
    if plan.shape("pos_embed", 3)?[1] == usual + config.layout().num_patches() {
        config.pos_embed_prefix = usual;
    }
    Ok(config)
}

/// The position table `[1, prefix + N, C]`, resized where the file's is for another square grid.
fn read_positions(plan: &Plan, shape: &[i64], config: &ViTConfig) -> Result<Tensor> {
    let (name, prefix) = ("pos_embed", config.pos_embed_prefix);
    let found = plan.shape(name, shape.len())?;
    let side = found[1].checked_sub(prefix).and_then(square_root);
    match side {
        // The same number of patches is the same table, whatever its grid.
        Some(side) if found[1] != shape[1] => {
            let stored = plan.read(name, &[shape[0], found[1], shape[2]], config.num_heads)?;
            resize_pos_embed(&stored, prefix, (side, side), config.grid())
        }
        _ => plan.read(name, shape, config.num_heads),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use tch::Kind;

    use super::*;
    use crate::backbone::{Backbone, MlpActivation, Pooling};
    use crate::error::Error;

    fn small() -> ViTConfig {
        ViTConfig {
            image_size: (8, 8),
            patch_size: 4,
            embed_dim: 8,
            depth: 2,
            num_heads: 1,
            mlp_dim: 12,
            ..ViTConfig::default()
        }
    }

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/integration/fixtures").join(name)
    }

    /// The weights of a random model, saved under timm's names after `edit`.
    fn saved(
        folder: &Path,
        config: &ViTConfig,
        edit: impl FnOnce(&mut Vec<(String, Tensor)>),
    ) -> PathBuf {
        let vit = FrozenViT::random(config, 3, Device::Cpu).unwrap();
        let shared = vit.named_weights().iter().map(|(n, t)| (n.clone(), t.shallow_clone()));
        let mut weights = shared.collect();
        edit(&mut weights);
        let path = folder.join("model.safetensors");
        Tensor::write_safetensors(&weights, &path).unwrap();
        path
    }

    #[test]
    fn what_is_saved_is_inferred_and_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let plain = small();
        for config in [
            ViTConfig { layer_scale: true, num_registers: 3, ..plain.clone() },
            ViTConfig { embed_dim: 128, num_heads: 2, ..plain.clone() },
            ViTConfig { activation: MlpActivation::SwiGlu, qkv_bias: false, ..plain.clone() },
            ViTConfig { pooling: Pooling::AverageThenNorm, ..plain.clone() },
            ViTConfig {
                class_token: false,
                pos_embed_prefix: 0,
                pooling: Pooling::Average,
                ..plain.clone()
            },
            ViTConfig {
                pre_norm: true,
                patch_bias: false,
                norm_eps: 1e-5,
                projection: Some(5),
                ..plain
            },
        ] {
            let path = saved(folder.path(), &config, |_| {});
            assert_eq!(ViTConfig::infer(&path).unwrap(), config);
            let vit = FrozenViT::open(&path, Device::Cpu).unwrap();
            assert_eq!(vit.digest(), FrozenViT::random(&config, 3, Device::Cpu).unwrap().digest());
        }
    }

    #[test]
    fn a_config_that_is_not_the_files_is_told_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = saved(folder.path(), &small(), |_| {});
        let open = |config| FrozenViT::open_with(&path, &config, Device::Cpu).unwrap_err();
        match open(ViTConfig { depth: 3, ..small() }) {
            Error::MissingTensor { name, expected, .. } => {
                assert_eq!((name.as_str(), &expected[..]), ("blocks.2.norm1.weight", &[8][..]));
            }
            error => panic!("{error}"),
        }
        match open(ViTConfig { depth: 1, ..small() }) {
            Error::UnexpectedTensors { names, .. } => {
                assert!(
                    names.iter().all(|name| name.starts_with("blocks.1.")) && names.len() == 12
                );
            }
            error => panic!("{error}"),
        }
        match open(ViTConfig { embed_dim: 16, ..small() }) {
            Error::ShapeMismatch { name, expected, found, .. } => {
                assert_eq!(name, "cls_token");
                assert_eq!((expected, found), (vec![1, 1, 16], vec![1, 1, 8]));
            }
            error => panic!("{error}"),
        }
        let error = open(ViTConfig { patch_size: 0, ..small() });
        assert!(matches!(error, Error::Config { .. }), "{error}");
    }

    #[test]
    fn every_tensor_has_a_place_or_a_reason() {
        let folder = tempfile::tempdir().unwrap();
        let extra =
            |name: &str| (name.to_owned(), Tensor::zeros([3, 8], (Kind::Float, Device::Cpu)));
        let path = saved(folder.path(), &small(), |weights| weights.push(extra("head.weight")));
        let (_, report) = FrozenViT::open_reported(&path, None, Device::Cpu).unwrap();
        assert_eq!(report.applied.len(), 30);
        assert_eq!(report.skipped[0].0, "head.weight");

        let path = saved(folder.path(), &small(), |weights| weights.push(extra("dist_token")));
        let error = FrozenViT::open(&path, Device::Cpu).unwrap_err();
        assert!(
            matches!(&error, Error::UnexpectedTensors { names, .. } if names == &["dist_token"])
        );

        let path = saved(folder.path(), &small(), |weights| weights.retain(|w| w.0 != "norm.bias"));
        let error = FrozenViT::open(&path, Device::Cpu).unwrap_err();
        assert!(matches!(&error, Error::MissingTensor { name, .. } if name == "norm.bias"));

        let path = saved(folder.path(), &small(), |weights| weights.retain(|w| w.0 == "norm.bias"));
        let error = FrozenViT::open(&path, Device::Cpu).unwrap_err();
        assert!(matches!(&error, Error::UnknownFormat { .. }), "{error}");
    }

    #[test]
    fn flax_names_and_shapes_are_those_of_the_file() {
        let path = fixture("google_npz/in21k/model.npz");
        let config = ViTConfig::infer(&path).unwrap();
        let open = |config| FrozenViT::open_with(&path, &config, Device::Cpu).unwrap_err();
        match open(ViTConfig { depth: config.depth + 1, ..config.clone() }) {
            Error::MissingTensor { name, .. } => {
                assert!(name.ends_with("encoderblock_2/LayerNorm_0/scale"), "{name}");
            }
            error => panic!("{error}"),
        }
        match open(ViTConfig { num_heads: 1, ..config.clone() }) {
            Error::ShapeMismatch { expected, found, .. } => {
                let (c, heads) = (config.embed_dim, config.num_heads);
                assert_eq!(expected, [c, 1, c]);
                assert_eq!(found, [c, heads, c / heads]);
            }
            error => panic!("{error}"),
        }
    }

    #[test]
    fn the_usual_prefix_wins_where_it_fits() {
        let folder = tempfile::tempdir().unwrap();
        let config = ViTConfig { image_size: (12, 20), ..small() };
        let path = saved(folder.path(), &config, |_| {});
        let inferred = ViTConfig::infer(&path).unwrap();
        assert_eq!((inferred.image_size, inferred.pos_embed_prefix), ((16, 16), 0));
        let corrected = ViTConfig { image_size: (12, 20), ..inferred };
        let vit = FrozenViT::open_with(&path, &corrected, Device::Cpu).unwrap();
        assert_eq!(vit.config(), &config);
    }

    #[test]
    fn damaged_checkpoints_open_or_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("damaged");
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for name in ["timm_vit/registers/model.safetensors", "google_npz/in21k/model.npz"] {
            let bytes = std::fs::read(fixture(name)).unwrap();
            for _ in 0..300 {
                let mut damaged = bytes.clone();
                // The headers are where a byte decides something: at the start or at the end.
                let at = rng.random_range(0..bytes.len().min(6000));
                let at = if rng.random() { at } else { bytes.len() - 1 - at };
                damaged[at] = *[b'0', b'9', b'1', 0xff].get(rng.random_range(0..4)).unwrap();
                std::fs::write(&path, &damaged).unwrap();
                let _ = FrozenViT::open(&path, Device::Cpu);
            }
        }
    }
}
