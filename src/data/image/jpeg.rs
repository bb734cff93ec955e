//! JPEG files that are not in the common form.
//!
//! The crate `image` decodes JPEG files with zune-jpeg. It returns wrong pixels or panics for a
//! baseline image whose components are in separate scans, and for an image whose first component
//! does not have the highest resolution. The crate `jpeg-decoder` decodes both as Pillow does, so
//! these rare files go there. All others stay with zune-jpeg, whose pixels are nearer to Pillow's
//! for the common forms but 4:2:0, and which is faster.

use std::io::Cursor;

use ::image::metadata::Orientation as Turn;
use jpeg_decoder::{ColorTransform, Decoder, PixelFormat};

use super::budget::{Reservation, reserve};
use super::{MAX_DECODED_BYTES, check_size, to_rgb};

/// What the headers of a JPEG say about its components, up to the first scan.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Components {
    is_jfif: bool,
    /// Whether an Adobe segment says that the components are not transformed.
    is_plain_adobe: bool,
    is_progressive: bool,
    /// The horizontal and vertical sampling factor of each component.
    sampling: Vec<(u8, u8)>,
    /// The number of components in the first scan.
    in_first_scan: usize,
}

impl Components {
    /// Reads the headers. Returns `None` if they do not lead to a scan.
    fn read(bytes: &[u8]) -> Option<Self> {
        let mut components = Self::default();
        let mut at = 2;
        loop {
            let &[first, marker] = bytes.get(at..at + 2)? else { return None };
            match (first, marker) {
                (0xFF, 0xFF) => at += 1,
                (0xFF, 0x01 | 0xD0..=0xD8) => at += 2,
                (0xFF, _) => {
                    let &[high, low] = bytes.get(at + 2..at + 4)? else { return None };
                    let end = at + 2 + usize::from(u16::from_be_bytes([high, low]));
                    let content = bytes.get(at + 4..end)?;
                    if marker == 0xDA {
                        components.in_first_scan = usize::from(*content.first()?);
                        return Some(components);
                    }
                    components.is_jfif |= marker == 0xE0 && content.starts_with(b"JFIF\0");
                    if marker == 0xEE && content.starts_with(b"Adobe") {
                        components.is_plain_adobe = content.get(11) == Some(&0);
                    }
                    // All of these but DHT, JPG and DAC begin a frame.
                    if matches!(marker, 0xC0..=0xCF) && !matches!(marker, 0xC4 | 0xC8 | 0xCC) {
                        components.is_progressive = marker & 3 == 2;
                        let factors = content.get(6..)?.chunks_exact(3);
                        components.sampling = factors.map(|c| (c[1] >> 4, c[1] & 15)).collect();
                    }
                    at = end;
                }
                _ => at += 1,
            }
        }
    }

    fn is_common(&self) -> bool {
        let Some(&(columns, rows)) = self.sampling.first() else { return true };
        let is_first_largest = self.sampling.iter().all(|&(h, v)| h <= columns && v <= rows);
        let is_interleaved = self.in_first_scan == self.sampling.len();
        self.sampling.len() == 1 || is_first_largest && (self.is_progressive || is_interleaved)
    }
}

/// Returns the components of a JPEG if it has to be decoded with [`decode`].
pub(super) fn uncommon(bytes: &[u8]) -> Option<Components> {
    Components::read(bytes).filter(|components| !components.is_common())
}

/// Decodes a JPEG of any sampling factors and scans. Returns the width, the height, the RGB
/// samples and how the EXIF orientation turns them.
pub(super) fn decode(
    bytes: &[u8],
    components: &Components,
) -> Result<(u32, u32, Vec<u8>, Turn, Reservation), String> {
    let mut decoder = Decoder::new(Cursor::new(bytes));
    decoder.set_max_decoding_buffer_size(MAX_DECODED_BYTES as usize);
    // The decoder looks at the identifiers of the components first; Pillow does so last.
    if components.sampling.len() == 3 && components.is_plain_adobe && !components.is_jfif {
        decoder.set_color_transform(ColorTransform::RGB);
    }
    decoder.read_info().map_err(|e| e.to_string())?;
    let info = decoder.info().ok_or("the JPEG has no frame")?;
    let (width, height) = (u32::from(info.width), u32::from(info.height));
    let pixels = u64::from(width) * u64::from(height);
    check_size(width, height, pixels * 3, bytes.len() as u64, ::image::ImageFormat::Jpeg)?;
    // The coefficients of all components are kept until the last scan, 2 bytes each.
    let memory = reserve(pixels * 12 + bytes.len() as u64);
    let samples = decoder.decode().map_err(|e| e.to_string())?;
    let turn = decoder.exif_data().and_then(|exif| {
        // The decoder may return the segment with or without its identifier.
        Turn::from_exif_chunk(exif.strip_prefix(b"Exif\0\0").unwrap_or(exif))
    });
    let rgb = match info.pixel_format {
        PixelFormat::RGB24 => samples,
        PixelFormat::L8 => to_rgb(&samples, 1, |sample| sample),
        PixelFormat::L16 | PixelFormat::CMYK32 => {
            return Err("a CMYK or 16-bit JPEG with separate scans or unusual sampling is not \
                        supported; save it again as an RGB JPEG or as PNG"
                .into());
        }
    };
    Ok((width, height, rgb, turn.unwrap_or(Turn::NoTransforms), memory))
}

/// Returns whether a JPEG has an end-of-image marker. Segments are skipped, because a thumbnail in
/// a segment has its own end marker. In entropy-coded data, `FF` is followed by `00` or by a
/// restart marker.
pub(super) fn has_end_marker(bytes: &[u8]) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_common_form_is_told_by_the_headers() {
        let of = |is_progressive, sampling: &[(u8, u8)], in_first_scan| {
            let sampling = sampling.to_vec();
            let rest = Components::default();
            Components { is_progressive, sampling, in_first_scan, ..rest }.is_common()
        };
        let (one, two) = ((1, 1), (2, 2));
        assert!(of(false, &[two, one, one], 3) && of(true, &[two, one, one], 1));
        assert!(of(false, &[two], 1) && of(false, &[], 0));
        assert!(!of(false, &[two, one, one], 1) && !of(false, &[one, one, one], 2));
        assert!(!of(false, &[one, two, two], 3) && !of(true, &[one, two, two], 1));
        for cut in [b"".as_slice(), b"\xFF\xD8", b"\xFF\xD8\xFF", b"\xFF\xD8\xFF\xC0\0\x02"] {
            assert_eq!(Components::read(cut), None);
        }
    }
}
