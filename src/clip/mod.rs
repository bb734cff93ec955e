//! Zero-shot classification with CLIP.
//!
//! [`Templates`] turn class names into sentences, the tokenizer turns sentences into token ids, and
//! [`ZeroShot`] turns token ids into the weights of a classifier.

mod prompts;
#[cfg(feature = "clip")]
mod tokenizer;
mod zero_shot;

pub use prompts::{Templates, read_class_names};
#[cfg(feature = "clip")]
pub use tokenizer::ClipTokenizer;
pub use zero_shot::ZeroShot;
