//! The graph of attention pooling. It is read beside `nn/attention_pool.rs`.

use super::graph::GraphValue;
use super::vit::ViTGraph;
use crate::backbone::MlpActivation;
use crate::error::Result;

impl ViTGraph {
    /// Computes `[B, T, C] -> [B, C]`: attention of the learned query to the tokens, then an MLP
    /// with a residual connection.
    pub(super) fn attention_pool(&mut self, tokens: &GraphValue, heads: i64) -> Result<GraphValue> {
        let c = self.settings.embed_dim;
        self.graph.enter("attn_pool");
        let latent = self.constant("attn_pool.latent")?;
        // [1, 1, C], which is the same for each image of the batch.
        let layer = (&mut self.weights, "attn_pool.qkv");
        let q = self.graph.linear_rows(&latent, layer, (0, c), "q")?;
        let layer = (&mut self.weights, "attn_pool.qkv");
        let kv = self.graph.linear_rows(tokens, layer, (c, 2 * c), "kv")?;
        let parts = self.graph.split(&kv, -1, &[c, c]);
        let [q, k, v] = [&q, &parts[0], &parts[1]].map(|part| self.heads(part, heads));
        let mixed = self.softmax_attention([&q, &k, &v], heads);
        let x = self.linear(&mixed, "attn_pool.proj")?;
        let normed = self.norm(&x, "attn_pool.norm")?;
        let activation = match self.settings.activation {
            // The pooling beside gated MLPs has a plain one.
            MlpActivation::SwiGlu => MlpActivation::Gelu,
            activation => activation,
        };
        let output = self.mlp(&normed, "attn_pool.mlp", activation)?;
        let x = self.graph.add(&x, &output);
        Ok(self.graph.token(&x, 0))
    }
}
