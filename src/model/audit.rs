//! Counts the trainable parameters of a method from its declaration, without allocating weights.

use serde::{Deserialize, Serialize};

use crate::backbone::BackboneConfig;
use crate::error::Result;
use crate::petl::Method;
use crate::seam::BackboneShape;

/// One row of a parameter table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AuditRow {
    /// The method with its config.
    pub method: Method,
    /// Number of weights that the method trains. The head is not counted, as in papers.
    pub params: i64,
    /// Number of weights of the backbone.
    pub backbone: i64,
    /// `params` divided by `backbone`, in percent.
    pub percent: f64,
    /// Bytes of the method's weights in an adapter file: four for each weight, or fewer with
    /// [`Method::LowBit`].
    pub bytes: i64,
}

/// Counts the weights that `method` trains on a backbone with this config.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) if the config or the method is invalid;
/// [`Error::Unsupported`](crate::Error::Unsupported) if the method cannot be applied to the
/// backbone.
pub fn audit(config: &impl BackboneConfig, method: &Method) -> Result<AuditRow> {
    config.validate()?;
    audit_shape(&config.shape()?, method)
}

/// Does the same as [`audit`](fn@audit) for a backbone whose shape is known ([`Backbone::shape`]).
///
/// # Errors
/// The errors of [`audit`](fn@audit).
///
/// [`Backbone::shape`]: crate::Backbone::shape
pub fn audit_shape(shape: &BackboneShape, method: &Method) -> Result<AuditRow> {
    method.validate()?;
    let (params, backbone) = (method.num_params(shape)?, shape.num_params);
    let percent = 100.0 * params as f64 / backbone as f64;
    let bytes = method.stored_bytes(shape, i64::MAX)?.unwrap_or(i64::MAX);
    Ok(AuditRow { method: method.clone(), params, backbone, percent, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ViTConfig;
    use crate::petl::{ConvBypassConfig, LoraConfig, SsfConfig, SubLayers};
    use crate::{FrozenViT, PetlConfig, PetlModel};
    use tch::Device;

    fn bypass(bottleneck_dim: i64, sub_layers: SubLayers) -> Method {
        Method::ConvBypass(ConvBypassConfig { bottleneck_dim, sub_layers, ..Default::default() })
    }

    #[test]
    fn the_published_counts() {
        let count = |preset, h, sub_layers| {
            audit(&ViTConfig::preset(preset).unwrap(), &bypass(h, sub_layers)).unwrap().params
        };
        assert_eq!(count("vit_base_patch16_224", 8, SubLayers::Both), 327_552);
        assert_eq!(count("vit_base_patch16_224", 8, SubLayers::Attention), 163_776);
        assert_eq!(count("vit_base_patch16_224", 16, SubLayers::Both), 664_320);
        assert_eq!(count("vit_large_patch16_224", 8, SubLayers::Both), 864_000);
        let full = audit(&ViTConfig::default(), &Method::Full).unwrap();
        assert_eq!(full.params, 85_798_656);
    }

    #[test]
    fn closed_form_equals_the_built_model() {
        let small = |name: &str| ViTConfig {
            image_size: (28, 56),
            patch_size: 14,
            embed_dim: 16,
            depth: 3,
            num_heads: 2,
            mlp_dim: 20,
            projection: None,
            ..ViTConfig::preset(name).unwrap()
        };
        for name in ViTConfig::presets() {
            let vit = small(name);
            let backbone = FrozenViT::random(&vit, 0, Device::Cpu).unwrap();
            let methods = [
                Method::LinearProbe,
                Method::Full,
                Method::BitFit,
                Method::LayerNorm,
                Method::Ssf(SsfConfig::default()),
                Method::Lora(LoraConfig::default()),
                bypass(3, SubLayers::Both),
                bypass(5, SubLayers::Mlp),
            ];
            for method in methods {
                let row = audit(&vit, &method).unwrap();
                let model = PetlModel::new(backbone.clone(), &PetlConfig::new(method, 7)).unwrap();
                let built = model.trainable_params();
                let found = (built.method, built.head, built.backbone());
                assert_eq!(found, (row.params as usize, 7 * 17, row.backbone as usize), "{name}");
            }
        }
    }
}
