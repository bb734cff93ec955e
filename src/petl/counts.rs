//! Compares numbers of weights from formulas with those that the methods declare.

use super::*;
use crate::backbone::{BackboneConfig, SwinConfig, ViTConfig};
use crate::seam::{BackboneShape, Layer};

/// Returns the shapes of a ViT and of a Swin whose blocks have several widths.
fn shapes() -> Vec<BackboneShape> {
    let vit =
        ViTConfig { embed_dim: 24, depth: 3, num_heads: 2, mlp_dim: 48, ..Default::default() };
    let swin = SwinConfig { embed_dim: 12, depths: vec![1, 2], ..Default::default() };
    let swin = SwinConfig { num_heads: vec![2, 4], window_sizes: vec![(4, 4); 2], ..swin };
    swin.validate().unwrap();
    vec![vit.shape().unwrap(), swin.shape().unwrap()]
}

/// Sums `count` of the embedding dim and the bottleneck dim over the blocks that have a bottleneck.
fn sum(shape: &BackboneShape, widths: &[i64], count: impl Fn(i64, i64) -> i64) -> i64 {
    let blocks = shape.block_dims.iter().zip(widths).filter(|(_, h)| **h > 0);
    blocks.map(|(&c, &h)| count(c, h)).sum()
}

fn assert_declares(method: Method, formula: impl Fn(&BackboneShape) -> i64) {
    for shape in shapes() {
        let found = method.num_params(&shape).unwrap();
        assert_eq!(found, formula(&shape), "{method:?} on {}", shape.family);
        let low_bit = LowBitConfig { bits: 8, method: Box::new(method.clone()) };
        if low_bit.validate().is_ok() {
            assert_eq!(Method::LowBit(low_bit).num_params(&shape).unwrap(), found);
        }
        let bytes = method.stored_bytes(&shape, i64::MAX).unwrap();
        assert_eq!(bytes, Some(4 * found), "{method:?} on {}", shape.family);
    }
}

/// The same width in every block, and a list in which one block has none.
const WIDTHS: [[i64; 3]; 2] = [[8; 3], [4, 0, 6]];

fn blocks(widths: [i64; 3]) -> Option<Vec<i64>> {
    Some(widths.to_vec()).filter(|widths| widths.contains(&0))
}

#[test]
fn bypasses() {
    for widths in WIDTHS {
        for channel_scale in [false, true] {
            let config =
                ConvBypassVariant { channel_scale, blocks: blocks(widths), ..Default::default() };
            assert_declares(Method::ConvBypassVariant(config), |shape| {
                let one = |c, h| (2 * h + 1) * c + 9 * h * h + 2 * h;
                let scales = |c| if channel_scale { c } else { 0 };
                sum(shape, &widths, |c, h| 2 * (one(c, h) + scales(c)))
            });
        }
    }
    let config =
        ConvBypassConfig { kernel_size: 5, sub_layers: SubLayers::Mlp, ..Default::default() };
    assert_declares(Method::ConvBypass(config.clone()), |shape| {
        shape.block_dims.iter().map(|&c| config.num_params(c)).sum()
    });
}

#[test]
fn bottlenecks() {
    for widths in WIDTHS {
        let blocks = || blocks(widths);
        let adapter = AdapterConfig { blocks: blocks(), ..Default::default() };
        let both =
            AdapterConfig { sub_layers: SubLayers::Both, channel_scale: true, ..adapter.clone() };
        assert_declares(Method::Adapter(adapter), |shape| {
            sum(shape, &widths, |c, h| 2 * h * c + h + c)
        });
        assert_declares(Method::Adapter(both), |shape| {
            sum(shape, &widths, |c, h| 2 * (2 * h * c + h + 2 * c))
        });
        let former = AdaptFormerConfig { blocks: blocks(), ..Default::default() };
        assert_declares(Method::AdaptFormer(former), |shape| {
            sum(shape, &widths, |c, h| 2 * h * c + h + c)
        });
        let rep = RepAdapterConfig { blocks: blocks(), ..Default::default() };
        assert_declares(Method::RepAdapter(rep), |shape| {
            sum(shape, &widths, |c, h| 2 * (h * c + h + c * h / 2 + c))
        });
    }
}

#[test]
fn low_rank_products() {
    for widths in WIDTHS {
        let config = LoraConfig { blocks: blocks(widths), ..Default::default() };
        assert_declares(Method::Lora(config), |shape| sum(shape, &widths, |c, r| 4 * r * c));
    }
    let (vit, r) = (&shapes()[0], 3);
    let count = |form| Method::Fact(FactConfig { rank: r, form, ..Default::default() });
    // Slots of width C in 3 blocks: 4 of attention and 2 of each layer of the MLP.
    let slots = 3 * (4 + 2 + 2);
    let train = count(FactForm::TensorTrain).num_params(vit).unwrap();
    assert_eq!(train, 2 * r * 24 + slots * r * r);
    let tucker = count(FactForm::Tucker).num_params(vit).unwrap();
    assert_eq!(tucker, 2 * r * 24 + slots * r + r * r * r);
}

#[test]
fn factors_prompts_and_parts_of_the_backbone() {
    assert_declares(Method::Ssf(SsfConfig::default()), |shape| {
        let layers = shape.layers.iter().filter(|l| !matches!(l.layer, Layer::Merge(_)));
        layers.map(|layer| 2 * layer.outputs).sum()
    });
    let vit = &shapes()[0];
    let prompts = |config| Method::Vpt(config).num_params(vit).unwrap();
    assert_eq!(prompts(VptConfig::default()), 3 * 5 * 24);
    assert_eq!(prompts(VptConfig { deep: false, ..Default::default() }), 5 * 24);
    assert_eq!(prompts(VptConfig { blocks: Some(vec![2, 0, 3]), ..Default::default() }), 5 * 24);

    assert_declares(Method::LinearProbe, |_| 0);
    assert_declares(Method::Full, |shape| shape.num_feature_params);
    let both = Method::Compose { methods: vec![Method::BitFit, Method::Lora(Default::default())] };
    assert_declares(both, |shape| {
        let biases = shape.layers.iter().filter(|layer| layer.bias).map(|layer| layer.outputs);
        biases.sum::<i64>() + sum(shape, &[8; 3], |c, r| 4 * r * c)
    });
}
