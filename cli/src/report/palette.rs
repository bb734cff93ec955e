//! Shared by all charts: colours, text sizes, and shortened text.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

// Ink, its paler kinds, and two colours that are dark in print too. The page gives each its twin on
// a dark ground, by these very values.
pub(super) const INK: RGBColor = RGBColor(34, 34, 34);
pub(super) const PALE: RGBColor = RGBColor(90, 90, 90);
pub(super) const GRID: RGBColor = RGBColor(221, 221, 221);
pub(super) const ACCENT: RGBColor = RGBColor(0, 90, 160);
pub(super) const SECOND: RGBColor = RGBColor(176, 74, 0);

pub(super) const FAMILY: &str = "sans-serif";
/// plotters draws a font of size s with s / 1.24 pixels.
pub(super) const EM: f64 = 1.24;

/// Returns the style of text with a size in pixels.
pub(super) fn text(pixels: f64, color: &RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    (FAMILY, pixels * EM).into_font().color(color).pos(Pos::new(h, v))
}

/// Returns an upper estimate of the width of text in pixels. The font of the reader is unknown, so
/// the widths are those of DejaVu Sans, one of the widest fonts.
pub(super) fn width(text: &str, pixels: f64) -> f64 {
    let share = |c: char| match c {
        'i' | 'j' | 'l' | 'I' | 'J' | ' ' | '.' | ',' | ':' | ';' | '\'' | '|' | '!' => 0.33,
        'f' | 'r' | 't' | '-' | '(' | ')' | '[' | ']' | '/' => 0.41,
        'm' | 'w' | 'M' | 'W' | '@' | '%' | '…' => 1.0,
        'G' | 'O' | 'Q' | 'N' | 'H' | 'U' | 'D' | '+' | '=' | '<' | '>' | '~' | '±' => 0.84,
        'A'..='Z' | '&' => 0.73,
        // Each ideograph fills its em.
        c if u32::from(c) >= 0x1100 => 1.0,
        _ => 0.64,
    };
    text.chars().map(share).sum::<f64>() * pixels
}

/// Returns text of a user in one line of at most `most` characters.
pub(super) fn short(text: &str, most: usize) -> String {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if clean.chars().count() > most {
        clean.chars().take(most.saturating_sub(1)).chain(['…']).collect()
    } else {
        clean
    }
}

/// Returns text of a user in one line of at most `most` pixels.
pub(super) fn fitting(text: &str, pixels: f64, most: f64) -> String {
    let clean = short(text, usize::MAX);
    if width(&clean, pixels) <= most {
        return clean;
    }
    let mut used = width("…", pixels);
    let fits = |c: &char| {
        used += width(c.encode_utf8(&mut [0; 4]), pixels);
        used <= most
    };
    clean.chars().take_while(fits).chain(['…']).collect()
}

/// Returns a short form of a number, such as `1.5k`, `20k` or `3M`.
pub(super) fn short_number(number: f64) -> String {
    let (scale, unit) = match number {
        n if n >= 1e9 => (1e9, "G"),
        n if n >= 1e6 => (1e6, "M"),
        n if n >= 1e3 => (1e3, "k"),
        _ => (1.0, ""),
    };
    let text = format!("{:.1}", number / scale);
    format!("{}{unit}", text.strip_suffix(".0").unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_one_short_line_and_numbers_are_short() {
        assert_eq!(short("a\u{1b}[31mb\nc", 20), "a [31mb c");
        assert_eq!(short("äöüß", 3), "äö…");
        assert!(width("WWW", 10.0) > width("xxx", 10.0) && width("xxx", 10.0) > width("iii", 10.0));
        assert_eq!(fitting("a\tb", 10.0, 20.0), "a b");
        for text in ["BACKGROUND_Google", "inline_skate_inline_skate", "猫猫猫猫猫猫猫"] {
            let short = fitting(text, 10.0, 60.0);
            assert!(
                short.ends_with('…') && (40.0..=60.0).contains(&width(&short, 10.0)),
                "{short}"
            );
        }
        assert_eq!([1.0, 1_500.0, 2e4, 3e6].map(short_number), ["1", "1.5k", "20k", "3M"]);
    }
}
