//! How many operators a GPU would be asked to launch, and how often the CPU would wait for it.
//!
//! `CONVPASS_WRITE_LAUNCHES=1 cargo test -p convpass --test integration -- launches` writes the
//! table anew. A number that grows is a slower program on a GPU: find out why first.

use convpass::eval::PrefixCache;
use convpass::petl::{
    AdaptFormerConfig, AdapterConfig, ConvBypassVariant, FactConfig, LowBitConfig,
    RepAdapterConfig, SsfConfig, VptConfig,
};
use convpass::train::{ClassWeights, Observer, Silent, fit};
use convpass::{
    Backbone, ConvBypassConfig, FrozenConvNeXt, FrozenSwin, FrozenViT, ImageDataset, LoraConfig,
    Method, Normalization, PetlConfig, PetlModel, SubLayers, TrainConfig, ViTConfig,
};
use convpass_accelerator::{Accelerator, Counts};
use ndarray::Array4;
use tch::{Kind, Tensor};

use crate::child;
use crate::contract::{CLASSES, images};
use crate::support::root;
use crate::variants::Contract;

const FILE: &str = "tests/integration/accelerator/launches.md";
const HEAD: &str = "\
# Launches of operators on a device

Written by `launches.rs` beside this file. The ViT has 2 blocks, a class token and 15 patches; every count is that of a
whole model in f32 with a batch of 8. A launch is an operator of libtorch that is not a view; attention counts as the
operators of its definition, which one kernel replaces on most GPUs. A wait is a point at which the CPU waits for the
device. Drop path is off, and dropout is on in training. A step of `fit` is the pass, the gradients and AdamW; it never
waits, except once where an observer reads its loss. No pass alone waits or copies anything between the devices.
Copies to the device are asynchronous; on a GPU this needs pinned memory, which this device does not have. The features
of a linear probe are computed before its first step.
";

fn methods() -> Vec<(&'static str, Method)> {
    let low_bit =
        LowBitConfig { bits: 2, method: Box::new(Method::ConvBypass(Default::default())) };
    let variant = ConvBypassVariant { channel_scale: true, ..Default::default() };
    let composed =
        vec![Method::ConvBypass(Default::default()), Method::Lora(LoraConfig::default())];
    vec![
        ("linear probe", Method::LinearProbe),
        ("Convpass", Method::ConvBypass(ConvBypassConfig::default())),
        ("Convpass, trained scale", Method::ConvBypassVariant(variant)),
        ("Convpass in 2 bits", Method::LowBit(low_bit)),
        ("Adapter", Method::Adapter(AdapterConfig::default())),
        ("AdaptFormer", Method::AdaptFormer(AdaptFormerConfig::default())),
        ("LoRA", Method::Lora(LoraConfig::default())),
        ("VPT", Method::Vpt(VptConfig::default())),
        ("SSF", Method::Ssf(SsfConfig::default())),
        ("RepAdapter", Method::RepAdapter(RepAdapterConfig::default())),
        ("FacT", Method::Fact(FactConfig::default())),
        ("BitFit", Method::BitFit),
        ("Convpass and LoRA", Method::Compose { methods: composed }),
        ("full finetuning", Method::Full),
    ]
}

fn vit() -> ViTConfig {
    let (_, config) = FrozenViT::variants().swap_remove(0);
    ViTConfig { depth: 2, ..config }
}

/// The counts of one evaluation, of a forward and a backward pass in training, without drop path.
fn passes<B: Backbone>(accelerator: &Accelerator, backbone: B, method: &Method) -> [Counts; 3] {
    let config = PetlConfig { drop_path: 0.0, ..PetlConfig::new(method.clone(), CLASSES) };
    let model = PetlModel::new(backbone, &config).unwrap();
    let images = images(8).to_device(accelerator.device());
    let labels = Tensor::zeros([8], (Kind::Int64, accelerator.device()));
    let evaluate = || tch::no_grad(|| model.forward(&images, false).unwrap());
    // What is computed once in a model.
    let _first = evaluate();
    let (_, evaluation) = accelerator.count(evaluate);
    let train = || model.forward(&images, true).unwrap();
    drop(train());
    let (logits, forward) = accelerator.count(train);
    let loss = logits.cross_entropy_for_logits(&labels);
    let ((), backward) = accelerator.count(|| loss.backward());
    for counts in [&evaluation, &forward, &backward] {
        assert_eq!((counts.waits(), counts.sent), (0, 0), "{method:?}: {counts:?}");
    }
    [evaluation, forward, backward]
}

/// The counts of one step of `fit`, shown or not.
fn step(accelerator: &Accelerator, method: &Method, config: &TrainConfig, shown: bool) -> Counts {
    let run = |steps: usize| {
        let backbone = FrozenViT::random(&vit(), 1, accelerator.device()).unwrap();
        let petl = PetlConfig { drop_path: 0.0, ..PetlConfig::new(method.clone(), CLASSES) };
        let mut model = PetlModel::new(backbone, &petl).unwrap();
        let count = 8 * steps;
        let pixels = Array4::from_shape_fn((count, 12, 20, 3), |(n, y, x, c)| {
            (n * 31 + y * 17 + x * 7 + c * 3) as u8
        });
        let labels = (0..count as i64).map(|n| n % CLASSES).collect();
        let images = ImageDataset::from_arrays(pixels, labels, CLASSES).unwrap();
        let observer: &mut dyn Observer = if shown { &mut Shown } else { &mut Silent };
        fit(&mut model, &images, None, config, observer).unwrap();
    };
    let steps = |steps| {
        // The first run computes what is kept.
        run(steps);
        accelerator.count(|| run(steps)).1
    };
    // What is done once in an epoch is not counted.
    let (few, many) = (steps(2), steps(6));
    many.without(&few).divided(4)
}

/// A step has a batch of 8 images.
fn plain() -> TrainConfig {
    TrainConfig {
        epochs: 1,
        batch_size: 8,
        normalization: Normalization::Half,
        ..TrainConfig::default()
    }
}

/// An observer that reads each step.
struct Shown;

impl Observer for Shown {}

/// Adds a line of the table, and checks that a step that is not shown does not wait.
fn step_row(accelerator: &Accelerator, method: &Method, config: &TrainConfig) -> String {
    let [silent, shown] = [false, true].map(|shown| step(accelerator, method, config, shown));
    assert_eq!(silent.waits(), 0, "{method:?}, {config:?}: {silent:?}");
    assert_eq!(shown.waits(), 1, "{method:?}, {config:?}: {shown:?}");
    format!("{} | {}", silent.launches(), silent.sent)
}

/// The launches of each pass for each method.
fn methods_table(accelerator: &Accelerator) -> String {
    let mut text =
        "\n| method on a ViT | evaluation | training, forward | backward | a step of `fit` \
                    | copies to the device in it |\n|---|---|---|---|---|---|\n"
            .to_owned();
    let vit = || FrozenViT::random(&vit(), 1, accelerator.device()).unwrap();
    for (name, method) in methods() {
        let launches = passes(accelerator, vit(), &method).map(|counts| counts.launches());
        let [evaluation, forward, backward] = launches;
        let step = match method {
            Method::LinearProbe => " | ".to_owned(),
            _ => step_row(accelerator, &method, &plain()),
        };
        text += &format!("| {name} | {evaluation} | {forward} | {backward} | {step} |\n");
    }
    text
}

/// The launches of one bypass: those of a model with bypasses beside attention and MLP of its first
/// block without those of one with a bypass beside attention alone.
fn bypass_table(accelerator: &Accelerator) -> String {
    let mut text =
        "\n| one bypass | evaluation | training, forward | backward |\n|---|---|---|---|\n"
            .to_owned();
    let with = |scale, dropout| ConvBypassConfig { scale, dropout, ..Default::default() };
    let cases = [
        ("the default", 0, with(1.0, 0.1)),
        ("without dropout", 0, with(1.0, 0.0)),
        ("without dropout and class token", 1, with(1.0, 0.0)),
        ("with s = 0.5", 0, with(0.5, 0.1)),
    ];
    for (name, variant, config) in cases {
        let counts = |sub_layers| {
            let (_, vit) = FrozenViT::variants().swap_remove(variant);
            let vit = ViTConfig { depth: 2, ..vit };
            let backbone = FrozenViT::random(&vit, 1, accelerator.device()).unwrap();
            let base = ConvBypassConfig { sub_layers, ..config.clone() };
            let blocks = Some(vec![8, 0]);
            let variant = ConvBypassVariant { base, blocks, ..Default::default() };
            passes(accelerator, backbone, &Method::ConvBypassVariant(variant))
        };
        let (both, one) = (counts(SubLayers::Both), counts(SubLayers::Attention));
        let [evaluation, forward, backward] = [0, 1, 2].map(|pass| both[pass].without(&one[pass]));
        let [evaluation, forward, backward] = [evaluation, forward, backward].map(|c| c.launches());
        text += &format!("| {name} | {evaluation} | {forward} | {backward} |\n");
    }
    text
}

/// The launches of a step with other settings.
fn settings_table(accelerator: &Accelerator) -> String {
    let mut text =
        "\n| Convpass with | a step of `fit` | copies to the device in it |\n|---|---|---|\n"
            .to_owned();
    let folder = tempfile::tempdir().unwrap();
    let kept = PrefixCache { folder: Some(folder.path().to_path_buf()), bf16: false };
    let cases = [
        ("nothing else", plain()),
        ("`recompute`", TrainConfig { recompute: true, ..plain() }),
        ("a kept prefix", TrainConfig { prefix: Some(kept), ..plain() }),
        ("2 parts of a batch", TrainConfig { micro_batch_size: Some(4), ..plain() }),
        ("clipped gradients", TrainConfig { max_grad_norm: Some(1.0), ..plain() }),
        (
            "balanced classes and smoothed labels",
            TrainConfig { class_weights: ClassWeights::Balanced, label_smoothing: 0.1, ..plain() },
        ),
    ];
    let base = ConvBypassVariant { blocks: Some(vec![0, 8]), ..Default::default() };
    for (name, config) in cases {
        let method = match &config.prefix {
            Some(_) => Method::ConvBypassVariant(base.clone()),
            None => Method::ConvBypass(ConvBypassConfig::default()),
        };
        text += &format!("| {name} | {} |\n", step_row(accelerator, &method, &config));
    }
    text
}

/// The launches of each kind of backbone, with bypasses where it has a place for them.
fn backbones_table(accelerator: &Accelerator) -> String {
    fn rows<B: Contract>(accelerator: &Accelerator, method: &Method, text: &mut String) {
        for (name, config) in B::variants() {
            let backbone = || B::random(&config, accelerator.device());
            let [frozen, ..] = passes(accelerator, backbone(), &Method::LinearProbe);
            let adapted = passes(accelerator, backbone(), method);
            let [evaluation, forward, backward] = adapted.map(|counts| counts.launches());
            let frozen = frozen.launches();
            *text += &format!("| {name} | {frozen} | {evaluation} | {forward} | {backward} |\n");
        }
    }
    let mut text = "\n| backbone of 3 blocks | frozen, evaluation | Convpass (ConvNeXt: full finetuning), evaluation \
                    | training, forward | backward |\n|---|---|---|---|---|\n"
        .to_owned();
    let bypass = Method::ConvBypass(ConvBypassConfig::default());
    rows::<FrozenViT>(accelerator, &bypass, &mut text);
    rows::<FrozenSwin>(accelerator, &bypass, &mut text);
    rows::<FrozenConvNeXt>(accelerator, &Method::Full, &mut text);
    text
}

#[test]
fn the_table_of_launches_is_up_to_date() {
    if !child::is_alone("accelerator::launches::the_table_of_launches_is_up_to_date") {
        return;
    }
    tch::set_num_threads(1);
    let accelerator = Accelerator::hold();
    let tables = [methods_table, bypass_table, settings_table, backbones_table];
    let tables: String = tables.into_iter().map(|table| table(&accelerator)).collect();
    let text = HEAD.to_owned() + &tables;
    let file = root().join(FILE);
    if std::env::var_os("CONVPASS_WRITE_LAUNCHES").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(written == text, "{FILE} holds other numbers than\n{text}");
}
