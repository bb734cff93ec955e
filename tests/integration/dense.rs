//! Dense features and tokens between blocks, of backbones and of adapted models.

use convpass::backbone::Pass;
use convpass::backbone::{Forward, Stream};
use convpass::petl::{
    AdaptFormerConfig, AdapterConfig, FactConfig, RepAdapterConfig, SsfConfig, VptConfig,
};
use convpass::seam::NoMethod;
use convpass::{
    Backbone, ConvBypassConfig, ConvNeXtConfig, Error, FrozenConvNeXt, FrozenSwin, FrozenViT,
    LoraConfig, Method, PetlConfig, PetlModel, Pooling, SwinConfig, ViTConfig,
};
use tch::{Device, Kind, Tensor};

use crate::support::{Close, device};

const ROWS: i64 = 3;
const COLS: i64 = 5;

fn small_vit(pooling: Pooling) -> ViTConfig {
    ViTConfig {
        image_size: (4 * ROWS, 4 * COLS),
        patch_size: 4,
        embed_dim: 24,
        depth: 3,
        num_heads: 4,
        mlp_dim: 48,
        num_registers: 2,
        pos_embed_prefix: 0,
        pooling,
        ..ViTConfig::default()
    }
}

fn small_swin() -> SwinConfig {
    SwinConfig {
        image_size: (4 * ROWS, 4 * COLS),
        embed_dim: 8,
        depths: vec![2, 2],
        num_heads: vec![1, 2],
        window_sizes: vec![(2, 2), (2, 2)],
        ..SwinConfig::default()
    }
}

fn images() -> Tensor {
    let count = 2 * 3 * 16 * ROWS * COLS;
    let steps = Tensor::arange(count, (Kind::Double, Device::Cpu));
    let wave = (steps * 12.9898).sin() * 43.758;
    wave.sin().to_kind(Kind::Float).view([2, 3, 4 * ROWS, 4 * COLS]).to_device(device())
}

fn weight<'a>(backbone: &'a impl Backbone, name: &str) -> &'a Tensor {
    &backbone.named_weights().iter().find(|(own, _)| own == name).unwrap().1
}

/// A block of a ViT in as many plain operations: every token computed, nothing split.
fn naive_block(vit: &FrozenViT, x: &Tensor, block: usize) -> Tensor {
    let w = |part: &str| weight(vit, &format!("blocks.{block}.{part}"));
    let norm = |x: &Tensor, part: &str| {
        let (scale, shift) = (w(&format!("{part}.weight")), w(&format!("{part}.bias")));
        x.layer_norm(scale.size(), Some(scale), Some(shift), vit.config().norm_eps, false)
    };
    let linear = |x: &Tensor, part: &str| {
        x.linear(w(&format!("{part}.weight")), Some(w(&format!("{part}.bias"))))
    };
    let (b, t, c) = x.size3().unwrap();
    let heads = vit.config().num_heads;
    let qkv = linear(&norm(x, "norm1"), "attn.qkv").view([b, t, 3, heads, c / heads]);
    let qkv = qkv.permute([2, 0, 3, 1, 4]);
    let scores = qkv.get(0).matmul(&qkv.get(1).transpose(2, 3)) / ((c / heads) as f64).sqrt();
    let mixed = scores.softmax(-1, Kind::Float).matmul(&qkv.get(2));
    let x = x + linear(&mixed.transpose(1, 2).reshape([b, t, c]), "attn.proj");
    let hidden = linear(&norm(&x, "norm2"), "mlp.fc1").gelu("none");
    &x + linear(&hidden, "mlp.fc2")
}

#[test]
fn patch_features_of_a_vit_are_those_of_plain_operations() {
    for pooling in [Pooling::ClassToken, Pooling::Average, Pooling::AverageThenNorm] {
        let vit = FrozenViT::random(&small_vit(pooling), 3, device()).unwrap();
        let norm = if pooling == Pooling::AverageThenNorm { "fc_norm" } else { "norm" };
        let embedded = vit.run_embed(&images(), &NoMethod, Pass::default()).unwrap();
        assert_eq!(embedded.layout.prefix, 3);
        let tokens = (0..3).fold(embedded.tokens, |x, block| naive_block(&vit, &x, block));
        let (scale, shift) =
            (weight(&vit, &format!("{norm}.weight")), weight(&vit, &format!("{norm}.bias")));
        let tokens = tokens.layer_norm([24], Some(scale), Some(shift), 1e-6, false);
        let map = tokens.narrow(1, 3, ROWS * COLS).transpose(1, 2).reshape([2, 24, ROWS, COLS]);

        let found = vit.patch_features(&images()).unwrap();
        assert_eq!(found.size(), [2, 24, ROWS, COLS]);
        assert!(found.is_close(&map, 1e-5, 1e-5), "{pooling:?}");
        // What is pooled from them, where pooling comes after the norm.
        let features = vit.features(&images()).unwrap();
        match pooling {
            Pooling::ClassToken => {
                assert!(features.is_close(&tokens.select(1, 0), 1e-5, 1e-5))
            }
            Pooling::Average => {
                let mean = found.mean_dim([2i64, 3].as_slice(), false, Kind::Float);
                assert!(features.is_close(&mean, 1e-5, 1e-5));
            }
            _ => {}
        }
    }
}

/// The class token of a dense pass is that of `features`, which computes it alone in the last block.
#[test]
fn tokens_after_the_last_block_hold_the_class_token() {
    let vit = FrozenViT::random(&small_vit(Pooling::ClassToken), 3, device()).unwrap();
    let all = vit.intermediate(&images(), &[2, 0, 2]).unwrap();
    let sizes: Vec<_> = all.iter().map(|stream| stream.tokens.size()).collect();
    assert_eq!(sizes, vec![vec![2, 3 + ROWS * COLS, 24]; 3]);
    assert_eq!(all[0].tokens, all[2].tokens);
    assert_ne!(all[0].tokens, all[1].tokens);
    assert_eq!(all[1].patches().unwrap().size(), [2, 24, ROWS, COLS]);
    let last = all.into_iter().next().unwrap();
    let pooled = vit.run_pool(last, &NoMethod, Pass::default()).unwrap();
    assert!(pooled.is_close(&vit.features(&images()).unwrap(), 1e-5, 1e-6));
    assert!(vit.intermediate(&images(), &[]).unwrap().is_empty());
}

#[test]
fn a_swin_has_a_map_of_its_last_stage() {
    let swin = FrozenSwin::random(&small_swin(), 3, device()).unwrap();
    let map = swin.patch_features(&images()).unwrap();
    assert_eq!(map.size(), [2, 16, 2, 3]);
    let mean = map.mean_dim([2i64, 3].as_slice(), false, Kind::Float);
    assert!(mean.is_close(&swin.features(&images()).unwrap(), 1e-5, 1e-6));
    let sizes: Vec<_> =
        swin.intermediate(&images(), &[1, 2]).unwrap().iter().map(map_size).collect();
    assert_eq!(sizes, [[2, 8, ROWS, COLS], [2, 16, 2, 3]]);
}

fn map_size(stream: &Stream) -> [i64; 4] {
    stream.patches().unwrap().size().try_into().unwrap()
}

#[test]
fn a_convnext_has_its_last_map() {
    let config = ConvNeXtConfig { dims: vec![8, 12], depths: vec![1, 2], ..Default::default() };
    let convnext = FrozenConvNeXt::random(&config, 3, device()).unwrap();
    let map = convnext.patch_features(&images()).unwrap();
    assert_eq!(map.size(), [2, 12, 1, 2]);
    let last = convnext.intermediate(&images(), &[2]).unwrap().remove(0).patches().unwrap();
    let (scale, shift) =
        (weight(&convnext, "head.norm.weight"), weight(&convnext, "head.norm.bias"));
    let normed = last.permute([0, 2, 3, 1]).layer_norm([12], Some(scale), Some(shift), 1e-6, false);
    assert!(map.is_close(&normed.permute([0, 3, 1, 2]), 1e-5, 1e-6));
}

fn methods() -> Vec<Method> {
    vec![
        Method::LinearProbe,
        Method::BitFit,
        Method::ConvBypass(ConvBypassConfig::default()),
        Method::Adapter(AdapterConfig::default()),
        Method::AdaptFormer(AdaptFormerConfig::default()),
        Method::Lora(LoraConfig::default()),
        Method::Ssf(SsfConfig { init_std: 0.0 }),
        Method::RepAdapter(RepAdapterConfig::default()),
        Method::Fact(FactConfig::default()),
    ]
}

/// The trainables, moved away from where they start.
fn disturb<B: Backbone>(model: &PetlModel<B>) {
    tch::no_grad(|| {
        for (name, mut variable) in model.var_store().variables() {
            if !name.starts_with("head.") {
                let steps = Tensor::arange(variable.numel() as i64, (Kind::Float, device()));
                let _added = variable.f_add_(&(steps.sin() * 0.1).view_as(&variable)).unwrap();
            }
        }
    });
}

fn check_methods<B: Backbone>(backbone: &B, methods: Vec<Method>) {
    let frozen = backbone.patch_features(&images()).unwrap();
    for method in methods {
        let name = method.name().to_owned();
        let model = PetlModel::new(backbone.clone(), &PetlConfig::new(method, 4)).unwrap();
        let map = model.patch_features(&images()).unwrap();
        assert_eq!(map.size(), frozen.size(), "{name}");
        if model.config().method.starts_as_identity() {
            assert!(map.is_close(&frozen, 1e-5, 1e-6), "{name} at its start");
        }
        if name != "linear_probe" {
            disturb(&model);
            let adapted = model.patch_features(&images()).unwrap();
            assert!(!adapted.is_close(&map, 1e-3, 1e-3), "{name} changes nothing");
        }
        let streams = model.intermediate(&images(), &[0, 1]).unwrap();
        assert!(streams.iter().all(|stream| stream.patches().is_ok()), "{name}");
    }
}

#[test]
fn a_method_that_starts_as_the_identity_leaves_dense_features_as_they_are() {
    for pooling in [Pooling::ClassToken, Pooling::AverageThenNorm] {
        let vit = FrozenViT::random(&small_vit(pooling), 3, device()).unwrap();
        check_methods(&vit, methods());
    }
    let swin = FrozenSwin::random(&small_swin(), 3, device()).unwrap();
    check_methods(&swin, methods().into_iter().filter(|m| m.name() != "fact").collect());
}

#[test]
fn prompts_are_never_in_the_map() {
    let vit = FrozenViT::random(&small_vit(Pooling::ClassToken), 3, device()).unwrap();
    let vpt = Method::Vpt(VptConfig::default());
    check_methods(&vit, vec![vpt.clone()]);
    let prompts = VptConfig::default().num_tokens;
    let model = PetlModel::new(vit, &PetlConfig::new(vpt, 4)).unwrap();
    let streams = model.intermediate(&images(), &[0, 2]).unwrap();
    assert!(streams.iter().all(|stream| stream.layout.prefix == 3 + prompts));
    // The map is the tail of the tokens.
    let last = &streams[1];
    let tail = last.tokens.narrow(1, 3 + prompts, ROWS * COLS);
    let map = last.patches().unwrap().flatten(2, 3).transpose(1, 2);
    assert_eq!(map, tail);
}

#[test]
fn merged_models_and_training_have_dense_features_too() {
    let vit = FrozenViT::random(&small_vit(Pooling::ClassToken), 3, device()).unwrap();
    let method = Method::Lora(LoraConfig::default());
    let mut model = PetlModel::new(vit.clone(), &PetlConfig::new(method, 4)).unwrap();
    disturb(&model);
    let map = model.patch_features(&images()).unwrap();
    model.patch_features_t(&images(), true).unwrap().sum(Kind::Float).backward();
    let trained =
        model.var_store().variables().into_iter().filter(|(n, _)| !n.starts_with("head."));
    assert!(trained.into_iter().all(|(_, variable)| variable.grad().defined()));
    model.merge().unwrap();
    assert!(model.patch_features(&images()).unwrap().is_close(&map, 1e-4, 1e-5));
    assert_eq!(model.intermediate(&images(), &[1]).unwrap().len(), 1);
    assert!(model.patch_features_t(&images(), true).is_err());
    // In other dtypes.
    let half = PetlModel::new(vit.to_kind(Kind::BFloat16).unwrap(), model.config()).unwrap();
    assert_eq!(half.patch_features(&images()).unwrap().kind(), Kind::BFloat16);
}

/// The value for which a call was refused.
fn refused<T: std::fmt::Debug>(result: convpass::Result<T>, expected: &str) -> String {
    match result.unwrap_err() {
        Error::Config { field, found, .. } if field == expected => found,
        other => panic!("{other}"),
    }
}

#[test]
fn numbers_that_no_block_has_are_refused() {
    let vit = FrozenViT::random(&small_vit(Pooling::ClassToken), 3, device()).unwrap();
    let swin = FrozenSwin::random(&small_swin(), 3, device()).unwrap();
    let model = PetlModel::new(vit.clone(), &PetlConfig::new(Method::LinearProbe, 4)).unwrap();
    assert_eq!(refused(vit.intermediate(&images(), &[0, 3]), "block"), "3");
    assert_eq!(
        refused(swin.intermediate(&images(), &[usize::MAX]), "block"),
        usize::MAX.to_string()
    );
    assert_eq!(refused(model.intermediate(&images(), &[4]), "block"), "4");
    let pass = Pass::default();
    let embedded = || vit.run_embed(&images(), &NoMethod, pass).unwrap();
    assert_eq!(refused(vit.run_block(3, embedded(), &NoMethod, pass), "block"), "3");
    assert_eq!(refused(vit.forward_from(4, embedded(), &NoMethod, pass), "block"), "4");
    assert!(vit.forward_from(3, embedded(), &NoMethod, pass).is_ok());
}

#[test]
fn a_drop_path_that_is_no_rate_is_refused() {
    let vit = FrozenViT::random(&small_vit(Pooling::ClassToken), 3, device()).unwrap();
    for drop_path in [f64::NAN, -1.0, 1.0, 2.0, f64::INFINITY] {
        for train in [false, true] {
            let pass = Pass { train, drop_path, ..Pass::default() };
            let embedded = vit.run_embed(&images(), &NoMethod, Pass::default()).unwrap();
            refused(vit.run_block(1, embedded, &NoMethod, pass), "drop_path");
            refused(vit.forward(&images(), &NoMethod, pass), "drop_path");
            refused(vit.forward_patches(&images(), &NoMethod, pass), "drop_path");
        }
    }
}

/// Without a table of positions a ViT sees a set of patches: two images with two patches swapped
/// have the same features.
#[test]
fn positions_are_optional() {
    let config = ViTConfig { pos_embed: false, ..small_vit(Pooling::Average) };
    let with_table = small_vit(Pooling::Average);
    let vit = FrozenViT::random(&config, 3, device()).unwrap();
    assert!(vit.named_weights().iter().all(|(name, _)| name != "pos_embed"));
    let table = ROWS * COLS * config.embed_dim;
    assert_eq!(with_table.num_params() - config.num_params(), table);
    assert_eq!(vit.num_params() as i64, config.num_params());
    let image = images();
    let swapped = image.roll([4], [3]);
    let features = |vit: &FrozenViT, images: &Tensor| vit.features(images).unwrap();
    assert!(features(&vit, &swapped).is_close(&features(&vit, &image), 1e-4, 1e-5));
    let placed = FrozenViT::random(&with_table, 3, device()).unwrap();
    assert!(!features(&placed, &swapped).is_close(&features(&placed, &image), 1e-4, 1e-5));
}
