//! `convpass audit`: counts the weights that each method trains beside a preset backbone. No
//! weights are allocated.

use std::io::{self, Write};

use anyhow::{Result, bail};
use convpass::backbone::{
    Backbone, BackboneConfig, ConvNeXtConfig, FrozenConvNeXt, FrozenSwin, FrozenViT, SwinConfig,
    ViTConfig,
};
use convpass::model::{AuditRow, PetlConfig, PetlModel, audit};
use convpass::petl::{
    AdaptFormerConfig, AdapterConfig, ConvBypassConfig, ConvBypassVariant, FactConfig, FactForm,
    LoraConfig, LowBitConfig, Method, Placement, RepAdapterConfig, SsfConfig, SubLayers, VptConfig,
};
use serde::Serialize;
use serde_json::Value;

use crate::Outcome;
use crate::failure::chain_of;
use crate::flags::{FormatFlag, OutputFormat};

/// Counts the weights that each method trains beside a preset backbone, without the head.
///
/// No weight is allocated. A method that the backbone has no place for is shown as `-`; JSON and
/// CSV hold the reason.
#[derive(clap::Args)]
#[command(
    after_long_help = "Example:\n  convpass audit --preset vit_large_patch16_224 --format csv"
)]
pub struct AuditArgs {
    /// Name of a preset, or `all` for every preset.
    #[arg(long, value_name = "NAME", default_value = "vit_base_patch16_224")]
    preset: String,
    /// Bottleneck dims h of Convpass to count, separated by commas.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "4,8,16,32,64")]
    bottleneck_dims: Vec<i64>,
    /// Also build each model and count its variables; the exit code is 1 if a count differs.
    #[arg(long)]
    built: bool,
    #[command(flatten)]
    format: FormatFlag,
}

/// The counts of all methods beside one backbone.
#[derive(Serialize)]
struct AuditTable {
    preset: String,
    config: Value,
    /// Weights of the backbone.
    backbone: i64,
    methods: Vec<AuditLine>,
}

#[derive(Serialize)]
struct AuditLine {
    label: String,
    /// The counts in closed form; `None` if the backbone does not support the method.
    #[serde(flatten)]
    audit: Option<AuditRow>,
    /// The number of weights in the variables of the built model.
    #[serde(skip_serializing_if = "Option::is_none")]
    built: Option<i64>,
    /// Why the backbone does not support the method.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
}

impl AuditLine {
    fn params(&self) -> Option<i64> {
        self.audit.as_ref().map(|row| row.params)
    }
}

pub fn run(args: &AuditArgs) -> Result<Outcome> {
    // Many small variables are created and nothing is computed, so more threads would only wait.
    tch::set_num_threads(1);
    let methods = methods(&args.bottleneck_dims);
    methods.iter().try_for_each(|(_, method)| method.validate())?;
    let names: Vec<&str> = match args.preset.as_str() {
        "all" => presets().collect(),
        name => vec![name],
    };
    let tables = names.into_iter().map(|name| table(name, &methods, args.built));
    let tables = tables.collect::<Result<Vec<_>>>()?;
    let mut out = io::stdout().lock();
    match args.format.format {
        OutputFormat::Text => print_text(&mut out, &tables, args.built)?,
        OutputFormat::Json => writeln!(out, "{}", serde_json::to_string_pretty(&tables)?)?,
        OutputFormat::Csv => print_csv(&mut out, &tables)?,
    }
    let differ = args.built && tables.iter().any(differs);
    Ok(if differ { Outcome::Partial } else { Outcome::Done })
}

/// Returns the methods to count with their labels: the paper's comparison at r = h = 8, its
/// ablations, and Convpass with each bottleneck dim.
fn methods(bottleneck_dims: &[i64]) -> Vec<(String, Method)> {
    let named = compared().into_iter().chain(ablations());
    let mut methods: Vec<_> = named.map(|(label, method)| (label.to_owned(), method)).collect();
    for &bottleneck_dim in bottleneck_dims {
        for (place, sub_layers) in [("", SubLayers::Both), (", attention", SubLayers::Attention)] {
            let config =
                ConvBypassConfig { bottleneck_dim, sub_layers, ..ConvBypassConfig::default() };
            let label = format!("conv_bypass h={bottleneck_dim}{place}");
            methods.push((label, Method::ConvBypass(config)));
        }
    }
    methods
}

/// Returns the methods that the paper compares Convpass with.
#[rustfmt::skip]
fn compared() -> Vec<(&'static str, Method)> {
    let adapter = AdapterConfig::default();
    let former = AdaptFormerConfig::default();
    vec![
        ("linear_probe", Method::LinearProbe),
        ("full", Method::Full),
        ("bit_fit", Method::BitFit),
        ("layer_norm", Method::LayerNorm),
        ("vpt shallow, 5 prompts", Method::Vpt(VptConfig { deep: false, ..Default::default() })),
        ("vpt deep, 5 prompts", Method::Vpt(VptConfig::default())),
        ("adapter (Pfeiffer) h=8", Method::Adapter(adapter.clone())),
        ("adapter (Houlsby) h=8", Method::Adapter(AdapterConfig { sub_layers: SubLayers::Both, ..adapter.clone() })),
        ("adapter+ h=8", Method::Adapter(AdapterConfig { channel_scale: true, ..adapter })),
        ("adapt_former h=8", Method::AdaptFormer(former.clone())),
        ("adapt_former h=8, channel s", Method::AdaptFormer(AdaptFormerConfig { channel_scale: true, ..former })),
        ("lora q, v r=8", Method::Lora(LoraConfig::default())),
        ("ssf", Method::Ssf(SsfConfig::default())),
        ("rep_adapter h=8", Method::RepAdapter(RepAdapterConfig::default())),
        ("fact tt r=16", Method::Fact(FactConfig::default())),
        ("fact tk r=16", Method::Fact(FactConfig { form: FactForm::Tucker, ..Default::default() })),
    ]
}

/// Returns the ablations of Convpass: other placements, other kernels, and few bits.
#[rustfmt::skip]
fn ablations() -> Vec<(&'static str, Method)> {
    use SubLayers::{Attention, Mlp};
    let bypass = ConvBypassConfig::default();
    let beside = |sub_layers| ConvBypassConfig { sub_layers, ..bypass.clone() };
    let sequential = |sub_layers| ConvBypassConfig { placement: Placement::Sequential, ..beside(sub_layers) };
    // The arguments are the kernel sizes beside the attention and beside the MLP.
    let kernels = |attention, mlp| ConvBypassVariant {
        mlp_kernel_size: Some(mlp),
        ..ConvBypassConfig { kernel_size: attention, ..bypass.clone() }.into()
    };
    let low_bit = |bits| Method::LowBit(LowBitConfig {
        bits, method: Box::new(Method::ConvBypass(bypass.clone()))
    });
    vec![
        ("conv_bypass h=8, MLP", Method::ConvBypass(beside(Mlp))),
        ("conv_bypass h=8, after attn", Method::ConvBypass(sequential(Attention))),
        ("conv_bypass h=8, after MLP", Method::ConvBypass(sequential(Mlp))),
        ("conv_bypass h=8, 1x1", Method::ConvBypassVariant(kernels(1, 1))),
        ("conv_bypass h=8, 1x1 at attn", Method::ConvBypassVariant(kernels(1, 3))),
        ("conv_bypass h=8, 1x1 at MLP", Method::ConvBypassVariant(kernels(3, 1))),
        ("conv_bypass h=8, channel s", Method::ConvBypassVariant(ConvBypassVariant {
            channel_scale: true, ..bypass.clone().into()
        })),
        ("conv_bypass h=8, 1 bit", low_bit(1)),
        ("conv_bypass h=8, 2 bits", low_bit(2)),
        ("conv_bypass h=8, 4 bits", low_bit(4)),
        ("conv_bypass h=8, 8 bits", low_bit(8)),
    ]
}

/// Returns the names of the presets of all families.
fn presets() -> impl Iterator<Item = &'static str> {
    ViTConfig::presets().chain(SwinConfig::presets()).chain(ConvNeXtConfig::presets())
}

/// Counts every method beside the preset `name`.
fn table(name: &str, methods: &[(String, Method)], built: bool) -> Result<AuditTable> {
    if let Ok(config) = SwinConfig::preset(name) {
        return rows(name, &config, FrozenSwin::blank(&config)?, methods, built);
    }
    if let Ok(config) = ConvNeXtConfig::preset(name) {
        return rows(name, &config, FrozenConvNeXt::blank(&config)?, methods, built);
    }
    match ViTConfig::preset(name) {
        Ok(config) => rows(name, &config, FrozenViT::blank(&config)?, methods, built),
        Err(_) => {
            bail!("no preset {name}; the presets are {}", presets().collect::<Vec<_>>().join(", "))
        }
    }
}

/// Counts every method beside one backbone.
fn rows<B: Backbone>(
    name: &str,
    config: &(impl BackboneConfig + Serialize),
    backbone: B,
    methods: &[(String, Method)],
    built: bool,
) -> Result<AuditTable> {
    let row = |(label, method): &(String, Method)| -> Result<AuditLine> {
        let (label, closed_form) = (label.clone(), audit(config, method));
        let counted = built.then(|| count(&backbone, method));
        Ok(match closed_form {
            Ok(row) => {
                AuditLine { label, audit: Some(row), built: counted.transpose()?, refused: None }
            }
            Err(error) => {
                let (built, refused) = (counted.and_then(Result::ok), Some(chain_of(error)));
                AuditLine { label, audit: None, built, refused }
            }
        })
    };
    let methods = methods.iter().map(row).collect::<Result<_>>()?;
    Ok(AuditTable {
        preset: name.to_owned(),
        config: serde_json::to_value(config)?,
        backbone: config.shape()?.num_params,
        methods,
    })
}

/// The most weights that are copied to count them: half a gigabyte.
const COPIED: i64 = 1 << 27;

/// Returns the number of weights in the variables that `method` creates beside `backbone`.
///
/// Full finetuning copies every weight into a variable. If there are more than [`COPIED`], the
/// weights of the backbone are counted instead.
fn count<B: Backbone>(backbone: &B, method: &Method) -> Result<i64> {
    let read = backbone.named_weights().iter().filter(|(name, _)| backbone.is_read(name));
    let weights = i64::try_from(read.map(|(_, weight)| weight.numel()).sum::<usize>())?;
    if *method == Method::Full && weights > COPIED {
        return Ok(weights);
    }
    let model = PetlModel::new(backbone.clone(), &PetlConfig::new(method.clone(), 1))?;
    Ok(i64::try_from(model.trainable_params().method)?)
}

/// Returns whether a closed form and a built model disagree: on the count, or on whether the
/// backbone supports the method.
fn differs(table: &AuditTable) -> bool {
    table.methods.iter().any(|row| row.built != row.params())
}

fn print_text(out: &mut impl Write, tables: &[AuditTable], built: bool) -> Result<()> {
    for (index, table) in tables.iter().enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        let column = |text: &str| if built { format!("{text:>14}") } else { String::new() };
        writeln!(out, "{}: {} weights", table.preset, grouped(table.backbone))?;
        let (label, built) = ("method", column("built"));
        writeln!(out, "{label:<30}{:>14}{built}{:>15}{:>13}", "trained", "% of backbone", "file")?;
        for row in &table.methods {
            let built = column(&row.built.map_or("-".to_owned(), grouped));
            let [params, percent, size] = match &row.audit {
                Some(audit) => [
                    grouped(audit.params),
                    format!("{:.2}", audit.percent),
                    format!("{} kB", grouped((audit.bytes + 500) / 1000)),
                ],
                None => ["-", "-", "-"].map(str::to_owned),
            };
            let mark =
                if row.built.is_some_and(|_| row.built != row.params()) { "  DIFFERS" } else { "" };
            writeln!(out, "{:<30}{params:>14}{built}{percent:>15}{size:>13}{mark}", row.label)?;
        }
    }
    Ok(())
}

/// Prints one line for each method of each preset. Fields without a value are empty.
fn print_csv(out: &mut impl Write, tables: &[AuditTable]) -> Result<()> {
    let mut csv = csv::Writer::from_writer(out);
    csv.write_record([
        "preset", "backbone", "method", "params", "built", "percent", "bytes", "refused",
    ])?;
    for table in tables {
        for row in &table.methods {
            let of_audit =
                |f: &dyn Fn(&AuditRow) -> String| row.audit.as_ref().map(f).unwrap_or_default();
            csv.write_record([
                table.preset.clone(),
                table.backbone.to_string(),
                row.label.clone(),
                of_audit(&|audit| audit.params.to_string()),
                row.built.map(|built| built.to_string()).unwrap_or_default(),
                of_audit(&|audit| audit.percent.to_string()),
                of_audit(&|audit| audit.bytes.to_string()),
                row.refused.clone().unwrap_or_default(),
            ])?;
        }
    }
    Ok(csv.flush()?)
}

fn grouped(number: i64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).unwrap_or_default())
        .collect();
    groups.join(",")
}
