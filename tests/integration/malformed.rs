//! Configs that are no model and weights that do not fit are errors, whatever is asked of them.

use convpass::backbone::{Forward, Network};
use convpass::backbone::{Frozen, Pass};
use convpass::{
    Backbone, ConvNeXtConfig, Error, FrozenConvNeXt, FrozenSwin, FrozenViT, Method, SwinConfig,
    ViTConfig, audit,
};
use tch::{Device, Kind, Tensor};

fn small_vit() -> ViTConfig {
    ViTConfig {
        image_size: (8, 8),
        patch_size: 4,
        embed_dim: 16,
        depth: 2,
        num_heads: 2,
        mlp_dim: 32,
        layer_scale: true,
        ..ViTConfig::default()
    }
}

/// Everything that a config can be asked without a model.
fn is_refused<C: Network>(config: &C) {
    let _asked = (config.num_blocks(), config.feature_dim(), config.image_size(), config.choices());
    for result in [
        config.validate(),
        config.shape().map(drop),
        audit(config, &Method::LinearProbe).map(drop),
        Frozen::random(config, 0, Device::Cpu).map(drop),
        Frozen::blank(config).map(drop),
    ] {
        assert!(matches!(result, Err(Error::Config { .. })), "{config:?}: {result:?}");
    }
}

#[test]
fn configs_that_are_no_model_are_errors() {
    for (depth, embed_dim) in [(-1, 16), (i64::MIN, 16), (i64::MAX, 16), (2, i64::MAX), (2, -16)] {
        is_refused(&ViTConfig { depth, embed_dim, ..small_vit() });
    }
    is_refused(&ViTConfig { patch_size: 0, ..small_vit() });
    is_refused(&ViTConfig { image_size: (i64::MAX, i64::MIN), ..small_vit() });
    is_refused(&ViTConfig { mlp_dim: i64::MAX, ..small_vit() });

    let swin = SwinConfig::default;
    is_refused(&SwinConfig { depths: vec![], num_heads: vec![], window_sizes: vec![], ..swin() });
    is_refused(&SwinConfig { depths: vec![2, -1, 2, 2], ..swin() });
    is_refused(&SwinConfig { depths: vec![i64::MAX; 4], ..swin() });
    is_refused(&SwinConfig { depths: vec![2; 100], ..swin() });
    is_refused(&SwinConfig { num_heads: vec![3], ..swin() });
    is_refused(&SwinConfig { window_sizes: vec![(7, 7)], ..swin() });
    is_refused(&SwinConfig { window_sizes: vec![(i64::MAX, 0); 4], ..swin() });
    is_refused(&SwinConfig { embed_dim: i64::MAX, ..swin() });
    is_refused(&SwinConfig { mlp_ratio: f64::NAN, ..swin() });

    let convnext = ConvNeXtConfig::default;
    is_refused(&ConvNeXtConfig { dims: vec![], ..convnext() });
    is_refused(&ConvNeXtConfig { dims: vec![], depths: vec![], ..convnext() });
    is_refused(&ConvNeXtConfig { dims: vec![96], ..convnext() });
    is_refused(&ConvNeXtConfig { depths: vec![3, 3, -9, 3], ..convnext() });
    is_refused(&ConvNeXtConfig { depths: vec![i64::MAX; 4], ..convnext() });
    is_refused(&ConvNeXtConfig { dims: vec![i64::MAX; 4], ..convnext() });
    is_refused(&ConvNeXtConfig { kernel_size: i64::MIN, ..convnext() });
    is_refused(&ConvNeXtConfig { patch_size: i64::MAX, ..convnext() });
}

fn replaced<C: Network>(
    backbone: &Frozen<C>,
    which: &str,
    by: impl Fn(&Tensor) -> Tensor,
) -> convpass::Result<Frozen<C>> {
    backbone.map_weights(&mut |name, weight| {
        Ok(if name == which { by(weight) } else { weight.shallow_clone() })
    })
}

#[test]
fn weights_that_do_not_fit_are_errors() {
    fn check<C: Network>(backbone: &Frozen<C>) {
        for (name, _) in backbone.named_weights() {
            let edits: [fn(&Tensor) -> Tensor; 6] = [
                |_| Tensor::new(),
                |t| t.unsqueeze(0),
                |t| Tensor::cat(&[t, t], 0),
                |t| t.flatten(0, -1).narrow(0, 0, 1).squeeze(),
                |t| t.to_kind(Kind::Int64),
                // A linear layer's would need a scale beside it.
                |t| t.to_kind(Kind::Int8),
            ];
            for (number, edit) in edits.into_iter().enumerate() {
                match replaced(backbone, name, edit) {
                    Err(Error::Input { argument: "weights", .. }) => {}
                    other => panic!("{name}, edit {number}: {other:?}"),
                }
            }
            assert!(replaced(backbone, name, |t| t.copy()).is_ok());
        }
        let same = backbone.clone();
        assert_eq!(Backbone::digest(&same).unwrap(), Backbone::digest(backbone).unwrap());
    }
    check(&FrozenViT::random(&small_vit(), 0, Device::Cpu).unwrap());
    let swin = SwinConfig {
        image_size: (16, 16),
        embed_dim: 4,
        depths: vec![1, 2],
        num_heads: vec![1, 2],
        window_sizes: vec![(2, 2), (2, 2)],
        ..SwinConfig::default()
    };
    check(&FrozenSwin::random(&swin, 0, Device::Cpu).unwrap());
    let convnext = ConvNeXtConfig { dims: vec![4, 8], depths: vec![1, 1], ..Default::default() };
    check(&FrozenConvNeXt::random(&convnext, 0, Device::Cpu).unwrap());
}

/// Weights in int8 may be replaced by others of their kind, or by floating-point ones, whose scale
/// is dropped.
#[test]
fn int8_is_replaced_with_its_scale() {
    let vit = FrozenViT::random(&small_vit(), 0, Device::Cpu).unwrap();
    let int8 = vit.to_int8().unwrap();
    let name = "blocks.0.attn.proj.weight";
    assert!(replaced(&int8, name, |t| t.copy()).unwrap().is_int8());
    let plain = replaced(&int8, name, |t| t.to_kind(Kind::Float)).unwrap();
    assert!(plain.named_weights().iter().all(|(n, _)| n != "blocks.0.attn.proj.scale"));
    assert_eq!(plain.named_weights().len() + 1, int8.named_weights().len());
    let scale = "blocks.0.attn.proj.scale";
    assert!(replaced(&int8, scale, |_| Tensor::new()).is_err());
    let images = Tensor::zeros([1, 3, 8, 8], (Kind::Float, Device::Cpu));
    assert!(plain.forward(&images, &convpass::seam::NoMethod, Pass::default()).is_ok());
}

/// A clone shares every weight with the backbone, in its layers too.
#[test]
fn a_clone_shares_its_weights() {
    let vit = FrozenViT::random(&small_vit(), 0, Device::Cpu).unwrap();
    let clone = vit.clone();
    let images = Tensor::ones([1, 3, 8, 8], (Kind::Float, Device::Cpu));
    let before = vit.features(&images).unwrap();
    assert_eq!(clone.features(&images).unwrap(), before);
    for (_, weight) in clone.named_weights() {
        let _doubled = weight.shallow_clone().f_mul_scalar_(2.0).unwrap();
    }
    assert_ne!(clone.features(&images).unwrap(), before);
    assert_eq!(clone.features(&images).unwrap(), vit.features(&images).unwrap());
}
