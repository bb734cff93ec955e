//! Prints what each method trains beside a preset backbone, without allocating either.
//!
//! ```text
//! $ cargo run --release --example audit
//! vit_base_patch16_224: 85,798,656 weights
//! method                          trained   % of backbone    file, f32
//! linear_probe                          0            0.00         0 kB
//! ...
//! ```
//!
//! `--preset NAME` takes another backbone, `--preset all` every one, `--json` prints JSON for programs.

use anyhow::Result;
use clap::Parser;
use convpass::{
    AdaptFormerConfig, AdapterConfig, AuditRow, ConvBypassConfig, FactConfig, LoraConfig, Method,
    RepAdapterConfig, SsfConfig, SubLayers, ViTConfig, VptConfig, audit,
};
use serde_json::json;

/// Parameter table of a backbone: what each method trains; heads are not counted.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// A preset's name, or `all`.
    #[arg(long, default_value = "vit_base_patch16_224")]
    preset: String,
    /// Bottleneck dims h to list.
    #[arg(long, value_delimiter = ',', default_value = "4,8,16,32,64")]
    bottleneck_dims: Vec<i64>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let presets: Vec<&str> = match args.preset.as_str() {
        "all" => ViTConfig::presets().collect(),
        name => vec![name],
    };
    let mut tables = Vec::new();
    for name in presets {
        let vit = ViTConfig::preset(name)?;
        let rows = methods(&args.bottleneck_dims)
            .into_iter()
            .map(|(label, method)| Ok((label, audit(&vit, &method)?)))
            .collect::<Result<Vec<_>>>()?;
        tables.push((name, vit, rows));
    }
    if args.json {
        let json: Vec<_> = tables
            .iter()
            .map(|(name, vit, rows)| {
                let rows: Vec<_> = rows.iter().map(|(_, row)| row).collect();
                json!({ "preset": name, "config": vit, "backbone": vit.num_params(), "methods": rows })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&json)?);
    } else {
        for (index, (name, vit, rows)) in tables.iter().enumerate() {
            if index > 0 {
                println!();
            }
            print_table(name, vit, rows);
        }
    }
    Ok(())
}

/// The rows of the paper's comparison at r = h = 8, then Convpass over bottlenecks.
fn methods(bottleneck_dims: &[i64]) -> Vec<(String, Method)> {
    let both = SubLayers::Both;
    let houlsby = AdapterConfig { sub_layers: both, ..Default::default() };
    let named = [
        ("linear_probe", Method::LinearProbe),
        ("full", Method::Full),
        ("bit_fit", Method::BitFit),
        ("layer_norm", Method::LayerNorm),
        ("vpt deep, 5 prompts", Method::Vpt(VptConfig::default())),
        ("adapter (Pfeiffer) h=8", Method::Adapter(AdapterConfig::default())),
        ("adapter (Houlsby) h=8", Method::Adapter(houlsby)),
        ("adapt_former h=8", Method::AdaptFormer(AdaptFormerConfig::default())),
        ("lora q, v r=8", Method::Lora(LoraConfig::default())),
        ("ssf", Method::Ssf(SsfConfig::default())),
        ("rep_adapter h=8", Method::RepAdapter(RepAdapterConfig::default())),
        ("fact", Method::Fact(FactConfig::default())),
    ];
    let mut methods: Vec<_> =
        named.into_iter().map(|(label, method)| (label.to_owned(), method)).collect();
    for &bottleneck_dim in bottleneck_dims {
        for (place, sub_layers) in [("", both), (" attention", SubLayers::Attention)] {
            let config = ConvBypassConfig { bottleneck_dim, sub_layers, ..Default::default() };
            let label = format!("conv_bypass h={bottleneck_dim}{place}");
            methods.push((label, Method::ConvBypass(config)));
        }
    }
    methods
}

fn print_table(name: &str, vit: &ViTConfig, rows: &[(String, AuditRow)]) {
    println!("{name}: {} weights", grouped(vit.num_params()));
    println!("{:<28}{:>14}{:>16}{:>13}", "method", "trained", "% of backbone", "file, f32");
    for (label, row) in rows {
        println!(
            "{label:<28}{:>14}{:>16.2}{:>10} kB",
            grouped(row.params),
            row.percent,
            grouped((row.bytes + 500) / 1000)
        );
    }
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
