//! Class names and the sentences around them.

use std::path::Path;

use crate::error::{Error, Result};

/// Where a template has the name of the class.
const PLACE: &str = "{}";

/// Sentences that are each made of every class name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Templates(Vec<String>);

impl Default for Templates {
    /// A few that serve photos of anything. Templates that say what the images are ("a satellite
    /// photo of {}.") serve a data set of its own better.
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
    /// The caller's own.
    ///
    /// # Errors
    /// [`Error::Config`] if there is none, or one has no `{}`.
    pub fn new(templates: Vec<String>) -> Result<Self> {
        if templates.is_empty() {
            return Err(Error::config("templates", "at least one", 0));
        }
        match templates.iter().find(|template| !template.contains(PLACE)) {
            Some(template) => Err(Error::config("templates", "with {} for the name", template)),
            None => Ok(Templates(templates)),
        }
    }

    /// One a line; blank lines are left out.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::ListLine`] for a line that is not UTF-8 or
    /// has no `{}`, [`Error::CorruptFile`] if there is none.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut templates = Vec::new();
        for (line, text) in read_lines(path)? {
            if !text.is_empty() && !text.contains(PLACE) {
                let reason = format!("expected {PLACE} where the class name goes, found {text:?}");
                return Err(Error::ListLine { file: path.to_path_buf(), line, reason });
            }
            templates.extend((!text.is_empty()).then_some(text));
        }
        if templates.is_empty() {
            Err(Error::corrupt(path, "it has no template"))
        } else {
            Ok(Templates(templates))
        }
    }

    /// The sentences with `class` in them.
    pub fn fill<'a>(&'a self, class: &'a str) -> impl ExactSizeIterator<Item = String> + 'a {
        self.0.iter().map(move |template| template.replace(PLACE, class))
    }
}

/// The names of the classes 0, 1, 2 and so on, one a line.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::ListLine`] for a line that is not UTF-8 or is
/// blank before the last name (a class would have no name), [`Error::CorruptFile`] if there is none.
pub fn read_class_names(path: impl AsRef<Path>) -> Result<Vec<String>> {
    let path = path.as_ref();
    let mut names = read_lines(path)?;
    while names.last().is_some_and(|(_, name)| name.is_empty()) {
        names.pop();
    }
    if names.is_empty() {
        return Err(Error::corrupt(path, "it has no class name"));
    }
    let named = |(line, name): (usize, String)| {
        if name.is_empty() {
            let reason = "blank, where the name of a class is expected".to_owned();
            Err(Error::ListLine { file: path.to_path_buf(), line, reason })
        } else {
            Ok(name)
        }
    };
    names.into_iter().map(named).collect()
}

/// The lines of a file, counted from 1, without the white space around them.
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
