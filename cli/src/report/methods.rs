//! The name and the order of methods in tables.

use serde_json::{Map, Value, json};

use convpass::petl::Method;

/// Fields that are chosen for each task. Runs that differ in them have the same method.
const PER_TASK: [&str; 5] = ["name", "scale", "alpha", "conv_init", "dropout"];

/// Returns the name of the method with all fields that are not the default, such as `Convpass,
/// bottleneck dim 16`.
pub(super) fn label(method: &Method) -> String {
    let title = match method {
        Method::LinearProbe => "Linear probe",
        Method::Full => "Full",
        Method::BitFit => "BitFit",
        Method::LayerNorm => "LayerNorm",
        Method::ConvBypass(_) | Method::ConvBypassVariant(_) => "Convpass",
        Method::Adapter(_) => "Adapter",
        Method::AdaptFormer(_) => "AdaptFormer",
        Method::Lora(_) => "LoRA",
        Method::Vpt(_) => "VPT-deep",
        Method::Ssf(_) => "SSF",
        Method::RepAdapter(_) => "RepAdapter",
        Method::Fact(_) => "FacT",
        Method::LowBit(config) => {
            return format!("{} at {} bit", label(&config.method), config.bits);
        }
        Method::Compose { methods } => {
            return methods.iter().map(label).collect::<Vec<_>>().join(" + ");
        }
        // A method of another crate.
        other => other.name(),
    };
    choices(method).iter().fold(title.to_owned(), |all, choice| format!("{all}, {choice}"))
}

/// Returns the rank of the method in tables: baselines are first, bypasses last.
pub(super) fn rank(method: &Method) -> usize {
    const ORDER: [&str; 12] = [
        "full",
        "linear_probe",
        "bit_fit",
        "layer_norm",
        "vpt",
        "ssf",
        "lora",
        "fact",
        "rep_adapter",
        "adapter",
        "adapt_former",
        "compose",
    ];
    ORDER.iter().position(|name| *name == method.name()).unwrap_or(ORDER.len())
}

/// Returns a text such as `sub layers attention` for each field that is not the default.
fn choices(method: &Method) -> Vec<String> {
    let fields = |method: &Method| serde_json::to_value(method).map(flat).unwrap_or_default();
    let default = serde_json::from_value::<Method>(json!({ "name": method.name() }));
    let default = default.as_ref().map(fields).unwrap_or_default();
    let differs = |(name, value): &(&String, &Value)| {
        !PER_TASK.contains(&name.as_str()) && default.get(*name) != Some(*value)
    };
    fields(method).iter().filter(differs).map(|(name, value)| word(name, value)).collect()
}

/// Returns the fields, including those of a nested config.
fn flat(value: Value) -> Map<String, Value> {
    let Value::Object(mut fields) = value else { return Map::new() };
    if let Some(Value::Object(base)) = fields.remove("base") {
        fields.extend(base);
    }
    fields
}

fn word(name: &str, value: &Value) -> String {
    let name = name.replace('_', " ");
    match value {
        Value::String(text) if name == "sub layers" => format!("{text} only"),
        Value::String(text) => text.replace('_', " "),
        Value::Bool(true) => name,
        Value::Bool(false) => format!("no {name}"),
        other => format!("{name} {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_tell_methods_apart_and_not_the_choices_of_a_task() {
        let label = |config: Value| label(&serde_json::from_value(config).unwrap());
        let convpass = json!({"name": "conv_bypass", "scale": 10.0, "conv_init": "xavier_uniform"});
        assert_eq!(label(convpass), "Convpass");
        let attention = json!({"name": "conv_bypass", "sub_layers": "attention"});
        assert_eq!(label(attention), "Convpass, attention only");
        let wide = json!({"name": "conv_bypass_variant", "base": {"bottleneck_dim": 16}});
        assert_eq!(label(wide), "Convpass, bottleneck dim 16");
        let trained = json!({"name": "conv_bypass_variant", "channel_scale": true});
        assert_eq!(label(trained), "Convpass, channel scale");
        assert_eq!(label(json!({"name": "lora", "rank": 4, "alpha": 40})), "LoRA, rank 4");
        let mixed = json!({"name": "compose", "methods": [{"name": "vpt"}, {"name": "bit_fit"}]});
        assert_eq!(label(mixed), "VPT-deep + BitFit");
        let coded = json!({"name": "low_bit", "bits": 1, "method": {"name": "adapter"}});
        assert_eq!(label(coded), "Adapter at 1 bit");
    }
}
