//! Class names, and the sentences that class names are put into.

use std::path::Path;

use crate::error::{Error, Result};

/// The placeholder for the class name in a template.
const PLACE: &str = "{}";

/// Sentence templates. Each contains `{}` in place of the class name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Templates(Vec<String>);

impl Default for Templates {
    /// Returns six templates for photos of any subject. For a specialized dataset, templates that
    /// describe its images ("a satellite photo of {}.") work better.
    fn default() -> Self {
        let templates = [
            "a photo of a {}.",
            "a close photo of a {}.",
            "a photo of the {} from afar.",
            "a blurred picture of a {}.",
            "a picture, drawn or painted, of a {}.",
            "one {} among many things.",
        ];
        Templates(templates.map(str::to_owned).to_vec())
    }
}

impl Templates {
    /// Creates templates from the given sentences.
    ///
    /// # Errors
    /// [`Error::Config`] if the list is empty or if a template does not contain `{}`.
    pub fn new(templates: Vec<String>) -> Result<Self> {
        if templates.is_empty() {
            return Err(Error::config("templates", "at least one sentence", 0));
        }
        match templates.iter().find(|template| !template.contains(PLACE)) {
            Some(template) => Err(Error::config("templates", "sentences containing {}", template)),
            None => Ok(Templates(templates)),
        }
    }

    /// Reads templates from a file with one template a line. Blank lines are skipped.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::ListLine`] if a line is not UTF-8 or does
    /// not contain `{}`, [`Error::CorruptFile`] if the file contains no template.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut templates = Vec::new();
        for (line, text) in read_lines(path)? {
            if !text.is_empty() && !text.contains(PLACE) {
                let reason = format!("expected a sentence that contains {PLACE}, found {text:?}");
                return Err(Error::ListLine { file: path.to_path_buf(), line, reason });
            }
            templates.extend((!text.is_empty()).then_some(text));
        }
        if templates.is_empty() {
            Err(Error::corrupt(path, "the file contains no template"))
        } else {
            Ok(Templates(templates))
        }
    }

    /// Returns every template with `{}` replaced by `class`.
    pub fn fill<'a>(&'a self, class: &'a str) -> impl ExactSizeIterator<Item = String> + 'a {
        self.0.iter().map(move |template| template.replace(PLACE, class))
    }
}

/// Reads a file with one class name a line: the names of classes 0, 1, 2 and so on.
///
/// Blank lines after the last name are ignored.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::ListLine`] if a line is not UTF-8 or if a
/// line before the last name is blank, [`Error::CorruptFile`] if the file contains no name.
pub fn read_class_names(path: impl AsRef<Path>) -> Result<Vec<String>> {
    let path = path.as_ref();
    let mut names = read_lines(path)?;
    while names.last().is_some_and(|(_, name)| name.is_empty()) {
        names.pop();
    }
    if names.is_empty() {
        return Err(Error::corrupt(path, "the file contains no class name"));
    }
    let named = |(line, name): (usize, String)| {
        if name.is_empty() {
            let reason = "expected the name of a class, found a blank line".to_owned();
            Err(Error::ListLine { file: path.to_path_buf(), line, reason })
        } else {
            Ok(name)
        }
    };
    names.into_iter().map(named).collect()
}

/// Returns the lines of a file with their numbers, counted from 1. White space around the text and
/// a byte order mark are removed.
fn read_lines(path: &Path) -> Result<Vec<(usize, String)>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let line = |(at, line): (usize, &[u8])| match std::str::from_utf8(line) {
        Ok(text) => Ok((at + 1, text.trim().to_owned())),
        Err(_) => {
            let reason = "not UTF-8".to_owned();
            Err(Error::ListLine { file: path.to_path_buf(), line: at + 1, reason })
        }
    };
    bytes.split(|&byte| byte == b'\n').enumerate().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_file<T>(content: &[u8], read: impl Fn(&Path) -> T) -> T {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("list.txt");
        std::fs::write(&path, content).unwrap();
        read(&path)
    }

    #[test]
    fn names_are_lines() {
        let read = |content: &[u8]| with_file(content, |path| read_class_names(path));
        let names = read("\u{feff}tabby cat\r\n  dog \ncaf\u{e9}\n\n \n".as_bytes()).unwrap();
        assert_eq!(names, ["tabby cat", "dog", "caf\u{e9}"]);
        for (content, bad) in [(&b"a\n\nb\n"[..], 2), (b"\na", 1), (b"a\n\xff\n", 2)] {
            let error = read(content).unwrap_err();
            assert!(matches!(error, Error::ListLine { line, .. } if line == bad), "{error}");
        }
        assert!(matches!(read(b" \n\n"), Err(Error::CorruptFile { .. })));
        assert!(matches!(read_class_names("/no/such/file"), Err(Error::Io { .. })));
    }

    #[test]
    fn templates_have_a_place_for_the_name() {
        let read = |content: &[u8]| with_file(content, |path| Templates::read(path));
        let templates = read(b"a {}.\n\n{} or {}\n").unwrap();
        assert_eq!(templates.fill("cat").collect::<Vec<_>>(), ["a cat.", "cat or cat"]);
        let error = read(b"a {}.\na cat\n").unwrap_err();
        assert!(matches!(error, Error::ListLine { line: 2, .. }), "{error}");
        assert!(matches!(read(b"\n"), Err(Error::CorruptFile { .. })));
        assert!(matches!(Templates::new(vec![]), Err(Error::Config { .. })));
        assert!(matches!(Templates::new(vec!["a".to_owned()]), Err(Error::Config { .. })));
        assert_eq!(Templates::new(Templates::default().0).unwrap(), Templates::default());
    }
}
