//! How much work a training step is, and how fast the machine multiplies.

use std::time::Instant;

use convpass::ViTConfig;
use tch::{Device, Kind, Tensor};

/// What a training step computes.
pub struct Work<'a> {
    pub vit: &'a ViTConfig,
    /// h, the bottleneck of the bypasses.
    pub bottleneck_dim: i64,
    /// The block of the first bypass.
    pub first: i64,
    /// Whether the blocks in front of it were computed before.
    pub prefix: bool,
    pub recompute: bool,
}

impl Work<'_> {
    /// Floating-point operations an image, in matrix products alone: two for a multiplication and a sum. Backward through frozen weights is one product where forward is one (no gradient
    /// of the weights), and reaches down to the first bypass.
    pub fn flop(&self) -> f64 {
        let vit = self.vit;
        let patches =
            (vit.image_size.0 / vit.patch_size) as f64 * (vit.image_size.1 / vit.patch_size) as f64;
        let (tokens, c) = (patches + 1.0, vit.embed_dim as f64);
        let embed = 2.0 * patches * 3.0 * (vit.patch_size * vit.patch_size) as f64 * c;
        let (first, depth) = (self.first.min(vit.depth - 1), vit.depth);
        let in_front =
            if self.prefix { 0.0 } else { embed + first as f64 * self.block(tokens, tokens) };
        let trained: f64 = (first..depth)
            .map(|block| {
                // The last block for the class token alone, but for its keys and values.
                let rows = if block == depth - 1 { 1.0 } else { tokens };
                let (frozen, bypass) = (self.block(tokens, rows), self.bypass(rows));
                let forward = frozen + bypass;
                // Nothing before the first bypass needs a gradient: of its block, attention does not.
                let back = if block == first { self.mlp(rows) } else { frozen };
                let again = if self.recompute { forward } else { 0.0 };
                forward + back + 2.0 * bypass + again
            })
            .sum();
        in_front + trained
    }

    /// Forward through a block whose residual stream is `rows` tokens.
    fn block(&self, tokens: f64, rows: f64) -> f64 {
        let c = self.vit.embed_dim as f64;
        let projections = 2.0 * c * (2.0 * c * tokens + 2.0 * c * rows);
        projections + 4.0 * tokens * rows * c + self.mlp(rows)
    }

    fn mlp(&self, rows: f64) -> f64 {
        4.0 * (self.vit.embed_dim * self.vit.mlp_dim) as f64 * rows
    }

    /// Forward through the two bypasses of a block.
    fn bypass(&self, rows: f64) -> f64 {
        let (c, h) = (self.vit.embed_dim as f64, self.bottleneck_dim as f64);
        2.0 * rows * (4.0 * c * h + 18.0 * h * h)
    }
}

/// Floating-point operations a second of the machine's matrix product, at the shape of the MLP of a ViT-B/16 on 8
/// images: the best of 8.
pub fn gemm_speed() -> f64 {
    let (rows, inner, columns) = (1576, 768, 3072);
    let random = |rows, columns| Tensor::rand([rows, columns], (Kind::Float, Device::Cpu));
    let (a, b) = (random(rows, inner), random(inner, columns));
    let product = || {
        let start = Instant::now();
        drop(a.matmul(&b));
        start.elapsed().as_secs_f64()
    };
    product();
    let fastest = (0..8).map(|_| product()).fold(f64::INFINITY, f64::min);
    2.0 * (rows * inner * columns) as f64 / fastest
}
