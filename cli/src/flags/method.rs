//! Flags of the method that is trained.

use clap::{Args, ValueEnum};
use convpass::Method;
use convpass::petl::{ConvBypassConfig, ConvInit, Placement, SubLayers};

use crate::failure::{Usage, chain_of};
use crate::plan::published_choice;

/// The method, and the options of Convpass.
#[derive(Args, Clone)]
pub struct MethodFlags {
    /// Method to train, by name with its default config, or a config as JSON, such as
    /// '{"name": "lora", "rank": 4}' [default: convpass].
    ///
    /// The names are convpass, adapter, adaptformer, lora, vpt, ssf, rep-adapter, fact, bitfit,
    /// layer-norm, linear (a linear probe) and full.
    #[arg(long, value_name = "NAME|JSON", value_parser = parse_method, help_heading = "Method")]
    pub method: Option<MethodArg>,
    #[command(flatten)]
    pub bypass: BypassFlags,
}

impl MethodFlags {
    /// Returns the method that the flags select for the task called `task`.
    ///
    /// # Errors
    /// [`Usage`] if a flag of Convpass is given together with another method or with a config.
    pub fn chosen(&self, task: &str) -> Result<Method, Usage> {
        match &self.method {
            Some(arg) if !arg.is_convpass_by_name() => {
                self.bypass.refuse("--method convpass")?;
                Ok(arg.method.clone())
            }
            _ => Ok(Method::ConvBypass(self.bypass.config(task))),
        }
    }
}

/// A method, and whether it was given by name or as a config.
#[derive(Clone)]
pub struct MethodArg {
    pub method: Method,
    pub by_name: bool,
}

impl MethodArg {
    fn is_convpass_by_name(&self) -> bool {
        self.by_name && matches!(self.method, Method::ConvBypass(_))
    }
}

/// Parses a method from its name or from its config as JSON.
pub fn parse_method(text: &str) -> Result<MethodArg, String> {
    let by_name = !text.trim_start().starts_with('{');
    let method = text.parse().map_err(|error: convpass::Error| chain_of(error))?;
    Ok(MethodArg { method, by_name })
}

/// The options of Convpass.
#[derive(Args, Clone, Default)]
pub struct BypassFlags {
    /// Bottleneck dim h of the bypass [default: 8].
    #[arg(long, visible_alias = "h", value_name = "N", help_heading = "Convpass")]
    pub bottleneck_dim: Option<i64>,
    /// Scale s that the output of the bypass is multiplied by [default: the published one of the
    /// task, else 1].
    #[arg(long, value_name = "S", help_heading = "Convpass")]
    pub scale: Option<f64>,
    /// Initial weights of the convolution [default: the published ones of the task, else identity].
    #[arg(long, value_enum, help_heading = "Convpass")]
    pub init: Option<InitFlag>,
    /// Sub-layers that get a bypass [default: both].
    #[arg(long, value_enum, value_name = "WHICH", help_heading = "Convpass")]
    pub sub_layers: Option<SubLayersFlag>,
    /// Put the bypass after the sub-layer instead of beside it.
    #[arg(long, help_heading = "Convpass")]
    pub sequential: bool,
    /// Height and width of the convolution's kernel, odd [default: 3].
    #[arg(long, value_name = "N", help_heading = "Convpass")]
    pub kernel_size: Option<i64>,
    /// Dropout rate in the bypass [default: 0.1].
    #[arg(long, value_name = "RATE", help_heading = "Convpass")]
    pub dropout: Option<f64>,
}

/// Initial weights of the convolution.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum InitFlag {
    /// One at the centre and zero elsewhere: a token passes unchanged.
    Identity,
    /// Xavier's uniform distribution.
    #[value(aliases = ["xavier", "xavier-uniform"])]
    XavierUniform,
}

impl From<InitFlag> for ConvInit {
    fn from(init: InitFlag) -> Self {
        match init {
            InitFlag::Identity => ConvInit::Identity,
            InitFlag::XavierUniform => ConvInit::XavierUniform,
        }
    }
}

/// Sub-layers that get a bypass.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum SubLayersFlag {
    /// Attention and MLP.
    Both,
    /// Attention alone.
    Attention,
    /// MLP alone.
    Mlp,
}

impl From<SubLayersFlag> for SubLayers {
    fn from(sub_layers: SubLayersFlag) -> Self {
        match sub_layers {
            SubLayersFlag::Both => SubLayers::Both,
            SubLayersFlag::Attention => SubLayers::Attention,
            SubLayersFlag::Mlp => SubLayers::Mlp,
        }
    }
}

impl BypassFlags {
    /// Returns the config that the flags select for the task called `task`. A task of VTAB-1k has a
    /// published scale and init, which are used unless a flag sets them.
    pub fn config(&self, task: &str) -> ConvBypassConfig {
        let default = ConvBypassConfig::default();
        let sub_layers = self.sub_layers.map_or(default.sub_layers, SubLayers::from);
        let (scale, init) =
            published_choice(task, sub_layers).unwrap_or((default.scale, default.conv_init));
        ConvBypassConfig {
            bottleneck_dim: self.bottleneck_dim.unwrap_or(default.bottleneck_dim),
            kernel_size: self.kernel_size.unwrap_or(default.kernel_size),
            scale: self.scale.unwrap_or(scale),
            dropout: self.dropout.unwrap_or(default.dropout),
            conv_init: self.init.map_or(init, ConvInit::from),
            sub_layers,
            placement: if self.sequential { Placement::Sequential } else { default.placement },
        }
    }

    /// Checks that no flag of Convpass is given. `needs` is the argument that such flags need.
    ///
    /// # Errors
    /// [`Usage`] with the first flag that is given.
    pub fn refuse(&self, needs: &str) -> Result<(), Usage> {
        let flags = [
            ("--bottleneck-dim", self.bottleneck_dim.is_some()),
            ("--scale", self.scale.is_some()),
            ("--init", self.init.is_some()),
            ("--sub-layers", self.sub_layers.is_some()),
            ("--sequential", self.sequential),
            ("--kernel-size", self.kernel_size.is_some()),
            ("--dropout", self.dropout.is_some()),
        ];
        match flags.into_iter().find(|(_, is_given)| *is_given) {
            Some((flag, _)) => Err(Usage(format!(
                "{flag} needs {needs}; configure another method as JSON in --method"
            ))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_flags_the_config_is_the_default_with_the_published_choices() {
        let flags = BypassFlags::default();
        assert_eq!(flags.config("digits"), ConvBypassConfig::default());
        let (scale, conv_init) = published_choice("dtd", SubLayers::Both).unwrap();
        let published = ConvBypassConfig { scale, conv_init, ..ConvBypassConfig::default() };
        assert_eq!(flags.config("dtd"), published);
        let flags = BypassFlags { scale: Some(3.0), ..flags };
        assert_eq!(flags.config("dtd"), ConvBypassConfig { scale: 3.0, ..published });
    }
}
