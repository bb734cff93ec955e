//! Decodes one image file to RGB u8.

mod budget;
mod gif;
mod jpeg;

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use ::image::metadata::Orientation as Turn;
use ::image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};
use ndarray::Array3;

use self::budget::{Reservation, reserve};
use crate::contain::contain;
use crate::error::{Error, Result};
use crate::files::open_regular;
use crate::preprocessing::Orientation;

/// The largest accepted size of a decoded image in bytes: 179 megapixels at 3 bytes a pixel.
const MAX_DECODED_BYTES: u64 = 512 << 20;
/// The largest number of bytes that are read of a file, which is read into memory first. Real
/// photos are far smaller.
const MAX_FILE_BYTES: u64 = 512 << 20;
/// A file of more bytes is read and decoded while no other image is.
const LARGE_FILE_BYTES: u64 = 16 << 20;
/// The number of bytes at the start of a file that tell its format.
const SIGNATURE_BYTES: u64 = 64;
/// The names of the supported formats, for messages.
const FORMATS: &str = "JPEG, PNG, WebP, BMP, GIF and TIFF";

/// Decodes a JPEG, PNG, WebP, BMP, GIF or TIFF file of any colour type and bit depth to RGB u8,
/// `[H, W, 3]`, and turns it as its EXIF orientation says.
///
/// The same as [`decode_image_with`] and [`Orientation::Exif`].
///
/// # Errors
/// The errors of [`decode_image_with`].
pub fn decode_image(path: impl AsRef<Path>) -> Result<Array3<u8>> {
    decode_image_with(path, Orientation::Exif)
}

/// Decodes a JPEG, PNG, WebP, BMP, GIF or TIFF file of any colour type and bit depth to RGB u8,
/// `[H, W, 3]`.
///
/// The format is recognized by the content, not by the extension. Of an animation the first frame
/// is decoded. A grey value is repeated in the three channels. Alpha is dropped, not blended, as in
/// Pillow's `convert("RGB")`. A 16-bit sample is reduced to its high byte. `orientation` says
/// whether the EXIF orientation is applied. If the header claims more pixels than a file of that
/// size can contain, the image is rejected before its memory is allocated. All threads of the
/// process together decode images of at most 1 GiB at a time; a thread waits until there is room.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read; [`Error::NotAFile`] if it is a pipe or a device;
/// [`Error::Image`] if it cannot be decoded completely, also if the decoder panics on it.
pub fn decode_image_with(path: impl AsRef<Path>, orientation: Orientation) -> Result<Array3<u8>> {
    with_image(path.as_ref(), orientation, Ok)
}

/// Decodes the image at `path` and returns what `work` makes of it. The memory of the image counts
/// as taken until `work` ends.
pub(super) fn with_image<T>(
    path: &Path,
    orientation: Orientation,
    work: impl FnOnce(Array3<u8>) -> Result<T>,
) -> Result<T> {
    let mut file = open_regular(path)?;
    let size = file.metadata().map_err(Error::io(path))?.len();
    let whole = (size > LARGE_FILE_BYTES).then(|| reserve(budget::TOTAL));
    let bytes = read(&mut file, size).map_err(Error::io(path))?;
    let decoded = decode(&bytes, orientation, whole).map_err(|reason| Error::Image {
        path: path.to_path_buf(),
        reason,
        list: None,
    })?;
    drop(bytes);
    work(decoded.pixels)
}

fn read(file: &mut File, size: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(size.min(MAX_FILE_BYTES) as usize);
    // The file may grow while it is read.
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Checks that the first bytes of `path` are those of a supported format.
///
/// # Errors
/// [`Error::Image`] if they are not; else the errors of [`decode_image_with`].
pub(super) fn check_signature(path: &Path) -> Result<()> {
    signature(path, &mut open_regular(path)?).map(drop)
}

/// Checks without decoding the pixels that `path` is an image of a supported format whose headers
/// are valid. Of a JPEG the end-of-image marker is checked too.
///
/// # Errors
/// The errors of [`decode_image_with`].
pub(super) fn check_header(path: &Path) -> Result<()> {
    let mut file = open_regular(path)?;
    let size = file.metadata().map_err(Error::io(path))?.len();
    let format = signature(path, &mut file)?;
    file.seek(SeekFrom::Start(0)).map_err(Error::io(path))?;
    let checked = if format == ImageFormat::Jpeg {
        // The decoder reads a JPEG whole for its headers alone.
        let bytes = read(&mut file, size).map_err(Error::io(path))?;
        contain(|| {
            check_end(&bytes)?;
            open(Cursor::new(&bytes), size, format).map(drop)
        })
    } else {
        contain(|| open(BufReader::new(file), size, format).map(drop))
    };
    let path = path.to_path_buf();
    flat(checked).map_err(|reason| Error::Image { path, reason, list: None })
}

/// Returns the format that the first bytes of `file` are of.
fn signature(path: &Path, file: &mut File) -> Result<ImageFormat> {
    let mut start = Vec::new();
    file.take(SIGNATURE_BYTES).read_to_end(&mut start).map_err(Error::io(path))?;
    let image = |reason| Error::Image { path: path.to_path_buf(), reason, list: None };
    format_of(&start).map_err(image)
}

/// An image and the part of the shared memory that it takes.
#[derive(Debug)]
struct Decoded {
    pixels: Array3<u8>,
    _memory: Reservation,
}

/// Decodes the content of a file as its pixels are stored. The error is the reason.
#[cfg(feature = "bundled")]
pub(super) fn decode_bytes(bytes: &[u8]) -> Result<Array3<u8>, String> {
    decode(bytes, Orientation::Stored, None).map(|decoded| decoded.pixels)
}

/// Decodes the content of a file. `memory` is what is reserved for it already. The error is the
/// reason, without a path.
fn decode(
    bytes: &[u8],
    orientation: Orientation,
    memory: Option<Reservation>,
) -> Result<Decoded, String> {
    flat(contain(|| decode_or_panic(bytes, orientation, memory)))
}

/// Returns the message of a contained panic as an error like any other.
fn flat<T>(result: Result<Result<T, String>, String>) -> Result<T, String> {
    result.unwrap_or_else(|panic| Err(format!("the decoder failed on this file: {panic}")))
}

fn decode_or_panic(
    bytes: &[u8],
    orientation: Orientation,
    memory: Option<Reservation>,
) -> Result<Decoded, String> {
    let format = format_of(bytes)?;
    if format == ImageFormat::Jpeg {
        check_end(bytes)?;
        if let Some(components) = jpeg::uncommon(bytes) {
            // At most one reservation a thread: the whole budget is given back first.
            drop(memory);
            let (width, height, rgb, turn, memory) = jpeg::decode(bytes, &components)?;
            let pixels = turned(rgb, (width, height), orientation, turn)?;
            return Ok(Decoded { pixels, _memory: memory });
        }
    }
    if format == ImageFormat::Gif {
        let (width, height, rgb, memory) = gif::decode(bytes, memory)?;
        let pixels = turned(rgb, (width, height), orientation, Turn::NoTransforms)?;
        return Ok(Decoded { pixels, _memory: memory });
    }
    let mut decoder = open(Cursor::new(bytes), bytes.len() as u64, format)?;
    let (width, height) = decoder.dimensions();
    let rgb_bytes = u64::from(width) * u64::from(height) * 3;
    let needed = decoder.total_bytes().saturating_add(rgb_bytes + bytes.len() as u64);
    let memory = memory.unwrap_or_else(|| reserve(needed));
    // Metadata that cannot be read does not make the pixels wrong.
    let turn = decoder.orientation().unwrap_or(Turn::NoTransforms);
    let rgb = into_rgb8(DynamicImage::from_decoder(decoder).map_err(|e| e.to_string())?)?;
    Ok(Decoded { pixels: turned(rgb, (width, height), orientation, turn)?, _memory: memory })
}

/// Returns the format that the first bytes of a file are of.
fn format_of(bytes: &[u8]) -> Result<ImageFormat, String> {
    use ImageFormat::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
    // The boxes of AVIF and HEIC begin with their size, then `ftyp` and the brand.
    let brand = bytes.get(4..12).and_then(|text| text.strip_prefix(b"ftyp"));
    match (::image::guess_format(bytes), brand) {
        (_, Some(b"avif" | b"avis")) => {
            Err("AVIF is not supported; convert the image to PNG or JPEG".into())
        }
        (_, Some(b"heic" | b"heix" | b"hevc" | b"mif1" | b"msf1")) => {
            Err("HEIC is not supported; convert the image to PNG or JPEG".into())
        }
        (Ok(format @ (Jpeg | Png | WebP | Bmp | Gif | Tiff)), _) => Ok(format),
        _ if bytes.is_empty() => Err("the file is empty".into()),
        _ => Err(format!("not an image in one of the formats {FORMATS}")),
    }
}

/// Checks the end of a JPEG. The decoder fills the missing part of a truncated file with grey
/// instead of returning an error.
fn check_end(bytes: &[u8]) -> Result<(), String> {
    if jpeg::has_end_marker(bytes) {
        return Ok(());
    }
    Err("the file is truncated: the JPEG has no end-of-image marker".into())
}

/// Reads the headers of an image and checks its size. `file` is the size of the file in bytes.
fn open<'a>(
    reader: impl BufRead + Seek + 'a,
    file: u64,
    format: ImageFormat,
) -> Result<impl ImageDecoder + 'a, String> {
    let mut reader = ImageReader::with_format(reader, format);
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(|e| e.to_string())?;
    let (width, height) = decoder.dimensions();
    check_size(width, height, decoder.total_bytes(), file, format)?;
    Ok(decoder)
}

/// Returns the largest number of pixels for each byte of a file.
fn max_pixels_per_byte(format: ImageFormat) -> u64 {
    match format {
        // Deflate compresses at most by a factor of 1032, and a 1-bit image has 8 pixels a byte.
        ImageFormat::Png => 8 * 1032,
        // A block of 64 pixels takes at least one bit.
        ImageFormat::Jpeg => 8 * 64,
        // The longest string of the table has 4,096 pixels and takes at least one byte.
        ImageFormat::Gif => 4096,
        // Two bytes of a run stand for at most 255 pixels; a jump skips 255 rows.
        ImageFormat::Bmp => 1 << 16,
        // A row of a fax may take one bit.
        ImageFormat::Tiff => 1 << 16,
        // An image of one colour takes no bits for its pixels. Its sides have 14 bits.
        _ => u64::MAX,
    }
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
    if pixels > file.saturating_mul(max_pixels_per_byte(format)) {
        return Err(format!("{width}x{height} pixels do not fit in a file of {file} bytes"));
    }
    if decoded.max(pixels.saturating_mul(3)) > MAX_DECODED_BYTES {
        return Err(format!("{width}x{height} pixels exceed {MAX_DECODED_BYTES} decoded bytes"));
    }
    Ok(())
}

/// Returns RGB samples as `[H, W, 3]`, turned by `turn` if `orientation` says so.
fn turned(
    rgb: Vec<u8>,
    (width, height): (u32, u32),
    orientation: Orientation,
    turn: Turn,
) -> Result<Array3<u8>, String> {
    let image = RgbImage::from_raw(width, height, rgb).ok_or("the image has too few samples")?;
    let mut image = DynamicImage::ImageRgb8(image);
    if orientation == Orientation::Exif {
        image.apply_orientation(turn);
    }
    let image = image.into_rgb8();
    let shape = (image.height() as usize, image.width() as usize, 3);
    Array3::from_shape_vec(shape, image.into_raw()).map_err(|e| e.to_string())
}

/// Converts an image to RGB u8 samples, row by row.
fn into_rgb8(image: DynamicImage) -> Result<Vec<u8>, String> {
    let high_byte = |sample: u16| (sample >> 8) as u8;
    Ok(match image {
        DynamicImage::ImageRgb8(i) => i.into_raw(),
        DynamicImage::ImageLuma8(i) => to_rgb(i.as_raw(), 1, |s| s),
        DynamicImage::ImageLumaA8(i) => to_rgb(i.as_raw(), 2, |s| s),
        DynamicImage::ImageRgba8(i) => to_rgb(i.as_raw(), 4, |s| s),
        DynamicImage::ImageLuma16(i) => to_rgb(i.as_raw(), 1, high_byte),
        DynamicImage::ImageLumaA16(i) => to_rgb(i.as_raw(), 2, high_byte),
        DynamicImage::ImageRgb16(i) => to_rgb(i.as_raw(), 3, high_byte),
        DynamicImage::ImageRgba16(i) => to_rgb(i.as_raw(), 4, high_byte),
        other => {
            let color = other.color();
            return Err(format!(
                "samples of type {color:?} are not supported; convert the image to PNG or JPEG"
            ));
        }
    })
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
