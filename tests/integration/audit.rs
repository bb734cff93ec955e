//! The parameter table, at the size of real backbones.

use convpass::petl::{FactConfig, SsfConfig, VptConfig};
use convpass::{
    Backbone, ConvBypassConfig, Error, FrozenViT, LoraConfig, Method, PetlConfig, PetlModel,
    ViTConfig, audit,
};

/// Every preset, beside weights that take no memory.
#[test]
fn closed_form_equals_the_built_model_on_every_preset() {
    let methods = [
        Method::LinearProbe,
        Method::BitFit,
        Method::LayerNorm,
        Method::ConvBypass(ConvBypassConfig::default()),
        Method::Lora(LoraConfig::default()),
        Method::Vpt(VptConfig::default()),
        Method::Ssf(SsfConfig::default()),
        Method::Fact(FactConfig::default()),
    ];
    for name in ViTConfig::presets() {
        let config = ViTConfig::preset(name).unwrap();
        let backbone = FrozenViT::blank(&config).unwrap();
        assert_eq!(backbone.num_params() as i64, config.num_params(), "{name}");
        for method in &methods {
            let closed_form = audit(&config, method).map(|row| row.params);
            let built = PetlModel::new(backbone.clone(), &PetlConfig::new(method.clone(), 3));
            let built = built.map(|model| model.trainable_params().method as i64);
            match (closed_form, built) {
                (Ok(closed_form), Ok(built)) => assert_eq!(closed_form, built, "{name} {method:?}"),
                // FacT needs an MLP of a multiple of C wide, which ViT-g has not.
                (Err(Error::Config { .. }), Err(Error::Config { .. })) => {
                    assert!(name.contains("giant") && method.name() == "fact");
                }
                other => panic!("{name} {method:?}: {other:?}"),
            }
        }
    }
}

#[test]
fn a_blank_backbone_takes_no_memory() {
    let backbone = FrozenViT::blank(&ViTConfig::default()).unwrap();
    for (name, weight) in backbone.named_weights() {
        assert!(weight.stride().iter().all(|&stride| stride == 0), "{name}");
    }
    let wrong = ViTConfig { depth: -1, ..ViTConfig::default() };
    assert!(matches!(FrozenViT::blank(&wrong), Err(Error::Config { .. })));
}
