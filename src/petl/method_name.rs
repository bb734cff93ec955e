//! Parsing of methods from text, for command lines and config files.

use std::str::FromStr;

use serde_json::json;

use super::Method;
use crate::error::{Error, Result};

/// The short names that are accepted in addition to those of [`Method::name`].
const SHORT: [(&str, &str); 4] = [
    ("linear", "linear_probe"),
    ("bitfit", "bit_fit"),
    ("adaptformer", "adapt_former"),
    ("convpass", "conv_bypass"),
];

impl FromStr for Method {
    type Err = Error;

    /// Parses a method from its name or from its config as JSON.
    ///
    /// A name gives the default config: `lora`, `adapt-former`, `conv_bypass`, or one of the short
    /// names `linear`, `bitfit`, `adaptformer` and `convpass`. An example of a config is `{"name":
    /// "lora", "rank": 4}`. The config is not validated.
    ///
    /// # Errors
    /// Returns [`Error::Config`], which lists the names or says where the JSON is wrong.
    fn from_str(text: &str) -> Result<Self> {
        let parsed = if text.trim_start().starts_with('{') {
            serde_json::from_str(text)
        } else {
            let short = SHORT.iter().find(|(short, _)| *short == text);
            let name = short.map_or_else(|| text.replace('-', "_"), |(_, name)| (*name).to_owned());
            serde_json::from_value(json!({ "name": name }))
        };
        parsed.map_err(|error| {
            let expected = "the name of a method, or its config as JSON";
            Error::config("method", expected, format!("{text} ({error})"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::petl::LoraConfig;

    #[test]
    fn names_and_configs_are_parsed() {
        for (text, name) in [
            ("linear", "linear_probe"),
            ("linear_probe", "linear_probe"),
            ("bitfit", "bit_fit"),
            ("adaptformer", "adapt_former"),
            ("adapt-former", "adapt_former"),
            ("convpass", "conv_bypass"),
            ("rep-adapter", "rep_adapter"),
            ("vpt", "vpt"),
        ] {
            assert_eq!(text.parse::<Method>().unwrap().name(), name);
        }
        let lora: Method = r#" {"name": "lora", "rank": 4}"#.parse().unwrap();
        assert_eq!(lora, Method::Lora(LoraConfig { rank: 4, ..LoraConfig::default() }));
    }

    #[test]
    fn an_error_lists_the_names_or_says_what_is_wrong() {
        for (text, part) in [
            ("lra", "`lora`"),
            ("", "`linear_probe`"),
            (r#"{"name": "lora", "rnk": 4}"#, "rnk"),
            (r#"{"name": "lora""#, "EOF"),
        ] {
            let error = text.parse::<Method>().unwrap_err().to_string();
            assert!(error.contains("method must be") && error.contains(part), "{error}");
        }
    }
}
