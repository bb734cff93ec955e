//! Colour operations, in the arithmetic of Pillow.

use ndarray::Array3;

/// Returns `from + factor * (to - from)`, computed in f32, truncated and clipped to 0..=255.
pub(super) fn blend(from: u8, to: u8, factor: f32) -> u8 {
    let difference = i32::from(to) - i32::from(from);
    (f32::from(from) + factor * difference as f32) as u8
}

/// Returns the grey value of a pixel (ITU-R 601-2 luma).
pub(super) fn grey([red, green, blue]: [u8; 3]) -> u8 {
    let weighted = u32::from(red) * 19_595 + u32::from(green) * 38_470 + u32::from(blue) * 7_471;
    ((weighted + 0x8000) >> 16) as u8
}

/// Smooths an image with the kernel [1 1 1; 1 5 1; 1 1 1] / 13. The border pixels stay the same.
pub(super) fn smooth(image: &Array3<u8>) -> Array3<u8> {
    const EDGE: f32 = 1.0 / 13.0;
    const CENTER: f32 = 5.0 / 13.0;
    let (rows, columns, _) = image.dim();
    let mut smoothed = image.clone();
    let (Some(from), Some(to)) = (image.as_slice(), smoothed.as_slice_mut()) else {
        return smoothed;
    };
    let stride = columns * 3;
    for row in 1..rows.saturating_sub(1) {
        let line = |row: usize| &from[row * stride..(row + 1) * stride];
        let (above, here, below) = (line(row - 1), line(row), line(row + 1));
        for at in 3..stride.saturating_sub(3) {
            let sum = |line: &[u8], center: f32| {
                let value = |at: usize| f32::from(line[at]);
                value(at - 3) * EDGE + value(at) * center + value(at + 3) * EDGE
            };
            // The sum starts from one half, so that truncation rounds to nearest. It adds the line
            // below first, as Pillow does.
            let sum = 0.5 + sum(below, EDGE) + sum(here, CENTER) + sum(above, EDGE);
            to[row * stride + at] = sum as u8;
        }
    }
    smoothed
}

/// Shifts the hue by `turns` of the hue circle, in u8 HSV and in steps of 1/255, as torchvision
/// does for a Pillow image.
pub(super) fn shift_hue(pixel: [u8; 3], turns: f64) -> [u8; 3] {
    let [hue, saturation, value] = to_hsv(pixel);
    // The cast to i32 truncates. The cast to u8 wraps, as `uint8` arithmetic does.
    let shifted = hue.wrapping_add((turns * 255.0) as i32 as u8);
    from_hsv([shifted, saturation, value])
}

fn to_hsv([red, green, blue]: [u8; 3]) -> [u8; 3] {
    let (high, low) = (red.max(green).max(blue), red.min(green).min(blue));
    if high == low {
        return [0, 0, high];
    }
    let range = f32::from(high - low);
    let saturation = range / f32::from(high);
    let [r, g, b] = [red, green, blue].map(|value| f32::from(high - value) / range);
    let sixths = match high {
        _ if high == red => b - g,
        _ if high == green => (2.0 + f64::from(r) - f64::from(b)) as f32,
        _ => (4.0 + f64::from(g) - f64::from(r)) as f32,
    };
    let hue = ((f64::from(sixths) / 6.0 + 1.0) % 1.0) as f32;
    let level = |share: f32| (f64::from(share) * 255.0) as u8;
    [level(hue), level(saturation), high]
}

fn from_hsv([hue, saturation, value]: [u8; 3]) -> [u8; 3] {
    if saturation == 0 {
        return [value; 3];
    }
    let sixths = (f64::from(hue) * 6.0 / 255.0) as f32;
    let sector = sixths.floor();
    let within = f64::from(sixths - sector);
    let (level, share) = (f64::from(value), f64::from((f64::from(saturation) / 255.0) as f32));
    let round = |level: f64| level.round() as u8;
    let p = round(level * (1.0 - share));
    let q = round(level * (1.0 - share * within));
    let t = round(level * (1.0 - share * (1.0 - within)));
    match sector as u8 % 6 {
        0 => [value, t, p],
        1 => [q, value, p],
        2 => [p, value, t],
        3 => [p, q, value],
        4 => [t, p, value],
        _ => [value, p, q],
    }
}
