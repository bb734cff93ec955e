//! The graph of the layers of a bypass. It is read beside `petl/conv_bypass.rs` and
//! `petl/up_projection.rs`.

use super::graph::{Graph, GraphValue, WeightSet};
use crate::error::Result;
use crate::seam::TokenLayout;

impl Graph {
    /// Runs the kxk convolution `name`, `[B, P + N, h] -> [B, P + N, h]`: on the grid for patches,
    /// with the centre tap alone for prefix tokens.
    pub(super) fn convolved(
        &mut self,
        x: &GraphValue,
        source: &mut WeightSet,
        name: &str,
        layout: &TokenLayout,
    ) -> Result<GraphValue> {
        let weight = source.get(&format!("{name}.weight"))?;
        let bias = source.get(&format!("{name}.bias"))?;
        let (h, side) = (weight.size()[0], weight.size()[2]);
        let (prefix, patches, (rows, cols)) = (layout.prefix, layout.num_patches(), layout.grid);
        let parts = match (prefix, patches) {
            (0, _) | (_, 0) => vec![x.clone()],
            sizes => self.split(x, 1, &[sizes.0, sizes.1]),
        };
        let mut outputs = Vec::new();
        if prefix > 0 {
            let centre = weight.f_select(3, side / 2)?.f_select(2, side / 2)?;
            let bias = bias.shallow_clone();
            outputs.push(self.product(
                &parts[0],
                &format!("{name}.centre"),
                &centre,
                Some(bias),
            )?);
        }
        if let Some(tokens) = parts.last().filter(|_| patches > 0) {
            let weight = self.constant(format!("{name}.weight"), weight);
            let bias = self.constant(format!("{name}.bias"), bias);
            // [B, N, h] -> [B, h, N] -> [B, h, rows, cols]
            let grid = self.transpose(tokens, &[0, 2, 1]);
            let grid = self.reshape(&grid, &[0, h, rows, cols]);
            let grid = self.conv(&grid, (&weight, Some(&bias)), [side, 1, side / 2]);
            let flat = self.reshape(&grid, &[0, h, patches]);
            outputs.push(self.transpose(&flat, &[0, 2, 1]));
        }
        Ok(self.concat(&outputs.iter().collect::<Vec<_>>(), 1))
    }

    /// Runs the projection `s * (hidden W^T + b)` of the layer `name` below `path`,
    /// `[.., h] -> [.., C]`. s is the trained factor of each channel if there is one, and `scale`
    /// otherwise; it is folded into W and b.
    pub(super) fn up(
        &mut self,
        hidden: &GraphValue,
        source: &mut WeightSet,
        path: &str,
        name: &str,
        scale: f64,
    ) -> Result<GraphValue> {
        let weight = source.get(&format!("{path}.{name}.weight"))?;
        let bias = source.get(&format!("{path}.{name}.bias"))?;
        let (weight, bias) = match source.find(&format!("{path}.scale"))? {
            Some(scale) => (weight.f_mul(&scale.f_unsqueeze(1)?)?, bias.f_mul(&scale)?),
            None => (weight.f_mul_scalar(scale)?, bias.f_mul_scalar(scale)?),
        };
        self.product(hidden, &format!("{path}.{name}"), &weight, Some(bias))
    }
}
