//! Decoding and resizing against golden files, and against files that are broken.

use std::fs;
use std::path::{Path, PathBuf};

use convpass::Error;
use convpass::data::{Resize, decode_image};

use crate::golden::fixtures;

/// The files of a fixture folder with that extension, sorted.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    files
}

#[test]
fn resize_equals_pillow() {
    let mut cases = 0;
    for path in files(&fixtures().join("resize"), "png") {
        let name = path.file_stem().unwrap().to_str().unwrap();
        let Some((source, size)) = name.split_once('_') else { continue };
        let (rows, columns) = size.split_once('x').unwrap();
        let size = (rows.parse().unwrap(), columns.parse().unwrap());
        let image = decode_image(path.with_file_name(format!("{source}.png"))).unwrap();
        let resized = Resize::bicubic(size).unwrap().apply(image.view()).unwrap();
        assert_eq!(resized, decode_image(&path).unwrap(), "{name}");
        cases += 1;
    }
    assert_eq!(cases, 33);
}

#[test]
fn every_color_type_is_decoded_to_rgb() {
    let goldens = files(&fixtures().join("decode"), "rgb");
    assert_eq!(goldens.len(), 26);
    for golden in goldens {
        let png = golden.with_extension("png");
        // Another JPEG decoder rounds its transforms in another way; PNG leaves no choice.
        let (path, allowed) =
            if png.exists() { (png, 0) } else { (golden.with_extension("jpg"), 4) };
        let image = decode_image(&path).unwrap();
        assert_eq!(image.dim(), (10, 16, 3), "{}", path.display());
        let expected = fs::read(&golden).unwrap();
        let worst = image.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(worst <= allowed, "{}: off by {worst}", path.display());
    }
}

#[test]
fn the_format_is_told_by_content() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("really_a.jpg");
    fs::copy(fixtures().join("decode/rgb8.png"), &path).unwrap();
    assert_eq!(
        decode_image(&path).unwrap(),
        decode_image(fixtures().join("decode/rgb8.png")).unwrap()
    );
}

/// Decodes bytes from a file; a panic fails the test.
fn decode(folder: &Path, bytes: &[u8]) -> convpass::Result<ndarray::Array3<u8>> {
    let path = folder.join("image");
    fs::write(&path, bytes).unwrap();
    decode_image(&path)
}

#[test]
fn a_cut_file_is_an_error_at_every_length() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["rgb8.png", "palette_trns4.png", "jpeg_420.jpg", "jpeg_progressive.jpg"] {
        let bytes = fs::read(fixtures().join("decode").join(name)).unwrap();
        // A PNG is complete without the checksum of its pixels and its end marker.
        let needed = if name.ends_with("png") { bytes.len() - 16 } else { bytes.len() };
        for length in 0..needed {
            let result = decode(folder.path(), &bytes[..length]);
            assert!(matches!(result, Err(Error::Image { .. })), "{name} cut to {length} bytes");
        }
        assert!(decode(folder.path(), &bytes).is_ok());
    }
}

#[test]
fn a_changed_byte_never_panics() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["palette_trns2.png", "jpeg_cmyk.jpg", "jpeg_progressive.jpg"] {
        let bytes = fs::read(fixtures().join("decode").join(name)).unwrap();
        for at in 0..bytes.len() {
            for value in [0xFF, bytes[at] ^ 1] {
                let mut changed = bytes.clone();
                changed[at] = value;
                let _ = decode(folder.path(), &changed);
            }
        }
    }
}

#[test]
fn absurd_dimensions_are_refused_before_anything_is_allocated() {
    let folder = tempfile::tempdir().unwrap();
    let png = fs::read(fixtures().join("decode/grey1.png")).unwrap();
    for (width, height) in [(u32::MAX >> 1, u32::MAX >> 1), (60_000, 60_000), (0, 5), (4000, 4000)]
    {
        let mut bomb = png.clone();
        bomb[16..20].copy_from_slice(&width.to_be_bytes());
        bomb[20..24].copy_from_slice(&height.to_be_bytes());
        let checksum = crc32(&bomb[12..29]).to_be_bytes();
        bomb[29..33].copy_from_slice(&checksum);
        let result = decode(folder.path(), &bomb);
        assert!(matches!(result, Err(Error::Image { .. })), "{width}x{height}: {result:?}");
    }
    let mut jpeg = fs::read(fixtures().join("decode/jpeg_rgb.jpg")).unwrap();
    let frame = jpeg.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
    jpeg[frame + 5..frame + 9].fill(0xFF);
    let error = decode(folder.path(), &jpeg).unwrap_err().to_string();
    assert!(error.contains("65535x65535"), "{error}");
}

/// The checksum of a PNG chunk.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

#[test]
fn what_is_no_image_is_named() {
    let folder = tempfile::tempdir().unwrap();
    for bytes in [
        b"".as_slice(),
        b"GIF89a",
        b"no image",
        b"BM",
        b"II*\0",
        b"RIFF\0\0\0\0WEBP",
        b"\xFF\xD8",
        b"\xFF\xD8\xFF\xD9",
        b"\x89PNG\r\n\x1a\n",
    ] {
        let error = decode(folder.path(), bytes).unwrap_err();
        assert!(matches!(&error, Error::Image { path, .. } if path.ends_with("image")), "{error}");
    }
    assert!(matches!(decode_image(folder.path().join("none.png")), Err(Error::Io { .. })));
    assert!(matches!(decode_image(folder.path()), Err(Error::Io { .. })));
}
