//! The header of a `.npy` array, versions 1 to 3.
//!
//! The layout is: magic, version, header length (2 bytes in version 1, otherwise 4), and a Python
//! dict literal with the keys `descr`, `fortran_order` and `shape`.

use super::entry::{ElementType, numel};

pub(super) const MAGIC: &[u8] = b"\x93NUMPY";

/// The longest header. NumPy itself refuses a longer one, which only structured dtypes have.
pub(super) const MAX_HEADER: usize = 10_000;

/// The contents of a header.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) element: ElementType,
    pub(super) big_endian: bool,
    pub(super) fortran_order: bool,
    pub(super) shape: Vec<i64>,
    /// Number of bytes before the data.
    pub(super) len: usize,
}

impl Header {
    /// Parses the header at the start of `bytes`.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let rest = bytes.strip_prefix(MAGIC).ok_or("no .npy header")?;
        let (text_at, len) = match *rest {
            [1, _, a, b, ..] => (10, u16::from_le_bytes([a, b]).into()),
            [2 | 3, _, a, b, c, d, ..] => (12, u32::from_le_bytes([a, b, c, d]) as usize),
            _ => return Err("no .npy header of version 1 to 3".into()),
        };
        let end = text_at + len;
        let text = bytes.get(text_at..end).ok_or("the .npy header is cut off or too long")?;
        let text = std::str::from_utf8(text).map_err(|_| "the .npy header is not text")?;
        Literal(text).header(end).ok_or_else(|| format!("cannot read the .npy header {text:?}"))
    }

    /// Returns the steps between elements; `None` for row-major order.
    pub(super) fn strides(&self) -> Option<Vec<i64>> {
        numel(&self.shape)?;
        let mut step = 1;
        let strides = self.shape.iter().map(|&dim| {
            let stride = step;
            step *= dim.max(1);
            stride
        });
        self.fortran_order.then(|| strides.collect())
    }
}

/// The part of the dict literal that is not parsed yet.
struct Literal<'a>(&'a str);

impl<'a> Literal<'a> {
    fn header(mut self, len: usize) -> Option<Header> {
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        self.token('{')?;
        while self.token('}').is_none() {
            let key = self.string()?;
            self.token(':')?;
            match key {
                "descr" => descr = Some(self.string()?),
                "fortran_order" => fortran_order = Some(self.boolean()?),
                "shape" => shape = Some(self.tuple()?),
                _ => return None,
            }
            if self.token(',').is_none() {
                self.token('}')?;
                break;
            }
        }
        let (element, big_endian) = element(descr?);
        let (fortran_order, shape) = (fortran_order?, shape?);
        let at_end = self.0.trim().is_empty();
        at_end.then_some(Header { element, big_endian, fortran_order, shape, len })
    }

    fn token(&mut self, token: char) -> Option<()> {
        self.0 = self.0.trim_start().strip_prefix(token)?;
        Some(())
    }

    fn string(&mut self) -> Option<&'a str> {
        let quote = self.0.trim_start().chars().next().filter(|c| matches!(c, '\'' | '"'))?;
        self.token(quote)?;
        let (text, rest) = self.0.split_once(quote)?;
        self.0 = rest;
        Some(text)
    }

    fn boolean(&mut self) -> Option<bool> {
        let text = self.0.trim_start();
        for (word, value) in [("True", true), ("False", false)] {
            if let Some(rest) = text.strip_prefix(word) {
                self.0 = rest;
                return Some(value);
            }
        }
        None
    }

    fn tuple(&mut self) -> Option<Vec<i64>> {
        self.token('(')?;
        let (text, rest) = self.0.split_once(')')?;
        self.0 = rest;
        let text = text.trim();
        let text = text.strip_suffix(',').unwrap_or(text);
        if text.is_empty() {
            return Some(Vec::new());
        }
        // Python 2 wrote an L after a long integer.
        let dim = |dim: &str| dim.trim().trim_end_matches('L').parse().ok();
        text.split(',').map(|d| dim(d).filter(|&d: &i64| d >= 0)).collect()
    }
}

/// Returns the dtype, and whether the bytes of an element are in big-endian order.
fn element(descr: &str) -> (ElementType, bool) {
    let big_endian = descr.starts_with('>');
    let element = match descr.trim_start_matches(['<', '>', '=', '|']) {
        "f8" => ElementType::F64,
        "f4" => ElementType::F32,
        "f2" => ElementType::F16,
        // NumPy has no bf16: JAX saves a bf16 array as elements of two opaque bytes.
        "V2" | "bfloat16" => ElementType::Bf16,
        other => {
            let size = match other.split_at_checked(1) {
                Some(("b" | "i" | "u" | "f" | "c" | "S" | "V", size)) => size.parse().ok(),
                _ => None,
            };
            ElementType::Other(descr.to_owned(), size)
        }
    };
    (element, big_endian)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(version: u8, text: &str) -> Vec<u8> {
        let mut bytes = [MAGIC, &[version, 0]].concat();
        match version {
            1 => bytes.extend((text.len() as u16).to_le_bytes()),
            _ => bytes.extend((text.len() as u32).to_le_bytes()),
        }
        bytes.extend(text.as_bytes());
        bytes
    }

    #[test]
    fn each_version_and_order_is_read() {
        for version in 1..=3 {
            let text = "{'descr': '>f4', 'fortran_order': True, 'shape': (2, 3), }   \n";
            let header = Header::parse(&file(version, text)).unwrap();
            assert_eq!(header.shape, [2, 3]);
            assert_eq!(header.strides().unwrap(), [1, 2]);
            assert!(header.big_endian && header.element == ElementType::F32);
            assert_eq!(header.len, file(version, text).len());
        }
        for (shape, dims) in [("()", vec![]), ("(5,)", vec![5]), ("(0, 7)", vec![0, 7])] {
            let text = format!("{{'shape': {shape}, 'descr': '|V2', 'fortran_order': False}}");
            let header = Header::parse(&file(1, &text)).unwrap();
            assert_eq!((header.shape, header.element), (dims, ElementType::Bf16));
        }
    }

    #[test]
    fn what_is_no_header_is_an_error() {
        for text in [
            "",
            "{",
            "{}",
            "{'descr': '<f4', 'fortran_order': False}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)} x",
            "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}",
        ] {
            assert!(Header::parse(&file(1, text)).is_err(), "{text}");
        }
        assert!(Header::parse(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{").is_err());
    }
}
