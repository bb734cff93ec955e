//! The width of a method in each block.

use super::petl_method::ActsFrom;
use crate::error::{Error, Result};

/// The largest width (bottleneck, rank, prompts). The limit keeps counts within `i64`.
const MAX_WIDTH: i64 = 1 << 12;

/// Checks `width` and, if given, `blocks`. It does not need a backbone.
pub(super) fn validate(field: &str, width: i64, blocks: &Option<Vec<i64>>) -> Result<()> {
    if !(1..=MAX_WIDTH).contains(&width) {
        return Err(Error::config(field, format!("within 1..={MAX_WIDTH}"), width));
    }
    match blocks.iter().flatten().find(|width| !(0..=MAX_WIDTH).contains(*width)) {
        Some(width) => Err(Error::config("blocks", format!("within 0..={MAX_WIDTH} each"), width)),
        None => Ok(()),
    }
}

/// Returns the width in each of `count` blocks: `blocks` if given, otherwise `width` everywhere.
pub(super) fn resolve(width: i64, blocks: &Option<Vec<i64>>, count: usize) -> Result<Vec<i64>> {
    match blocks {
        None => Ok(vec![width; count]),
        Some(blocks) if blocks.len() == count => Ok(blocks.clone()),
        Some(blocks) => {
            Err(Error::config("blocks", format!("{count} widths, one per block"), blocks.len()))
        }
    }
}

/// Returns the first block whose width is not zero.
pub(super) fn acts_from(width: i64, blocks: &Option<Vec<i64>>) -> ActsFrom {
    let first = match blocks {
        None => (width > 0).then_some(0),
        Some(blocks) => blocks.iter().position(|&width| width > 0),
    };
    first.map_or(ActsFrom::Head, ActsFrom::Block)
}
