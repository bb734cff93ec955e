//! The first frame of a GIF.
//!
//! The crate `image` paints what the first frame leaves out black. Pillow paints it with the colour
//! of the frame's transparent index, which needs the palette.

use std::io::Cursor;
use std::num::NonZeroU64;

use gif::{ColorOutput, DecodeOptions, MemoryLimit};

use super::budget::{Reservation, reserve};
use super::{MAX_DECODED_BYTES, check_size};

/// Decodes the first frame on its canvas, as Pillow does. Returns the width, the height and the RGB
/// samples.
pub(super) fn decode(
    bytes: &[u8],
    memory: Option<Reservation>,
) -> Result<(u32, u32, Vec<u8>, Reservation), String> {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    let limit = NonZeroU64::new(MAX_DECODED_BYTES).unwrap_or(NonZeroU64::MIN);
    options.set_memory_limit(MemoryLimit::Bytes(limit));
    let mut decoder = options.read_info(Cursor::new(bytes)).map_err(|e| e.to_string())?;
    let global = decoder.global_palette().map(<[u8]>::to_vec);
    let canvas = (usize::from(decoder.width()), usize::from(decoder.height()));
    let frame = decoder.next_frame_info().map_err(|e| e.to_string())?;
    // Without its indices, which are read below.
    let frame = frame.ok_or("the GIF has no frame")?.clone();
    // A frame that is larger than the canvas enlarges it.
    let far = |start: u16, length: u16| usize::from(start) + usize::from(length);
    let width = canvas.0.max(far(frame.left, frame.width));
    let height = canvas.1.max(far(frame.top, frame.height));
    let (size, pixels) = ((width as u32, height as u32), width as u64 * height as u64);
    check_size(size.0, size.1, pixels * 3, bytes.len() as u64, ::image::ImageFormat::Gif)?;
    let memory = memory.unwrap_or_else(|| reserve(pixels * 4 + bytes.len() as u64));
    let mut indices = vec![0; decoder.buffer_size()];
    decoder.read_into_buffer(&mut indices).map_err(|e| e.to_string())?;
    let palette = frame.palette.as_deref().or(global.as_deref());
    let color = |index: u8| match palette {
        Some(palette) => {
            let color = palette.chunks_exact(3).nth(usize::from(index));
            color.map_or([0; 3], |color| [color[0], color[1], color[2]])
        }
        // Without a palette the index is a grey value.
        None => [index; 3],
    };
    let colors: Vec<[u8; 3]> = (0..=u8::MAX).map(color).collect();
    let mut rgb = colors[usize::from(frame.transparent.unwrap_or(0))].repeat(width * height);
    let rows = rgb.chunks_exact_mut(width * 3).skip(usize::from(frame.top));
    for (row, indices) in rows.zip(indices.chunks_exact(usize::from(frame.width).max(1))) {
        let row = row[usize::from(frame.left) * 3..].as_chunks_mut::<3>().0;
        for (pixel, &index) in row.iter_mut().zip(indices) {
            *pixel = colors[usize::from(index)];
        }
    }
    Ok((size.0, size.1, rgb, memory))
}
