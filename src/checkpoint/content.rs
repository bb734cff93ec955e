//! The bytes of a checkpoint, which are read when they are needed.
//!
//! A file is not mapped into memory. If another process cuts a file that is mapped, the next access
//! ends this process with SIGBUS; if it cuts a file that is read, the read is an error.

use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;

use crate::files::OpenFile;

/// Bytes that are read in parts.
pub(super) trait Content: Sync {
    /// Returns the number of bytes.
    fn len(&self) -> usize;

    /// Fills `to` with the bytes from the offset `at` on.
    fn read_at(&self, at: usize, to: &mut [u8]) -> io::Result<()>;
}

impl Content for OpenFile {
    fn len(&self) -> usize {
        self.len()
    }

    fn read_at(&self, at: usize, to: &mut [u8]) -> io::Result<()> {
        self.read_at(at as u64, to)
    }
}

impl Content for Vec<u8> {
    fn len(&self) -> usize {
        self.len()
    }

    fn read_at(&self, at: usize, to: &mut [u8]) -> io::Result<()> {
        let end = at.checked_add(to.len());
        let found = end.and_then(|end| self.get(at..end)).ok_or(ErrorKind::UnexpectedEof)?;
        to.copy_from_slice(found);
        Ok(())
    }
}

/// Returns the bytes of `at`. Nothing is allocated for a range outside the file.
pub(super) fn bytes(file: &dyn Content, at: &Range<usize>) -> Result<Vec<u8>, String> {
    check(file, at)?;
    let mut bytes = vec![0; at.len()];
    file.read_at(at.start, &mut bytes).map_err(|e| unreadable(&e))?;
    Ok(bytes)
}

/// Returns at most the first `count` bytes.
pub(super) fn start(file: &dyn Content, count: usize) -> Result<Vec<u8>, String> {
    bytes(file, &(0..count.min(file.len())))
}

/// Checks that `at` lies in the file.
pub(super) fn check(file: &dyn Content, at: &Range<usize>) -> Result<(), String> {
    if at.start <= at.end && at.end <= file.len() {
        Ok(())
    } else {
        Err(format!("bytes {at:?} lie outside the file"))
    }
}

/// Returns why bytes that were in the file when it was opened are not read.
pub(super) fn unreadable(error: &io::Error) -> String {
    if error.kind() == ErrorKind::UnexpectedEof {
        "the file became shorter while it was open".to_owned()
    } else {
        format!("the file cannot be read: {error}")
    }
}

/// Returns a reader of the bytes of `at`, with a small buffer.
pub(super) fn reader(file: &dyn Content, at: Range<usize>) -> BufReader<Part<'_>> {
    BufReader::with_capacity(1 << 12, Part { file, position: at.start, at })
}

/// A part of the content as a reader.
pub(super) struct Part<'a> {
    file: &'a dyn Content,
    at: Range<usize>,
    position: usize,
}

impl Read for Part<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let count = self.at.end.saturating_sub(self.position).min(to.len());
        if count > 0 {
            self.file.read_at(self.position, &mut to[..count])?;
        }
        self.position += count;
        Ok(count)
    }
}

impl Seek for Part<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let offset = |from: usize, by: i64| (from as u64).checked_add_signed(by);
        let start = self.at.start as u64;
        let position = match to {
            SeekFrom::Start(by) => start.checked_add(by),
            SeekFrom::End(by) => offset(self.at.end, by),
            SeekFrom::Current(by) => offset(self.position, by),
        };
        let position = position.filter(|&position| position >= start);
        let position = position.and_then(|position| usize::try_from(position).ok());
        self.position = position.ok_or(ErrorKind::InvalidInput)?;
        Ok(self.position as u64 - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_read_like_a_file_of_its_own() {
        let all: Vec<u8> = (0..100).collect();
        let mut part = Part { file: &all, position: 10, at: 10..20 };
        let mut found = Vec::new();
        part.read_to_end(&mut found).unwrap();
        assert_eq!(found, (10..20).collect::<Vec<_>>());
        assert_eq!(part.seek(SeekFrom::End(-3)).unwrap(), 7);
        assert_eq!(part.seek(SeekFrom::Current(-2)).unwrap(), 5);
        assert_eq!(part.read(&mut [0; 9]).unwrap(), 5);
        assert_eq!(part.seek(SeekFrom::Start(50)).unwrap(), 50);
        assert_eq!(part.read(&mut [0; 9]).unwrap(), 0);
        assert!(part.seek(SeekFrom::End(-11)).is_err());
        assert!(part.seek(SeekFrom::Start(u64::MAX)).is_err());
    }

    #[test]
    fn what_lies_outside_is_an_error() {
        let all = vec![1, 2, 3];
        assert_eq!(bytes(&all, &(1..3)).unwrap(), [2, 3]);
        assert_eq!(start(&all, 10).unwrap(), [1, 2, 3]);
        for at in [2..4, 4..4, usize::MAX - 1..usize::MAX] {
            assert!(bytes(&all, &at).is_err(), "{at:?}");
        }
        assert!(all.read_at(usize::MAX, &mut [0; 2]).is_err());
    }
}
