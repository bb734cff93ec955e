//! Adapt frozen Vision Transformers with convolutional bypasses.

mod error;

pub use error::{Error, Result};
