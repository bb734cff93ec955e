//! The layers of a ViT that a method can act on, and the names of their weights.

use super::{Pooling, ViTConfig};
use crate::backbone::{BackboneConfig, Network};
use crate::error::Result;
use crate::seam::{BackboneShape, Layer, LayerShape};

impl BackboneConfig for ViTConfig {
    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn shape(&self) -> Result<BackboneShape> {
        self.validate()?;
        let (c, hidden) = (self.embed_dim, self.mlp_dim);
        let halves = self.activation.halves();
        let shape = |layer, inputs, outputs, bias| LayerShape { layer, inputs, outputs, bias };
        let norm = |layer| shape(layer, c, c, self.norm_bias);
        let patch = 3 * self.patch_size * self.patch_size;
        let mut layers = vec![shape(Layer::PatchEmbed, patch, c, self.patch_bias)];
        layers.extend(self.pre_norm.then(|| norm(Layer::PreNorm)));
        for block in 0..self.depth as usize {
            let mut block = [
                norm(Layer::Norm1(block)),
                shape(Layer::Qkv(block), c, 3 * c, self.qkv_bias),
                shape(Layer::Proj(block), c, c, self.proj_bias),
                norm(Layer::Norm2(block)),
                shape(Layer::Fc1(block), c, halves * hidden, self.proj_bias),
                shape(Layer::Fc2(block), hidden, c, self.proj_bias),
            ];
            self.norm_placement.order(&mut block);
            layers.extend(block);
        }
        layers.extend(self.final_norm.then(|| norm(Layer::FinalNorm)));
        let block_dims = vec![c; self.depth as usize];
        let num_params = self.num_params();
        let mut num_feature_params = num_params - c * self.projection.unwrap_or(0);
        // The norms within sub-layers and after the patch convolution, and the layers of attention
        // pooling, are not listed.
        let inner = c * i64::from(self.attention_norm) + hidden * i64::from(self.mlp_norm);
        let unlisted = self.depth * inner + c * i64::from(self.patch_norm);
        let mut other_biases = unlisted * i64::from(self.norm_bias);
        let mut other_norms = unlisted + other_biases;
        match &self.attention_pool {
            Some(pool) if self.pooling == Pooling::Attention => {
                other_biases += pool.num_biases(c, self.qkv_bias);
                other_norms += if pool.is_bare() { 0 } else { 2 * c };
            }
            Some(pool) => num_feature_params -= pool.num_params(c, self.qkv_bias),
            None => {}
        }
        Ok(BackboneShape {
            family: Self::FAMILY,
            lacks: &[],
            block_dims,
            layers,
            other_biases,
            other_norms,
            num_params,
            num_feature_params,
        })
    }
}

impl ViTConfig {
    /// Returns the name before `.weight` and `.bias` of a layer that the shape lists.
    pub(super) fn name_of(&self, layer: Layer) -> String {
        match layer {
            Layer::PatchEmbed => "patch_embed.proj".to_owned(),
            Layer::PreNorm => "norm_pre".to_owned(),
            Layer::Norm1(i) => format!("blocks.{i}.norm1"),
            Layer::Qkv(i) | Layer::Q(i) | Layer::Kv(i) => format!("blocks.{i}.attn.qkv"),
            Layer::Proj(i) => format!("blocks.{i}.attn.proj"),
            Layer::Norm2(i) => format!("blocks.{i}.norm2"),
            Layer::Fc1(i) => format!("blocks.{i}.mlp.fc1"),
            Layer::Fc2(i) => format!("blocks.{i}.mlp.fc2"),
            Layer::FinalNorm if self.pooling == Pooling::AverageThenNorm => "fc_norm".to_owned(),
            _ => "norm".to_owned(),
        }
    }
}
