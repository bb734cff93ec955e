//! What every method promises on every kind of backbone.

use convpass::petl::{
    AdaptFormerConfig, AdaptFormerInput, AdapterConfig, ConvBypassVariant, FactConfig, FactForm,
    LinearTarget, LowBitConfig, RepAdapterConfig, SsfConfig, VptConfig,
};
use convpass::testing;
use convpass::{
    Backbone, ConvBypassConfig, Error, FrozenConvNeXt, FrozenSwin, FrozenViT, LoraConfig, Method,
    PetlConfig, PetlModel, Placement, SubLayers, audit,
};
use tch::{Kind, Tensor};

use crate::child;
use crate::support::{limit, waves};
use crate::variants::Contract;

pub const CLASSES: i64 = 5;

/// The methods that `method` is made of.
fn parts(method: &Method) -> Vec<&Method> {
    match method {
        Method::Compose { methods } => methods.iter().flat_map(parts).collect(),
        Method::LowBit(config) => parts(&config.method),
        method => vec![method],
    }
}

/// The part of `method` that has no place on `backbone`.
pub fn refused<'a, B: Contract>(method: &'a Method, backbone: &B) -> Option<&'a Method> {
    parts(method).into_iter().find(|part| match (backbone.shape().family, part) {
        (_, Method::LinearProbe | Method::Full) => false,
        ("ConvNeXt", _) => true,
        ("Swin", Method::Vpt(_)) => true,
        ("Swin", Method::Fact(_)) => backbone.has_widths(),
        _ => false,
    })
}

pub fn methods() -> Vec<Method> {
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

pub fn images(count: i64) -> Tensor {
    waves(&[count, 3, 12, 20])
}

/// Fails with the case where a check does.
pub fn kept(case: &str, check: testing::Check) {
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
        assert!(gap.double_value(&[]) < limit(bound), "{case}: off by {gap:?}");
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
