//! A height and a width in an argument.

use std::fmt;
use std::str::FromStr;

/// The largest side. It keeps the position table of a huge image from taking all memory.
const MAX_SIDE: i64 = 8192;

/// A height and a width, written `H,W` or `HxW`, or as one number if both are the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Size {
    pub height: i64,
    pub width: i64,
}

impl Size {
    pub fn pair(self) -> (i64, i64) {
        (self.height, self.width)
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            text.trim().parse::<i64>().ok().filter(|side| (1..=MAX_SIDE).contains(side))
        };
        let sides: Option<Vec<i64>> = text.split([',', 'x']).map(number).collect();
        match sides.as_deref() {
            Some(&[side]) => Ok(Size { height: side, width: side }),
            Some(&[height, width]) => Ok(Size { height, width }),
            _ => Err(format!(
                "expected a number from 1 to {MAX_SIDE}, or a height and a width as H,W or HxW"
            )),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.height == self.width {
            write!(f, "{}", self.height)
        } else {
            write!(f, "{}x{}", self.height, self.width)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_one_number_or_two() {
        for (text, height, width) in [("224", 224, 224), ("64,128", 64, 128), ("64x128", 64, 128)] {
            let size: Size = text.parse().unwrap();
            assert_eq!(size.pair(), (height, width), "{text}");
            assert_eq!(size.to_string().parse(), Ok(size));
        }
        for text in ["", "0", "-4", "4x", "4,5,6", "4x5.5", "a", "9000"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
