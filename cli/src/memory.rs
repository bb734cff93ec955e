//! An estimate of the memory of a pass, so that a run that cannot fit is refused before it starts.

use anyhow::{Result, bail};
use convpass::{AnyBackbone, Backbone};
use tch::Device;

/// Bytes of the activations of one block for each element of its tokens in f32: queries, keys and
/// values, the wide layer of the MLP, and the residual stream.
const BLOCK_BYTES: f64 = 4.0 * 12.0;
/// Bytes that a training step keeps of each block for each element of its tokens. Measured on
/// ViT-B/16: 61 MB an image.
const KEPT_BYTES: f64 = 4.0 * 8.0;
/// Bytes for each value of an image: the pixel in f32, normalized.
const IMAGE_BYTES: f64 = 8.0;

/// A pass of a model over a batch.
pub struct PassSize {
    /// Images in a batch.
    pub batch: usize,
    /// Height and width of the images in pixels.
    pub image_size: (i64, i64),
    /// Whether every block is kept for a backward pass.
    pub keeps_blocks: bool,
}

impl PassSize {
    /// Checks that the pass fits in the memory that the system has free.
    ///
    /// The estimate is a lower bound. Nothing is checked on a GPU, or if the system does not report
    /// its memory.
    pub fn check(&self, backbone: &AnyBackbone) -> Result<()> {
        let (needed, Some(free)) = (self.bytes(backbone), free_memory()) else { return Ok(()) };
        if backbone.device() != Device::Cpu || needed <= free {
            return Ok(());
        }
        let (rows, columns) = self.image_size;
        bail!(
            "a batch of {} images of {rows} x {columns} pixels needs at least {:.1} GB, and {:.1} \
             GB of memory are free; choose a smaller --batch-size or --image-size{}",
            self.batch,
            needed / 1e9,
            free / 1e9,
            if self.keeps_blocks { ", or --micro-batch-size or --recompute" } else { "" }
        )
    }

    /// Returns the estimate in bytes.
    fn bytes(&self, backbone: &AnyBackbone) -> f64 {
        let pixels = self.image_size.0 as f64 * self.image_size.1 as f64;
        let elements = patch_embedding(backbone)
            .map_or(0.0, |(dim, patch)| pixels / (patch * patch) as f64 * dim as f64);
        let blocks = if self.keeps_blocks { backbone.shape().block_dims.len() } else { 0 };
        let per_image = 3.0 * pixels * IMAGE_BYTES
            + elements * (BLOCK_BYTES + KEPT_BYTES * blocks as f64 * later_blocks(backbone));
        self.batch as f64 * per_image
    }
}

/// Returns the channels and the patch size of the patch embedding, which is the weight of shape
/// `[C, 3, p, p]`.
fn patch_embedding(backbone: &AnyBackbone) -> Option<(i64, i64)> {
    backbone.named_weights().iter().find_map(|(_, weight)| match weight.size()[..] {
        [dim, 3, rows, columns] if rows == columns => Some((dim, rows)),
        _ => None,
    })
}

/// Returns the size of the tokens of a block relative to the first one, at most: in a hierarchical
/// backbone each stage has a quarter of the tokens with twice the channels.
fn later_blocks(backbone: &AnyBackbone) -> f64 {
    let dims = backbone.shape().block_dims;
    if dims.windows(2).all(|pair| pair[0] == pair[1]) { 1.0 } else { 0.125 }
}

/// Returns the number of bytes that new processes can use, if the system reports it (Linux).
fn free_memory() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0)
}
