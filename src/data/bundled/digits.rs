//! The handwritten digits in `assets/`: an image of 8x8 tiles and a text file of labels.

use ndarray::{Array3, s};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::data::image::decode_bytes;
use crate::error::{Error, Result};

const SHEET: &[u8] = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/digits.png"));
const LABELS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/digits.txt"));
const COLUMNS: usize = 42;
const SIDE: usize = 8;

/// Returns every digit, `[8, 8, 3]`, with its label. They are shuffled with the seed, because the
/// source sorts them by writer.
pub(super) fn all(seed: i64) -> Result<Vec<(Array3<u8>, i64)>> {
    let sheet =
        decode_bytes(SHEET).map_err(|reason| Error::corrupt("assets/digits.png", reason))?;
    let mut digits = Vec::new();
    for (i, label) in LABELS.trim_end().chars().enumerate() {
        let label = label
            .to_digit(10)
            .ok_or_else(|| Error::corrupt("assets/digits.txt", format!("bad label {label:?}")))?;
        let (y, x) = (i / COLUMNS * SIDE, i % COLUMNS * SIDE);
        if y + SIDE > sheet.dim().0 || x + SIDE > sheet.dim().1 {
            return Err(Error::corrupt("assets/digits.png", "it has fewer tiles than labels"));
        }
        let tile = sheet.slice(s![y..y + SIDE, x..x + SIDE, ..]).to_owned();
        digits.push((tile, i64::from(label)));
    }
    digits.shuffle(&mut ChaCha8Rng::seed_from_u64(seed as u64));
    Ok(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sheet_holds_what_the_source_says() {
        let digits = all(0).unwrap();
        assert_eq!(digits.len(), 1797);
        let mut counts = [0; 10];
        digits.iter().for_each(|(_, label)| counts[*label as usize] += 1);
        assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
        assert!(digits.iter().all(|(image, _)| image.iter().any(|&v| v > 127)));
    }
}
