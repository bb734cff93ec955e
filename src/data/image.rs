//! One image file to RGB u8.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use ::image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use ndarray::Array3;

use crate::error::{Error, Result};

/// No decoded image is larger than this, in bytes; with 3 bytes a pixel it is 179 megapixels.
const MAX_DECODED_BYTES: u64 = 512 << 20;
/// The file itself is read into memory first; real photos stay far below this.
const MAX_FILE_BYTES: u64 = 512 << 20;
/// Deflate expands at most 1032 times and a 1-bit image has 8 pixels a byte.
const MAX_PNG_PIXELS_PER_BYTE: u64 = 8 * 1032;
/// A JPEG spends at least one bit on the 64 pixels of a block.
const MAX_JPEG_PIXELS_PER_BYTE: u64 = 8 * 64;

/// Decodes a JPEG or PNG file of any colour type and bit depth to RGB u8, `[H, W, 3]`.
///
/// The format is recognized by content, never by extension. Grey is repeated over the three
/// channels; alpha is dropped, not blended (what Pillow's `convert("RGB")` does); of 16-bit samples
/// the high byte is kept; an EXIF orientation is not applied. An image whose header claims more
/// pixels than a file of that size can hold is refused before anything is allocated for it.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Image`] if it cannot be decoded to its end.
pub fn decode_image(path: impl AsRef<Path>) -> Result<Array3<u8>> {
    let path = path.as_ref();
    decode(&read_file(path)?).map_err(|reason| Error::Image {
        path: path.to_path_buf(),
        reason,
        list: None,
    })
}

fn read_file(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let size = file.metadata().map_err(Error::io(path))?.len();
    let mut bytes = Vec::with_capacity(size.min(MAX_FILE_BYTES) as usize);
    // Bounded, because what is behind a path need not be a regular file.
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(Error::io(path))?;
    Ok(bytes)
}

/// Decodes the content of a file; the error is the reason alone.
pub(super) fn decode(bytes: &[u8]) -> Result<Array3<u8>, String> {
    let format = match ::image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Jpeg | ImageFormat::Png)) => format,
        _ if bytes.is_empty() => return Err("the file is empty".into()),
        _ => return Err("neither JPEG nor PNG".into()),
    };
    // The JPEG decoder fills what is missing with grey; a cut file must be an error.
    if format == ImageFormat::Jpeg && !has_end_marker(bytes) {
        return Err("truncated: the JPEG has no end-of-image marker".into());
    }
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(|e| e.to_string())?;
    let (width, height) = decoder.dimensions();
    check_size(width, height, decoder.total_bytes(), bytes.len() as u64, format)?;
    let rgb = into_rgb8(DynamicImage::from_decoder(decoder).map_err(|e| e.to_string())?);
    Array3::from_shape_vec((height as usize, width as usize, 3), rgb).map_err(|e| e.to_string())
}

/// Refuses an image that its file cannot hold, or that is larger than any photo.
fn check_size(
    width: u32,
    height: u32,
    decoded: u64,
    file: u64,
    format: ImageFormat,
) -> Result<(), String> {
    if width == 0 || height == 0 {
        return Err(format!("the image is {width}x{height}"));
    }
    let pixels = u64::from(width) * u64::from(height);
    let per_byte = match format {
        ImageFormat::Png => MAX_PNG_PIXELS_PER_BYTE,
        _ => MAX_JPEG_PIXELS_PER_BYTE,
    };
    if pixels > file.saturating_mul(per_byte) {
        return Err(format!("claims {width}x{height} pixels, which {file} bytes cannot hold"));
    }
    if decoded.max(pixels.saturating_mul(3)) > MAX_DECODED_BYTES {
        return Err(format!("{width}x{height} pixels are more than are decoded here"));
    }
    Ok(())
}

/// Whether a JPEG goes on to its end-of-image marker. Segments (which may hold a thumbnail with an
/// end marker of its own) are stepped over; in entropy-coded data `FF` is followed by `00` or a
/// restart marker.
fn has_end_marker(bytes: &[u8]) -> bool {
    let mut at = 0;
    while let Some(&[first, marker]) = bytes.get(at..at + 2) {
        at += match (first, marker) {
            (0xFF, 0xD9) => return true,
            (0xFF, 0x00 | 0x01 | 0xD0..=0xD8) => 2,
            (0xFF, 0xFF) => 1,
            (0xFF, _) => match bytes.get(at + 2..at + 4) {
                Some(&[high, low]) => 2 + usize::from(u16::from_be_bytes([high, low])),
                _ => return false,
            },
            _ => 1,
        };
    }
    false
}

/// RGB u8 samples, row by row.
fn into_rgb8(image: DynamicImage) -> Vec<u8> {
    let high_byte = |sample: u16| (sample >> 8) as u8;
    match image {
        DynamicImage::ImageRgb8(i) => i.into_raw(),
        DynamicImage::ImageLuma8(i) => to_rgb(i.as_raw(), 1, |s| s),
        DynamicImage::ImageLumaA8(i) => to_rgb(i.as_raw(), 2, |s| s),
        DynamicImage::ImageRgba8(i) => to_rgb(i.as_raw(), 4, |s| s),
        DynamicImage::ImageLuma16(i) => to_rgb(i.as_raw(), 1, high_byte),
        DynamicImage::ImageLumaA16(i) => to_rgb(i.as_raw(), 2, high_byte),
        DynamicImage::ImageRgb16(i) => to_rgb(i.as_raw(), 3, high_byte),
        DynamicImage::ImageRgba16(i) => to_rgb(i.as_raw(), 4, high_byte),
        // Floating-point images come from neither JPEG nor PNG.
        other => other.into_rgb8().into_raw(),
    }
}

fn to_rgb<T: Copy>(samples: &[T], channels: usize, to_u8: impl Fn(T) -> u8) -> Vec<u8> {
    let mut rgb = Vec::with_capacity(samples.len() / channels * 3);
    for pixel in samples.chunks_exact(channels) {
        match *pixel {
            [r, g, b, ..] => rgb.extend([to_u8(r), to_u8(g), to_u8(b)]),
            [grey, ..] => rgb.extend([to_u8(grey); 3]),
            [] => {}
        }
    }
    rgb
}
