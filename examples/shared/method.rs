//! A method on a command line.

use convpass::Method;

/// A method from its name, for its defaults, or from its config as JSON.
pub fn parse_method(text: &str) -> Result<Method, String> {
    let method = match text.starts_with('{') {
        true => serde_json::from_str(text),
        false => {
            let name = match text {
                "linear" => "linear_probe".to_owned(),
                "bitfit" => "bit_fit".to_owned(),
                "adaptformer" => "adapt_former".to_owned(),
                "convpass" => "conv_bypass".to_owned(),
                name => name.replace('-', "_"),
            };
            serde_json::from_value(serde_json::json!({ "name": name }))
        }
    };
    method.map_err(|e| e.to_string())
}
