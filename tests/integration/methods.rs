//! What a method refuses, what an adapter file of it may ask for, and what it counts.

use convpass::model::PeftOptions;
use convpass::petl::{
    AdaptFormerConfig, AdapterConfig, ConvBypassVariant, FactConfig, FactForm, LinearTarget,
    LowBitConfig, RepAdapterConfig, SsfConfig, VptConfig,
};
use convpass::{
    ConvBypassConfig, ConvNeXtConfig, Error, FrozenSwin, FrozenViT, LoraConfig, Method, PetlConfig,
    PetlModel, Result, SubLayers, SwinConfig, ViTConfig, audit,
};

use crate::support::device;

const CLASSES: i64 = 5;

fn backbone() -> FrozenViT {
    let config = ViTConfig {
        image_size: (12, 20),
        patch_size: 4,
        embed_dim: 24,
        depth: 3,
        num_heads: 4,
        mlp_dim: 48,
        ..ViTConfig::default()
    };
    FrozenViT::random(&config, 1, device()).unwrap()
}

fn swin() -> FrozenSwin {
    let config = SwinConfig {
        image_size: (12, 20),
        patch_size: 2,
        embed_dim: 12,
        depths: vec![1, 2],
        num_heads: vec![2, 4],
        window_sizes: vec![(4, 4), (2, 2)],
        mlp_ratio: 2.0,
        ..SwinConfig::default()
    };
    FrozenSwin::random(&config, 1, device()).unwrap()
}

/// A file whose config asks for more than it holds is refused before anything is made of it.
#[test]
fn a_config_alone_allocates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    let backbone = &backbone();
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
    let backbone = &backbone();
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
    let backbone = &backbone();
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

#[test]
fn choices_that_do_not_fit_are_told() {
    let backbone = &backbone();
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
    let prompts = |blocks: [i64; 3]| {
        Method::Vpt(VptConfig { blocks: Some(blocks.to_vec()), ..Default::default() })
    };
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
        // No name is in both, but each would remove the other's prompts.
        Method::Compose { methods: vec![prompts([2, 0, 2]), prompts([0, 3, 0])] },
        Method::Compose { methods: vec![Method::Lora(LoraConfig { rank: 0, ..lora.clone() })] },
    ];
    for method in wrong {
        let error = new(method.clone()).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{method:?}: {error}");
    }
    for twice in [Method::Lora(lora), Method::BitFit] {
        let methods = vec![twice.clone(), twice];
        let error = new(Method::Compose { methods }).unwrap_err();
        assert!(matches!(error, Error::DuplicateVariable { .. }), "{error}");
    }

    let odd = ViTConfig { mlp_dim: 50, ..backbone.config().clone() };
    let odd = FrozenViT::random(&odd, 0, device()).unwrap();
    let config = PetlConfig::new(Method::Fact(FactConfig::default()), CLASSES);
    assert!(matches!(PetlModel::new(odd, &config), Err(Error::Config { .. })));
}

#[test]
fn a_rep_adapter_folds_alone() {
    let backbone = &backbone();
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
    let backbone = swin();
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
