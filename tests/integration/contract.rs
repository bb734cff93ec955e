//! What every method promises on every kind of backbone.

use convpass::backbone::{
    AttentionPooling, ContinuousBiasConfig, ConvNeXtNorm, ConvNeXtStem, MlpActivation,
    NormPlacement, Rotary, RotaryCoordinates, RotaryPairs,
};
use convpass::petl::{
    AdaptFormerConfig, AdaptFormerInput, AdapterConfig, ConvBypassVariant, FactConfig, FactForm,
    LinearTarget, LowBitConfig, RepAdapterConfig, SsfConfig, VptConfig,
};
use convpass::testing;
use convpass::{
    Backbone, ConvBypassConfig, ConvNeXtConfig, Error, FrozenConvNeXt, FrozenSwin, FrozenViT,
    LoraConfig, Method, PetlConfig, PetlModel, Placement, Pooling, SubLayers, SwinConfig,
    ViTConfig, audit,
};
use tch::{Kind, Tensor};

use crate::child;
use crate::golden::AnyFrozen;
use crate::support::waves;

const CLASSES: i64 = 5;
const DEPTH: usize = 3;

/// A kind of backbone and its variants, each in f32, bf16 and f16.
trait Contract: AnyFrozen {
    fn variants() -> Vec<(&'static str, Self::Config)>;

    /// Whether its blocks are of several widths.
    fn has_widths(&self) -> bool {
        self.shape().block_dims.windows(2).any(|pair| pair[0] != pair[1])
    }

    fn backbones() -> Vec<(String, Self)> {
        let kinds = [("f32", Kind::Float), ("bf16", Kind::BFloat16), ("f16", Kind::Half)];
        let variants = Self::variants().into_iter();
        variants
            .map(|(name, config)| (name, Self::random(&config)))
            .flat_map(|(name, backbone)| {
                kinds.map(|(kind, k)| (format!("{name}, {kind}"), backbone.to_kind(k).unwrap()))
            })
            .collect()
    }
}

impl Contract for FrozenViT {
    fn variants() -> Vec<(&'static str, ViTConfig)> {
        let class_token = ViTConfig {
            image_size: (12, 20),
            patch_size: 4,
            embed_dim: 24,
            depth: DEPTH as i64,
            num_heads: 4,
            mlp_dim: 48,
            ..ViTConfig::default()
        };
        let average = ViTConfig {
            class_token: false,
            pos_embed_prefix: 0,
            pooling: Pooling::Average,
            ..class_token.clone()
        };
        let registers = ViTConfig {
            num_registers: 4,
            layer_scale: true,
            activation: MlpActivation::SwiGlu,
            pooling: Pooling::AverageThenNorm,
            ..class_token.clone()
        };
        let clip = ViTConfig {
            pre_norm: true,
            patch_bias: false,
            qkv_bias: false,
            activation: MlpActivation::QuickGelu,
            norm_eps: 1e-5,
            projection: Some(7),
            ..class_token.clone()
        };
        let mut variants = vec![
            ("class token", class_token.clone()),
            ("average", average.clone()),
            ("registers, SwiGLU", registers.clone()),
            ("CLIP", clip),
        ];
        variants.extend(relatives(class_token, average, registers));
        variants
    }
}

/// Families whose attention, pooling or prefix differs from those of a ViT.
fn relatives(
    class_token: ViTConfig,
    average: ViTConfig,
    registers: ViTConfig,
) -> Vec<(&'static str, ViTConfig)> {
    let dinov3 = ViTConfig {
        num_heads: 3,
        pos_embed: false,
        pos_embed_prefix: 0,
        rotary: Some(Rotary::DINOV3),
        activation: MlpActivation::Gelu,
        pooling: Pooling::ClassToken,
        norm_eps: 1e-5,
        ..registers
    };
    let siglip = ViTConfig {
        activation: MlpActivation::GeluTanh,
        pooling: Pooling::Attention,
        attention_pool: Some(AttentionPooling {
            num_heads: Some(2),
            mlp_dim: 40,
            reads_prefix: false,
        }),
        ..average
    };
    let distilled = ViTConfig {
        num_registers: 1,
        pos_embed_prefix: 2,
        pooling: Pooling::ClassAndDistillation,
        ..class_token.clone()
    };
    let post_norm = ViTConfig { norm_placement: NormPlacement::After, ..class_token.clone() };
    let eva = eva(class_token.clone());
    let mut found = vec![
        ("DINOv3", dinov3),
        ("SigLIP", siglip),
        ("DeiT", distilled),
        ("EVA-02", eva),
        ("norms after", post_norm),
    ];
    found.extend(with_other_layers(class_token));
    found
}

/// Rotary positions, norms inside the sub-layers and a gated MLP.
fn eva(class_token: ViTConfig) -> ViTConfig {
    let coordinates =
        RotaryCoordinates::Index { offset: 1.0, reference: Some((4, 4)), columns_first: true };
    ViTConfig {
        num_heads: 2,
        rotary: Some(Rotary { base: 1e4, pairs: RotaryPairs::Neighbours, coordinates }),
        activation: MlpActivation::SwiGlu,
        attention_norm: true,
        mlp_norm: true,
        pooling: Pooling::AverageThenNorm,
        ..class_token
    }
}

/// Families with a bias between tokens, learned frequencies, RMS norms or layers without a bias.
fn with_other_layers(class_token: ViTConfig) -> Vec<(&'static str, ViTConfig)> {
    let beit = ViTConfig {
        pos_embed: false,
        pos_embed_prefix: 0,
        relative_bias: true,
        layer_scale: true,
        ..class_token.clone()
    };
    let mixed = ViTConfig { mixed_rotary: true, ..class_token.clone() };
    let aimv2 = ViTConfig {
        class_token: false,
        pos_embed_prefix: 0,
        patch_norm: true,
        qkv_bias: false,
        proj_bias: false,
        rms_norm: true,
        norm_bias: false,
        activation: MlpActivation::SwiGlu,
        pooling: Pooling::Attention,
        attention_pool: Some(AttentionPooling { num_heads: None, mlp_dim: 0, reads_prefix: false }),
        ..class_token
    };
    vec![("BEiT", beit), ("RoPE-ViT, mixed", mixed), ("AIMv2", aimv2)]
}

/// Shifted windows that do not divide the grid, in stages of several widths and of one.
impl Contract for FrozenSwin {
    fn variants() -> Vec<(&'static str, SwinConfig)> {
        let stages = SwinConfig {
            image_size: (12, 20),
            patch_size: 2,
            embed_dim: 12,
            depths: vec![1, DEPTH as i64 - 1],
            num_heads: vec![2, 4],
            window_sizes: vec![(4, 4), (2, 2)],
            mlp_ratio: 2.0,
            ..SwinConfig::default()
        };
        let one_width = SwinConfig {
            patch_size: 4,
            embed_dim: 24,
            depths: vec![DEPTH as i64],
            num_heads: vec![4],
            window_sizes: vec![(2, 3)],
            qkv_bias: false,
            patch_norm: false,
            ..stages.clone()
        };
        let second = |config: &SwinConfig| SwinConfig {
            norm_placement: NormPlacement::After,
            cosine_attention: true,
            continuous_bias: Some(ContinuousBiasConfig {
                hidden_dim: 6,
                pretrained_window_sizes: vec![(3, 0); config.depths.len()],
            }),
            ..config.clone()
        };
        let (v2, one_width_v2) = (second(&stages), second(&one_width));
        vec![
            ("Swin", stages),
            ("Swin of one stage", one_width),
            ("Swin V2", v2),
            ("Swin V2 of one stage", one_width_v2),
        ]
    }
}

impl Contract for FrozenConvNeXt {
    fn variants() -> Vec<(&'static str, ConvNeXtConfig)> {
        let config = ConvNeXtConfig {
            patch_size: 2,
            dims: vec![6, 10],
            depths: vec![1, 2],
            kernel_size: 3,
            ..ConvNeXtConfig::default()
        };
        let second = ConvNeXtConfig {
            patch_size: 4,
            stem: ConvNeXtStem::Overlapping { hidden_dim: 5, activation: true },
            layer_scale: false,
            response_norm: true,
            norm: ConvNeXtNorm::Deviation,
            norm_before_pooling: true,
            head_dim: Some(7),
            ..config.clone()
        };
        vec![("ConvNeXt", config), ("ConvNeXt V2", second)]
    }
}

/// The methods that `method` is made of.
fn parts(method: &Method) -> Vec<&Method> {
    match method {
        Method::Compose { methods } => methods.iter().flat_map(parts).collect(),
        Method::LowBit(config) => parts(&config.method),
        method => vec![method],
    }
}

/// The part of `method` that has no place on `backbone`.
fn refused<'a, B: Contract>(method: &'a Method, backbone: &B) -> Option<&'a Method> {
    parts(method).into_iter().find(|part| match (backbone.shape().family, part) {
        (_, Method::LinearProbe | Method::Full) => false,
        ("ConvNeXt", _) => true,
        ("Swin", Method::Vpt(_)) => true,
        ("Swin", Method::Fact(_)) => backbone.has_widths(),
        _ => false,
    })
}

fn methods() -> Vec<Method> {
    use LinearTarget::{Fc1, Fc2, K, Proj, Q, V};
    let all = vec![Q, K, V, Proj, Fc1, Fc2];
    let adapter = AdapterConfig::default();
    let bypass = ConvBypassConfig::default();
    let former = AdaptFormerConfig::default();
    let lora = LoraConfig::default();
    let vpt = VptConfig::default();
    let rep = RepAdapterConfig::default();
    let noah = vec![
        Method::Adapter(AdapterConfig { blocks: Some(vec![0, 2, 4]), ..adapter.clone() }),
        Method::Lora(LoraConfig { blocks: Some(vec![3, 0, 1]), ..lora.clone() }),
        Method::Vpt(VptConfig { blocks: Some(vec![1, 0, 2]), ..vpt.clone() }),
    ];
    let noah_low_bit = noah.clone();
    let folding =
        vec![Method::BitFit, Method::Lora(lora.clone()), Method::Ssf(SsfConfig::default())];
    let low_bit = |bits, method| Method::LowBit(LowBitConfig { bits, method: Box::new(method) });
    let mixed = vec![
        low_bit(1, Method::Lora(LoraConfig { rank: 3, ..lora.clone() })),
        low_bit(2, Method::AdaptFormer(former.clone())),
        Method::ConvBypass(bypass.clone()),
    ];
    let beside =
        vec![Method::ConvBypass(bypass.clone()), Method::AdaptFormer(former.clone()), Method::Full];
    vec![
        Method::LinearProbe,
        Method::Full,
        Method::BitFit,
        Method::LayerNorm,
        Method::ConvBypass(bypass.clone()),
        Method::ConvBypassVariant(ConvBypassVariant {
            channel_scale: true,
            ..ConvBypassConfig { placement: Placement::Sequential, ..bypass.clone() }.into()
        }),
        Method::ConvBypassVariant(ConvBypassVariant {
            base: bypass,
            mlp_kernel_size: Some(1),
            channel_scale: true,
            blocks: Some(vec![3, 0, 5]),
        }),
        Method::Adapter(adapter.clone()),
        Method::Adapter(AdapterConfig {
            sub_layers: SubLayers::Both,
            channel_scale: true,
            blocks: Some(vec![0, 1, 6]),
            ..adapter
        }),
        Method::AdaptFormer(former.clone()),
        Method::AdaptFormer(AdaptFormerConfig {
            input: AdaptFormerInput::Normed,
            channel_scale: true,
            blocks: Some(vec![2, 2, 0]),
            ..former
        }),
        Method::Lora(lora.clone()),
        Method::Lora(LoraConfig { targets: all, blocks: Some(vec![0, 2, 1]), ..lora }),
        Method::Vpt(vpt.clone()),
        Method::Vpt(VptConfig { deep: false, dropout: 0.1, ..vpt.clone() }),
        Method::Vpt(VptConfig { blocks: Some(vec![2, 0, 3]), ..vpt }),
        Method::Ssf(SsfConfig::default()),
        Method::Ssf(SsfConfig { init_std: 0.0 }),
        Method::RepAdapter(rep.clone()),
        Method::RepAdapter(RepAdapterConfig {
            sub_layers: SubLayers::Mlp,
            groups: 1,
            blocks: Some(vec![1, 0, 3]),
            ..rep
        }),
        Method::Fact(FactConfig { rank: 3, ..Default::default() }),
        Method::Fact(FactConfig { rank: 3, form: FactForm::Tucker, ..Default::default() }),
        Method::Compose { methods: noah },
        Method::Compose { methods: folding },
        Method::Compose { methods: beside },
        low_bit(1, Method::ConvBypass(ConvBypassConfig::default())),
        low_bit(4, Method::Compose { methods: noah_low_bit }),
        low_bit(8, Method::Ssf(SsfConfig::default())),
        Method::Compose { methods: mixed },
    ]
}

/// Runs `check` for every method on every backbone of a kind that has a place for it, on a new
/// model.
fn on<B: Contract>(check: impl Fn(&str, PetlModel<B>)) {
    // At this size threads only wait for each other, most of all beside other tests.
    tch::set_num_threads(1);
    for (kind, backbone) in B::backbones() {
        for method in methods() {
            if refused(&method, &backbone).is_some() {
                continue;
            }
            let config = PetlConfig::new(method, CLASSES);
            let case = format!("{:?} beside {kind}", config.method);
            let model = PetlModel::new(backbone.clone(), &config);
            check(&case, model.unwrap_or_else(|e| panic!("{case}: {e}")));
        }
    }
}

/// [`on`] every kind of backbone.
macro_rules! for_each {
    ($check:ident) => {
        on::<FrozenViT>($check);
        on::<FrozenSwin>($check);
        on::<FrozenConvNeXt>($check);
    };
}

fn images(count: i64) -> Tensor {
    waves(&[count, 3, 12, 20])
}

/// Fails with the case where a check does.
fn kept(case: &str, check: testing::Check) {
    check.unwrap_or_else(|failure| panic!("{case}: {failure}"));
}

#[test]
fn starts_as_the_frozen_backbone_where_it_promises_to() {
    fn check<B: Contract>(case: &str, model: PetlModel<B>) {
        kept(case, testing::starts_as_promised(&model, &images(3)));
    }
    for_each!(check);
}

#[test]
fn trains_its_variables_and_nothing_else() {
    fn check<B: Contract>(case: &str, model: PetlModel<B>) {
        kept(case, testing::trains_its_variables_alone(&model, &images(8)));
    }
    for_each!(check);
}

#[test]
fn every_variable_has_a_gradient() {
    fn check<B: Contract>(case: &str, model: PetlModel<B>) {
        kept(case, testing::every_variable_has_a_gradient(&model, &images(8)));
    }
    for_each!(check);
}

/// With dropout and drop path on. In a process of its own: a pass seeds libtorch's generator, which
/// the tests of this process share.
#[test]
fn gradients_computed_block_by_block_are_the_same_bits() {
    if !child::is_alone("contract::gradients_computed_block_by_block_are_the_same_bits") {
        return;
    }
    fn check<B: Contract>(case: &str, model: PetlModel<B>) {
        let is_swin = model.backbone().shape().family == "Swin";
        let kind = model.backbone().compute_kind();
        // What all blocks share is summed up in another order, and in f32 where the other is
        // in bf16; windows leave gradients whose strides change the order of sums.
        let gap = |name: &str| match kind {
            _ if !name.starts_with("FacT") && !is_swin => 0.0,
            Kind::Float => 1e-6,
            _ => 2e-2,
        };
        kept(case, testing::recomputes_the_same_gradients(&model, &images(8), gap));
    }
    for_each!(check);
}

#[test]
fn what_it_leaves_as_it_is_may_be_kept() {
    fn check<B: Contract>(case: &str, model: PetlModel<B>) {
        kept(case, testing::keeps_its_prefix(&model, &images(3)));
    }
    for_each!(check);
}

#[test]
fn the_audit_counts_the_variables() {
    fn check<B: Contract>(case: &str, model: PetlModel<B>) {
        kept(case, testing::is_audited(&model));
    }
    for_each!(check);
}

#[test]
fn comes_back_from_its_file_bit_for_bit() {
    fn check<B: Contract>(case: &str, model: PetlModel<B>) {
        kept(case, testing::comes_back_from_its_file(&model, &images(3), None));
    }
    for_each!(check);
}

fn logits<B: Backbone>(model: &PetlModel<B>) -> Tensor {
    tch::no_grad(|| model.forward(&images(3), false).unwrap())
}

fn folds(method: &Method) -> bool {
    match method {
        Method::LinearProbe | Method::Full | Method::BitFit | Method::LayerNorm => true,
        Method::Lora(_) | Method::Ssf(_) | Method::RepAdapter(_) | Method::Fact(_) => true,
        Method::LowBit(config) => folds(&config.method),
        Method::Compose { methods } => methods.iter().all(folds),
        _ => false,
    }
}

#[test]
fn folds_into_the_weights_and_out_again() {
    fn check<B: Contract>(case: &str, mut model: PetlModel<B>) {
        testing::disturb(&model).unwrap();
        let apart = logits(&model);
        if !folds(&model.config().method) {
            assert!(matches!(model.merge(), Err(Error::Config { .. })), "{case}");
            return;
        }
        let digest = model.backbone().digest().unwrap();
        model.merge().unwrap();
        let gap = (logits(&model) - &apart).abs().max() / apart.abs().max();
        // bf16 has eight bits, f16 eleven, and merging rounds the weights once more. A norm after a
        // sub-layer enlarges its small output together with the error.
        let is_after = ["norms after", "Swin V2"].iter().any(|name| case.contains(name));
        let bound = match model.backbone().kind() {
            Kind::Float => 1e-5,
            Kind::Half => 1e-2,
            _ if is_after => 2e-1,
            _ => 5e-2,
        };
        assert!(gap.double_value(&[]) < bound, "{case}: off by {gap:?}");
        assert!(model.forward(&images(1), true).is_err(), "{case}");
        let plain = model.merged_backbone().unwrap();
        assert!(plain.named_weights().iter().all(|(_, w)| !w.requires_grad()), "{case}");

        model.unmerge();
        assert_eq!(logits(&model), apart, "{case}");
        assert_eq!(model.backbone().digest().unwrap(), digest, "{case}");
    }
    for_each!(check);
}

/// A method without a place is refused by name, alone and as a part, by the model and by the audit.
#[test]
fn a_backbone_without_the_place_refuses() {
    fn check<B: Contract>() -> usize {
        let mut count = 0;
        for (kind, backbone) in B::backbones() {
            for method in methods() {
                let Some(part) = refused(&method, &backbone) else { continue };
                let case = format!("{method:?} beside {kind}");
                let counted = audit(backbone.config(), &method).unwrap_err();
                let config = PetlConfig::new(method.clone(), CLASSES);
                let built = PetlModel::new(backbone.clone(), &config).unwrap_err();
                for error in [counted, built] {
                    let family = backbone.shape().family;
                    let fits = match &error {
                        Error::Unsupported { method, backbone, .. } => {
                            *method == part.name() && *backbone == family
                        }
                        Error::Config { field, .. } => part.name() == "fact" && field == "fact",
                        _ => false,
                    };
                    assert!(fits, "{case}: {error}");
                }
                count += 1;
            }
        }
        count
    }
    assert_eq!(check::<FrozenViT>(), 0);
    assert!(check::<FrozenSwin>() > 0 && check::<FrozenConvNeXt>() > 0);
}

#[test]
fn configs_are_the_same_after_json() {
    for method in methods() {
        let text = serde_json::to_string(&method).unwrap();
        assert_eq!(serde_json::from_str::<Method>(&text).unwrap(), method, "{text}");
        assert!(text.starts_with(&format!("{{\"name\":\"{}\"", method.name())), "{text}");
    }
}
