//! What every method promises on every kind of backbone.

use std::collections::BTreeMap;

use convpass::{
    AdaptFormerConfig, AdaptFormerInput, AdapterConfig, Backbone, ConvBypassConfig,
    ConvBypassVariant, ConvNeXtConfig, Error, FactConfig, FactForm, FrozenConvNeXt, FrozenSwin,
    FrozenViT, LinearTarget, LoraConfig, LowBitConfig, Method, MlpActivation, PeftOptions,
    PetlConfig, PetlModel, Placement, Pooling, RepAdapterConfig, Result, SsfConfig, SubLayers,
    SwinConfig, ViTConfig, VptConfig, audit,
};
use tch::{Device, Kind, Tensor, nn, nn::OptimizerConfig};

use crate::child;
use crate::golden::AnyFrozen;

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
        vec![
            ("class token", class_token),
            ("average", average),
            ("registers, SwiGLU", registers),
            ("CLIP", clip),
        ]
    }
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
        vec![("Swin", stages), ("Swin of one stage", one_width)]
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
        vec![("ConvNeXt", config)]
    }
}

fn backbones() -> Vec<(String, FrozenViT)> {
    FrozenViT::backbones()
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
    let pixels = count * 3 * 12 * 20;
    (Tensor::arange(pixels, (Kind::Float, Device::Cpu)) * 0.37).sin().view([count, 3, 12, 20])
}

fn logits<B: Backbone>(model: &PetlModel<B>) -> Tensor {
    tch::no_grad(|| model.forward(&images(3), false).unwrap())
}

fn variables<B: Backbone>(model: &PetlModel<B>) -> BTreeMap<String, Tensor> {
    model.var_store().variables().into_iter().collect()
}

fn loss<B: Backbone>(model: &PetlModel<B>, train: bool) -> Tensor {
    let labels = Tensor::from_slice(&[0i64, 1, 2, 3, 4, 0, 1, 2]);
    model.forward(&images(8), train).unwrap().cross_entropy_for_logits(&labels)
}

/// Moves every variable away from where it starts: no zero is left.
fn disturb<B: Backbone>(model: &PetlModel<B>) {
    tch::no_grad(|| {
        for (index, mut variable) in variables(model).into_values().enumerate() {
            let count = variable.numel() as i64;
            let steps = Tensor::arange(count, (Kind::Float, Device::Cpu)) + index as f64 + 1.0;
            let noise = (steps * 1.7).sin() * 0.1;
            let _sum = variable.g_add_(&noise.view_as(&variable));
        }
    });
}

#[test]
fn starts_as_the_frozen_backbone_where_it_promises_to() {
    fn check<B: Contract>(case: &str, model: PetlModel<B>) {
        let features = tch::no_grad(|| model.features(&images(3), false).unwrap());
        let frozen = model.backbone().features(&images(3));
        let gap = (&features - &frozen).abs().max() / frozen.abs().max();
        let gap = gap.double_value(&[]);
        match model.config().method.starts_as_identity() {
            // The same weights at another address: a product may round differently.
            true if trains_matrices(&model.config().method) => assert!(gap < 1e-6, "{case}: {gap}"),
            promised => assert_eq!(gap == 0.0, promised, "{case}: {gap}"),
        }
    }
    for_each!(check);
}

fn trains_matrices(method: &Method) -> bool {
    match method {
        Method::Compose { methods } => methods.iter().any(trains_matrices),
        method => *method == Method::Full,
    }
}

#[test]
fn trains_its_variables_and_nothing_else() {
    fn check<B: Contract>(case: &str, model: PetlModel<B>) {
        let digest = model.backbone().digest().unwrap();
        let before: BTreeMap<_, _> =
            variables(&model).into_iter().map(|(name, v)| (name, v.detach().copy())).collect();
        let mut optimizer = nn::AdamW::default().build(model.var_store(), 1e-2).unwrap();
        for _ in 0..3 {
            optimizer.backward_step(&loss(&model, true));
        }
        assert_eq!(model.backbone().digest().unwrap(), digest, "{case}");
        for (name, after) in variables(&model) {
            assert!(after.requires_grad(), "{case}: {name}");
            assert_ne!(after, before[&name], "{case}: {name} was not trained");
        }
        let frozen = model.backbone().named_weights();
        assert!(frozen.iter().all(|(_, w)| !w.requires_grad() && !w.grad().defined()), "{case}");
        assert!(logits(&model).isfinite().all().int64_value(&[]) == 1, "{case}");
    }
    for_each!(check);
}

#[test]
fn every_variable_has_a_gradient() {
    fn check<B: Contract>(case: &str, model: PetlModel<B>) {
        disturb(&model);
        loss(&model, false).backward();
        for (name, variable) in variables(&model) {
            let gradient = variable.grad();
            assert!(gradient.defined(), "{case}: {name} has no gradient");
            assert!(gradient.abs().max().double_value(&[]) > 0.0, "{case}: {name}");
        }
    }
    for_each!(check);
}

/// With dropout and drop path on. In a process of its own: a pass seeds libtorch's generator, which
/// the tests of this process share.
#[test]
fn gradients_computed_block_by_block_are_the_same_bits() {
    const CHILD: &str = "CONVPASS_TEST_RECOMPUTE";
    if std::env::var_os(CHILD).is_none() {
        let child = child::test("contract::gradients_computed_block_by_block_are_the_same_bits")
            .env(CHILD, "")
            .output()
            .unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
        return;
    }
    fn check<B: Contract>(case: &str, model: PetlModel<B>) {
        disturb(&model);
        let labels = Tensor::from_slice(&[0i64, 1, 2, 3, 4, 0, 1, 2]);
        let gradients = |backward: &dyn Fn() -> (Tensor, Tensor)| {
            for mut variable in variables(&model).into_values() {
                variable.zero_grad();
            }
            tch::manual_seed(7);
            let (logits, loss) = backward();
            let after = Tensor::rand([4], (Kind::Float, Device::Cpu));
            let gradients: BTreeMap<_, _> =
                variables(&model).into_iter().map(|(name, v)| (name, v.grad().copy())).collect();
            (logits, loss, after, gradients)
        };
        let whole = gradients(&|| {
            let logits = model.forward(&images(8), true).unwrap();
            let loss = logits.cross_entropy_for_logits(&labels);
            loss.backward();
            (logits.detach(), loss.detach())
        });
        let by_block = gradients(&|| {
            let loss = |logits: &Tensor| Ok(logits.cross_entropy_for_logits(&labels));
            model.backward_recomputed(&images(8), loss).unwrap()
        });
        assert_eq!(
            (&by_block.0, &by_block.1, &by_block.2),
            (&whole.0, &whole.1, &whole.2),
            "{case}"
        );
        if model.frozen_blocks().is_some() {
            let prefix = || model.frozen_prefix(&images(8)).unwrap();
            let from_prefix = gradients(&|| {
                let loss = |logits: &Tensor| Ok(logits.cross_entropy_for_logits(&labels));
                model.backward_recomputed_from(prefix(), loss).unwrap()
            });
            assert_eq!((&from_prefix.0, &from_prefix.1), (&whole.0, &whole.1), "{case}");
            assert_eq!(from_prefix.3, by_block.3, "{case}");
            tch::manual_seed(7);
            let logits = model.forward_from(prefix(), true).unwrap();
            assert_eq!(logits, whole.0, "{case}");
        }
        for (name, gradient) in &whole.3 {
            let gap = (gradient - &by_block.3[name]).abs().max() / gradient.abs().max();
            // What all blocks share is summed up in another order, and in f32 where the other is
            // in bf16.
            // Windows leave gradients whose strides change the order of sums.
            let exact = !name.starts_with("FacT") && model.backbone().shape().family != "Swin";
            let bound = match model.backbone().compute_kind() {
                _ if exact => 0.0,
                Kind::Float => 1e-6,
                _ => 2e-2,
            };
            assert!(gap.double_value(&[]) <= bound, "{case}: {name} is off by {gap:?}");
        }
    }
    for_each!(check);
}

#[test]
fn the_audit_counts_the_variables() {
    fn check<B: Contract>(case: &str, model: PetlModel<B>) {
        let row = audit(model.backbone().config(), &model.config().method).unwrap();
        let built = model.trainable_params();
        assert_eq!(
            (row.params, row.backbone),
            (built.method as i64, built.backbone() as i64),
            "{case}"
        );
    }
    for_each!(check);
}

#[test]
fn comes_back_from_its_file_bit_for_bit() {
    fn check<B: Contract>(case: &str, model: PetlModel<B>) {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("1"), folder.path().join("2"));
        disturb(&model);
        model.save_adapter(&first).unwrap();
        let again = PetlModel::load_adapter(model.backbone().clone(), &first).unwrap();
        assert_eq!(again.config(), model.config(), "{case}");
        assert_eq!(logits(&again), logits(&model), "{case}");
        again.save_adapter(&second).unwrap();
        assert_eq!(std::fs::read(&second).unwrap(), std::fs::read(&first).unwrap(), "{case}");
    }
    for_each!(check);
}

/// A file whose config asks for more than it holds is refused before anything is made of it.
#[test]
fn a_config_alone_allocates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    let backbone = &backbones()[0].1;
    let lora = Method::Lora(LoraConfig::default());
    let model = PetlModel::new(backbone.clone(), &PetlConfig::new(lora, CLASSES)).unwrap();
    model.save_adapter(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    // The file is JSON in front and tensors behind; the ranks keep the length of the JSON.
    let (from, to) = (br#"\"rank\":8,\"alpha\":8.0"#, br#"\"rank\":4000,\"alpha\":8"#);
    let to = &to[..];
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    let mut changed = bytes;
    let tail = changed.split_off(at);
    changed.extend_from_slice(to);
    changed.extend_from_slice(&tail[from.len()..]);
    let padding = from.len() as i64 - to.len() as i64;
    let header = u64::from_le_bytes(changed[..8].try_into().unwrap());
    changed[..8].copy_from_slice(&header.wrapping_add_signed(-padding).to_le_bytes());
    std::fs::write(&path, &changed).unwrap();
    let error = PetlModel::load_adapter(backbone.clone(), &path).unwrap_err();
    assert!(matches!(error, Error::CorruptFile { .. }), "{error}");
    assert!(error.to_string().contains("asks for"), "{error}");
}

/// However many methods the config lists: the first that is too large ends it.
#[test]
fn a_long_list_of_methods_allocates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    let backbone = &backbones()[0].1;
    let wide = Method::Adapter(AdapterConfig { bottleneck_dim: 4096, ..Default::default() });
    let config = PetlConfig::new(Method::Compose { methods: vec![wide; 10_000] }, CLASSES);
    let info = serde_json::json!({ "config": config, "backbone": backbone.digest() });
    let header = serde_json::json!({ "__metadata__": { "convpass": info.to_string() } });
    let header = header.to_string();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    std::fs::write(&path, bytes).unwrap();
    let error = PetlModel::load_adapter(backbone.clone(), &path).unwrap_err();
    assert!(matches!(error, Error::CorruptFile { .. }), "{error}");
    assert!(error.to_string().contains("asks for more than 0 bytes"), "{error}");
}

/// A config that could be written and not be read again is refused at once.
#[test]
fn lists_within_lists_have_an_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    let backbone = &backbones()[0].1;
    let nested = |deep: usize, inner: Method| {
        (0..deep).fold(inner, |method, _| Method::Compose { methods: vec![method] })
    };
    let few_bits = |method| Method::LowBit(LowBitConfig { bits: 1, method: Box::new(method) });
    let lora = || Method::Lora(LoraConfig::default());
    let deepest = nested(8, few_bits(nested(8, lora())));
    let model = PetlModel::new(backbone.clone(), &PetlConfig::new(deepest, CLASSES)).unwrap();
    model.save_adapter(&path).unwrap();
    PetlModel::load_adapter(backbone.clone(), &path).unwrap();
    for deeper in [nested(17, lora()), nested(9, few_bits(nested(8, lora()))), nested(3000, lora())]
    {
        let error =
            PetlModel::new(backbone.clone(), &PetlConfig::new(deeper, CLASSES)).unwrap_err();
        assert!(matches!(&error, Error::Config { field, .. } if field == "methods"), "{error}");
    }
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
        disturb(&model);
        let apart = logits(&model);
        if !folds(&model.config().method) {
            assert!(matches!(model.merge(), Err(Error::Config { .. })), "{case}");
            return;
        }
        let digest = model.backbone().digest().unwrap();
        model.merge().unwrap();
        let gap = (logits(&model) - &apart).abs().max() / apart.abs().max();
        // bf16 has eight bits, f16 eleven, and merging rounds the weights once more.
        let bound = match model.backbone().kind() {
            Kind::Float => 1e-5,
            Kind::Half => 1e-2,
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

#[test]
fn choices_that_do_not_fit_are_told() {
    let backbone = &backbones()[0].1;
    let new = |method: Method| -> Result<PetlModel> {
        let closed_form = audit(backbone.config(), &method).map(|row| row.params);
        let model = PetlModel::new(backbone.clone(), &PetlConfig::new(method, CLASSES));
        // Names are seen when the variables are made; all else the closed form refuses too.
        let named = matches!(model, Err(Error::DuplicateVariable { .. }));
        assert!(named || model.is_err() == closed_form.is_err());
        model
    };
    let lora = LoraConfig::default();
    let two_widths = Some(vec![1, 2]);
    let wrong = [
        Method::Lora(LoraConfig { rank: 0, ..lora.clone() }),
        Method::Lora(LoraConfig { targets: vec![], ..lora.clone() }),
        Method::Lora(LoraConfig { targets: vec![LinearTarget::Q; 2], ..lora.clone() }),
        Method::Lora(LoraConfig { alpha: f64::NAN, ..lora.clone() }),
        Method::Lora(LoraConfig { blocks: two_widths.clone(), ..lora.clone() }),
        Method::Adapter(AdapterConfig { blocks: two_widths.clone(), ..Default::default() }),
        Method::Adapter(AdapterConfig { bottleneck_dim: -1, ..Default::default() }),
        Method::AdaptFormer(AdaptFormerConfig { dropout: 1.0, ..Default::default() }),
        Method::ConvBypassVariant(ConvBypassVariant {
            blocks: two_widths.clone(),
            ..Default::default()
        }),
        Method::ConvBypassVariant(ConvBypassVariant {
            mlp_kernel_size: Some(2),
            ..Default::default()
        }),
        Method::Vpt(VptConfig { blocks: Some(vec![1, 2, -3]), ..Default::default() }),
        Method::Vpt(VptConfig { deep: false, blocks: Some(vec![1, 2, 3]), ..Default::default() }),
        Method::Ssf(SsfConfig { init_std: -1.0 }),
        Method::RepAdapter(RepAdapterConfig { groups: 5, ..Default::default() }),
        Method::RepAdapter(RepAdapterConfig { groups: 0, ..Default::default() }),
        Method::RepAdapter(RepAdapterConfig { bottleneck_dim: 7, groups: 7, ..Default::default() }),
        Method::Fact(FactConfig { scale: f64::INFINITY, ..Default::default() }),
        Method::Fact(FactConfig { rank: 1 << 14, form: FactForm::Tucker, ..Default::default() }),
        Method::Compose { methods: vec![] },
        Method::Compose { methods: vec![Method::Lora(LoraConfig { rank: 0, ..lora.clone() })] },
    ];
    for method in wrong {
        let error = new(method.clone()).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{method:?}: {error}");
    }
    for twice in [Method::Lora(lora), Method::BitFit, Method::Vpt(VptConfig::default())] {
        let methods = vec![twice.clone(), twice];
        let error = new(Method::Compose { methods }).unwrap_err();
        assert!(matches!(error, Error::DuplicateVariable { .. }), "{error}");
    }

    let odd = ViTConfig { mlp_dim: 50, ..backbone.config().clone() };
    let odd = FrozenViT::random(&odd, 0, Device::Cpu).unwrap();
    let config = PetlConfig::new(Method::Fact(FactConfig::default()), CLASSES);
    assert!(matches!(PetlModel::new(odd, &config), Err(Error::Config { .. })));
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
fn a_rep_adapter_folds_alone() {
    let backbone = &backbones()[0].1;
    let rep = || Method::RepAdapter(RepAdapterConfig::default());
    let fold = |methods| {
        let config = PetlConfig::new(Method::Compose { methods }, CLASSES);
        PetlModel::new(backbone.clone(), &config).unwrap().merge()
    };
    fold(vec![rep()]).unwrap();
    fold(vec![rep(), Method::Ssf(SsfConfig::default())]).unwrap_err();
    let nested = Method::Compose { methods: vec![rep(), Method::LinearProbe] };
    fold(vec![Method::Lora(LoraConfig::default()), nested]).unwrap_err();
}

#[test]
fn configs_are_the_same_after_json() {
    for method in methods() {
        let text = serde_json::to_string(&method).unwrap();
        assert_eq!(serde_json::from_str::<Method>(&text).unwrap(), method, "{text}");
        assert!(text.starts_with(&format!("{{\"name\":\"{}\"", method.name())), "{text}");
    }
}

/// Swin-B, h = r = 8, C doubled from 128 on in blocks of 2, 2, 18 and 2; and what `Full` trains.
#[test]
fn counts_on_swin_and_convnext() {
    let swin = SwinConfig::preset("swin_base_patch4_window7_224").unwrap();
    let wide = ConvBypassConfig { bottleneck_dim: 16, ..Default::default() };
    let widths = 2 * 128 + 2 * 256 + 18 * 512 + 2 * 1024;
    let counts = [
        (Method::ConvBypass(ConvBypassConfig::default()), 437_504),
        (Method::ConvBypass(wide), 906_240),
        (Method::Adapter(AdapterConfig::default()), 17 * widths + 24 * 8),
        (Method::Lora(LoraConfig::default()), 32 * widths),
        (Method::Full, 86_743_224),
    ];
    for (method, expected) in counts {
        assert_eq!(audit(&swin, &method).unwrap().params, expected, "{method:?}");
    }
    let convnext = ConvNeXtConfig::preset("convnext_base").unwrap();
    assert_eq!(audit(&convnext, &Method::Full).unwrap().params, 87_566_464);
}

/// No table of PEFT's names is of a Swin.
#[test]
fn peft_is_refused_beside_a_swin() {
    let folder = tempfile::tempdir().unwrap();
    let backbone = FrozenSwin::backbones().remove(0).1;
    let config = PetlConfig::new(Method::Lora(LoraConfig::default()), CLASSES);
    let model = PetlModel::new(backbone.clone(), &config).unwrap();
    let saved = model.save_peft(folder.path(), &PeftOptions::default()).unwrap_err();
    let loaded = PetlModel::load_peft(backbone, folder.path()).unwrap_err();
    for error in [saved, loaded] {
        assert!(matches!(error, Error::Unsupported { backbone: "Swin", .. }), "{error}");
    }
}

/// ViT-B/16, h = r = 8.
#[test]
fn counts_are_the_published_ones() {
    let vit = ViTConfig::preset("vit_base_patch16_224").unwrap();
    let count = |method: Method| audit(&vit, &method).unwrap().params;
    let houlsby = AdapterConfig { sub_layers: SubLayers::Both, ..Default::default() };
    let one_by_one = ConvBypassConfig { kernel_size: 1, ..Default::default() };
    let rep = Method::RepAdapter(RepAdapterConfig::default());
    let tucker = FactConfig { form: FactForm::Tucker, ..Default::default() };
    let shallow = VptConfig { deep: false, ..Default::default() };
    let channel_scale = ConvBypassVariant { channel_scale: true, ..Default::default() };
    let counts = [
        (Method::Adapter(AdapterConfig::default()), 156_768),
        (Method::Adapter(houlsby), 2 * 156_768),
        (Method::AdaptFormer(AdaptFormerConfig::default()), 156_768),
        (Method::Lora(LoraConfig::default()), 294_912),
        (Method::ConvBypass(ConvBypassConfig::default()), 327_552),
        (Method::ConvBypass(one_by_one), 327_552 - 24 * 8 * 64),
        (Method::ConvBypassVariant(channel_scale), 327_552 + 24 * 768),
        (Method::BitFit, 102_912),
        (Method::LayerNorm, 25 * 2 * 768),
        // 0.205 M in the paper.
        (Method::Ssf(SsfConfig::default()), 205_824),
        // 0.22 M in the paper, which leaves the biases out: 24 (8 + 768) of these.
        (rep, 221_184 + 24 * 776),
        (Method::Vpt(VptConfig::default()), 12 * 5 * 768),
        (Method::Vpt(shallow), 5 * 768),
        (Method::Fact(FactConfig::default()), 2 * 768 * 16 + 144 * 256),
        (Method::Fact(tucker), 2 * 768 * 16 + 144 * 16 + 4096),
    ];
    for (method, expected) in counts {
        assert_eq!(count(method.clone()), expected, "{method:?}");
    }
}
