//! Prints what each method trains beside a preset ViT, without a checkpoint.
//!
//! ```text
//! $ cargo run --release --example audit -- --preset vit_base_patch16_224
//! vit_base_patch16_224: 85,798,656 weights
//! method                           trained         built  % of backbone      adapter
//! linear_probe                           0             0           0.00         0 kB
//! ...
//! ```
//!
//! It teaches two things: `audit` counts from a backbone's config and a method's alone, so that a budget can be checked
//! before anything is trained; and a model beside `FrozenViT::blank`, whose weights take no memory, has the same
//! variables. The head is not counted. The program fails where the two counts differ. `convpass audit` does the same
//! for every family of backbones, as text, JSON and CSV.

use anyhow::{Result, ensure};
use clap::Parser;
use convpass::petl::{AdaptFormerConfig, AdapterConfig, FactConfig, FactForm, LowBitConfig};
use convpass::petl::{ConvBypassVariant, Placement, RepAdapterConfig, SsfConfig, VptConfig};
use convpass::{
    ConvBypassConfig, FrozenViT, LoraConfig, Method, PetlConfig, PetlModel, SubLayers, ViTConfig,
    audit,
};

/// What each method trains beside a preset ViT; heads are not counted.
#[derive(Parser)]
struct Args {
    /// The preset's name.
    #[arg(long, default_value = "vit_base_patch16_224")]
    preset: String,
    /// h, the bottleneck of the methods that have one, and r of LoRA.
    #[arg(long, default_value_t = 8)]
    bottleneck_dim: i64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    // Nothing is computed, so that threads would only wait for each other.
    tch::set_num_threads(1);
    let config = ViTConfig::preset(&args.preset)?;
    let backbone = FrozenViT::blank(&config)?;
    println!("{}: {} weights", args.preset, grouped(config.num_params()));
    let columns = ["trained", "built", "% of backbone", "adapter"];
    let [trained, built, percent, file] = columns;
    println!("{:<26}{trained:>14}{built:>14}{percent:>15}{file:>13}", "method");
    for (label, method) in methods(args.bottleneck_dim) {
        let row = audit(&config, &method)?;
        let model = PetlModel::new(backbone.clone(), &PetlConfig::new(method, 1))?;
        let built = i64::try_from(model.trainable_params().method)?;
        let size = format!("{} kB", grouped((row.bytes + 500) / 1000));
        let (trained, counted) = (grouped(row.params), grouped(built));
        println!("{label:<26}{trained:>14}{counted:>14}{:>15.2}{size:>13}", row.percent);
        ensure!(built == row.params, "{label}: the built model trains {counted}");
    }
    Ok(())
}

/// Every method, and Convpass as in the paper's ablations.
fn methods(h: i64) -> Vec<(&'static str, Method)> {
    let bypass = ConvBypassConfig { bottleneck_dim: h, ..Default::default() };
    let beside = |sub_layers| ConvBypassConfig { sub_layers, ..bypass.clone() };
    let sequential =
        ConvBypassConfig { placement: Placement::Sequential, ..beside(SubLayers::Mlp) };
    let pointwise = ConvBypassConfig { kernel_size: 1, ..bypass.clone() };
    let scaled = ConvBypassVariant { channel_scale: true, ..bypass.clone().into() };
    let one_bit = LowBitConfig { bits: 1, method: Box::new(Method::ConvBypass(bypass.clone())) };
    let adapter = AdapterConfig { bottleneck_dim: h, ..Default::default() };
    let former = AdaptFormerConfig { bottleneck_dim: h, ..Default::default() };
    let lora = LoraConfig { rank: h, alpha: h as f64, ..Default::default() };
    let rep_adapter = RepAdapterConfig { bottleneck_dim: h, ..Default::default() };
    let tucker = FactConfig { form: FactForm::Tucker, ..Default::default() };
    let both = [Method::Lora(lora.clone()), Method::ConvBypass(beside(SubLayers::Mlp))].to_vec();
    vec![
        ("linear_probe", Method::LinearProbe),
        ("full", Method::Full),
        ("bit_fit", Method::BitFit),
        ("layer_norm", Method::LayerNorm),
        ("vpt, 5 prompts a block", Method::Vpt(VptConfig::default())),
        ("adapter", Method::Adapter(adapter)),
        ("adapt_former", Method::AdaptFormer(former)),
        ("lora, Q and V", Method::Lora(lora)),
        ("ssf", Method::Ssf(SsfConfig::default())),
        ("rep_adapter", Method::RepAdapter(rep_adapter)),
        ("fact, tensor train r=16", Method::Fact(FactConfig::default())),
        ("fact, Tucker r=16", Method::Fact(tucker)),
        ("conv_bypass", Method::ConvBypass(bypass.clone())),
        ("conv_bypass, attention", Method::ConvBypass(beside(SubLayers::Attention))),
        ("conv_bypass, MLP", Method::ConvBypass(beside(SubLayers::Mlp))),
        ("conv_bypass, after MLP", Method::ConvBypass(sequential)),
        ("conv_bypass, 1x1", Method::ConvBypass(pointwise)),
        ("conv_bypass, channel s", Method::ConvBypassVariant(scaled)),
        ("conv_bypass, 1 bit", Method::LowBit(one_bit)),
        ("lora + conv_bypass, MLP", Method::Compose { methods: both }),
    ]
}

/// A number with commas between the thousands.
fn grouped(number: i64) -> String {
    let digits = number.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}
