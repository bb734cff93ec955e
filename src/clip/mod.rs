//! Zero-shot classification with CLIP: class names to texts, texts to token ids, ids to weights.

mod prompts;
#[cfg(feature = "clip")]
mod tokenizer;
mod zero_shot;

pub use prompts::{Templates, read_class_names};
#[cfg(feature = "clip")]
pub use tokenizer::ClipTokenizer;
pub use zero_shot::ZeroShot;
