//! Decodes one image file to RGB u8.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use ::image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use ndarray::Array3;

use crate::error::{Error, Result};

/// The largest accepted size of a decoded image in bytes: 179 megapixels at 3 bytes a pixel.
const MAX_DECODED_BYTES: u64 = 512 << 20;
/// The largest number of bytes that are read of a file, which is read into memory first. Real
/// photos are far smaller.
const MAX_FILE_BYTES: u64 = 512 << 20;
/// The largest number of pixels for each byte of a PNG file: deflate compresses at most by a factor
/// of 1032, and a 1-bit image has 8 pixels a byte.
const MAX_PNG_PIXELS_PER_BYTE: u64 = 8 * 1032;
/// The largest number of pixels for each byte of a JPEG file: a block of 64 pixels takes at least
/// one bit.
const MAX_JPEG_PIXELS_PER_BYTE: u64 = 8 * 64;

/// Decodes a JPEG or PNG file of any colour type and bit depth to RGB u8, `[H, W, 3]`.
///
/// The format is recognized by the content, not by the extension. A grey value is repeated in the
/// three channels. Alpha is dropped, not blended, as in Pillow's `convert("RGB")`. A 16-bit sample
/// is reduced to its high byte. An EXIF orientation is not applied. If the header claims more
/// pixels than a file of that size can contain, the image is rejected before its memory is
/// allocated.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Image`] if it cannot be decoded completely.
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
    // The read is bounded because the path may be that of a device or a pipe.
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(Error::io(path))?;
    Ok(bytes)
}

/// Decodes the content of a file. The error is the reason, without a path.
pub(super) fn decode(bytes: &[u8]) -> Result<Array3<u8>, String> {
    let format = match ::image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Jpeg | ImageFormat::Png)) => format,
        _ if bytes.is_empty() => return Err("the file is empty".into()),
        _ => return Err("neither JPEG nor PNG".into()),
    };
    // The JPEG decoder fills the missing part of a truncated file with grey instead of returning an
    // error.
    if format == ImageFormat::Jpeg && !has_end_marker(bytes) {
        return Err("the file is truncated: the JPEG has no end-of-image marker".into());
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

/// Checks that the image has pixels, that a file of this size can contain them, and that they do
/// not exceed [`MAX_DECODED_BYTES`].
fn check_size(
    width: u32,
    height: u32,
    decoded: u64,
    file: u64,
    format: ImageFormat,
) -> Result<(), String> {
    if width == 0 || height == 0 {
        return Err(format!("the image has no pixels: its size is {width}x{height}"));
    }
    let pixels = u64::from(width) * u64::from(height);
    let per_byte = match format {
        ImageFormat::Png => MAX_PNG_PIXELS_PER_BYTE,
        _ => MAX_JPEG_PIXELS_PER_BYTE,
    };
    if pixels > file.saturating_mul(per_byte) {
        return Err(format!("{width}x{height} pixels do not fit in a file of {file} bytes"));
    }
    if decoded.max(pixels.saturating_mul(3)) > MAX_DECODED_BYTES {
        return Err(format!("{width}x{height} pixels exceed {MAX_DECODED_BYTES} decoded bytes"));
    }
    Ok(())
}

/// Returns whether a JPEG has an end-of-image marker. Segments are skipped, because a thumbnail in
/// a segment has its own end marker. In entropy-coded data, `FF` is followed by `00` or by a
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

/// Converts an image to RGB u8 samples, row by row.
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
        // Neither JPEG nor PNG contains floating-point samples.
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
