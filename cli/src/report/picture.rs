//! Small pictures as text: thumbnails and heat maps in base64.

use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::imageops;
use image::{ExtendedColorType, ImageEncoder, RgbImage, RgbaImage};
use ndarray::ArrayView3;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The longest base64 that a picture of a file may have.
const MAX_TEXT: usize = 1 << 20;

/// A picture, base64 of a JPEG.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Thumbnail(String);

impl Thumbnail {
    /// Of pixels `[H, W, 3]`, RGB, at most `side` on a side.
    ///
    /// # Errors
    /// [`Error::Input`] for pixels of another shape.
    pub(super) fn new(pixels: ArrayView3<u8>, side: u32) -> Result<Self> {
        let (rows, cols, channels) = pixels.dim();
        let wrong = || Error::Input {
            argument: "pixels",
            expected: "[H, W, 3]".to_owned(),
            found: format!("{:?}", [rows, cols, channels]),
        };
        let bytes: Vec<u8> = pixels.iter().copied().collect();
        let image = RgbImage::from_raw(cols as u32, rows as u32, bytes);
        let image =
            image.filter(|image| image.width() > 0 && image.height() > 0).ok_or_else(wrong)?;
        let longest = image.width().max(image.height());
        let image = if longest > side {
            let scaled = |length: u32| (length * side / longest).max(1);
            let (width, height) = (scaled(image.width()), scaled(image.height()));
            imageops::resize(&image, width, height, imageops::FilterType::Triangle)
        } else {
            image
        };
        let mut jpeg = Vec::new();
        JpegEncoder::new_with_quality(&mut jpeg, 78)
            .write_image(&image, image.width(), image.height(), ExtendedColorType::Rgb8)
            .map_err(|e| Error::Chart { reason: e.to_string() })?;
        Ok(Thumbnail(STANDARD.encode(jpeg)))
    }

    /// Returns the picture as a data URI.
    pub(super) fn uri(&self) -> String {
        format!("data:image/jpeg;base64,{}", self.0)
    }
}

impl TryFrom<String> for Thumbnail {
    type Error = String;

    /// Of a file: anything but base64 might be the address of something else.
    fn try_from(text: String) -> Result<Self, String> {
        let base64 = |c: u8| c.is_ascii_alphanumeric() || b"+/=".contains(&c);
        if text.len() <= MAX_TEXT && text.bytes().all(base64) {
            Ok(Thumbnail(text))
        } else {
            Err("a picture that is no base64".to_owned())
        }
    }
}

impl From<Thumbnail> for String {
    fn from(picture: Thumbnail) -> String {
        picture.0
    }
}

/// How a cell of a heat map is coloured: how opaque, from 0 to 1, and whether in the second colour.
/// What lies beneath is the page's ground, light or dark.
pub(super) type Shade = (f64, bool);

// Both are seen on white and on black.
const FIRST: [u8; 3] = [30, 120, 200];
const SECOND: [u8; 3] = [222, 108, 24];

/// Returns a heat map of `rows` x `cols` cells as a data URI of a PNG, each cell a square of
/// whole pixels, so that no viewer blurs it.
///
/// # Errors
/// [`Error::Chart`] if it cannot be encoded.
pub(super) fn heat_map(
    (rows, cols): (usize, usize),
    shade: impl Fn(usize, usize) -> Shade,
) -> Result<String> {
    let side = (128 / rows.max(cols).max(1)).clamp(1, 16);
    let pixel = |x: u32, y: u32| {
        let (opaque, second) = shade(y as usize / side, x as usize / side);
        let [r, g, b] = if second { SECOND } else { FIRST };
        image::Rgba([r, g, b, (opaque.clamp(0.0, 1.0) * 255.0).round() as u8])
    };
    let image = RgbaImage::from_fn((cols * side) as u32, (rows * side) as u32, pixel);
    let mut png = Cursor::new(Vec::new());
    PngEncoder::new_with_quality(&mut png, CompressionType::Best, FilterType::NoFilter)
        .write_image(&image, image.width(), image.height(), ExtendedColorType::Rgba8)
        .map_err(|e| Error::Chart { reason: e.to_string() })?;
    Ok(format!("data:image/png;base64,{}", STANDARD.encode(png.into_inner())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array3;

    fn decoded(uri: &str) -> image::DynamicImage {
        let (_, text) = uri.split_once(',').unwrap();
        image::load_from_memory(&STANDARD.decode(text).unwrap()).unwrap()
    }

    #[test]
    fn thumbnails_keep_shape_and_colour() {
        let pixels = Array3::from_shape_fn((60, 120, 3), |(.., c)| [200, 100, 50][c]);
        let image = decoded(&Thumbnail::new(pixels.view(), 48).unwrap().uri()).to_rgb8();
        assert_eq!(image.dimensions(), (48, 24));
        let [r, g, b] = image.get_pixel(20, 10).0.map(i32::from);
        assert!((r - 200).abs() < 4 && (g - 100).abs() < 4 && (b - 50).abs() < 4);
        assert!(Thumbnail::new(Array3::zeros((0, 4, 3)).view(), 48).is_err());
        assert!(Thumbnail::new(Array3::zeros((4, 4, 1)).view(), 48).is_err());
    }

    #[test]
    fn a_picture_of_a_file_is_base64() {
        assert!(Thumbnail::try_from("https://example.org/x.png".to_owned()).is_err());
        assert!(Thumbnail::try_from("AAAA".to_owned()).is_ok());
    }

    #[test]
    fn cells_are_whole_squares_of_their_shade() {
        let uri = heat_map((3, 2), |row, col| (0.5 * row as f64, col == 1)).unwrap();
        let image = decoded(&uri).to_rgba8();
        assert_eq!(image.dimensions(), (32, 48));
        assert_eq!(image.get_pixel(15, 15).0[3], 0);
        assert_eq!(image.get_pixel(16, 16).0, [222, 108, 24, 128]);
        assert_eq!(image.get_pixel(0, 47).0, [30, 120, 200, 255]);
        assert!(decoded(&heat_map((300, 300), |_, _| (f64::NAN, false)).unwrap()).width() == 300);
    }
}
