//! Datasets that have one folder for each class.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use super::file_list::{FileEntry, FileList, LeftOut};
use super::image::check_signature;
use super::list_format::composed;
use crate::error::{Error, Result, list as listed};

/// The extensions of image files, in lower case. They are listed whatever is in them, so that a
/// broken image, or one in a format that is not supported, is noticed.
const EXTENSIONS: [&str; 13] = [
    "jpg", "jpeg", "jfif", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic",
    "heif",
];
/// The largest depth of nested folders. A deeper folder is probably in a cycle of links.
const MAX_DEPTH: usize = 32;

impl FileList {
    /// Lists the images of a dataset with one folder for each class: `root/CLASS/.../NAME.jpg`.
    ///
    /// The classes are the folders in `root`, sorted by the bytes of their names in the Unicode
    /// normalization form C. The images of a class are sorted by their paths. A file is an image if
    /// its extension is that of an image, in upper or lower case, or if its first bytes are those
    /// of a supported format. Every other file is in [`FileList::left_out`]; hidden files and folders
    /// are skipped. Symbolic links are followed.
    ///
    /// # Errors
    /// [`Error::Io`] if a folder cannot be read; [`Error::ClassFolders`] if `root` contains no
    /// folder, a class has no image, two folders have one name in different Unicode forms, folders
    /// are nested more than 32 levels deep, or a name is not UTF-8.
    pub fn from_folders(root: impl AsRef<Path>) -> Result<Self> {
        let root = root.as_ref();
        let classes = ClassFolders::of(root)?;
        let names = classes.folders.keys().cloned().collect();
        classes.list(root, names)
    }

    /// Lists the images like [`FileList::from_folders`], with the labels of another dataset: the
    /// label of a folder is the position of its name in `class_names`.
    ///
    /// A class without a folder has no images, as in a test set that covers some of the classes.
    ///
    /// # Errors
    /// The errors of [`FileList::from_folders`]; [`Error::ClassFolders`] if the name of a folder is
    /// not in `class_names`.
    pub fn from_folders_of(root: impl AsRef<Path>, class_names: &[String]) -> Result<Self> {
        let root = root.as_ref();
        ClassFolders::of(root)?.list(root, class_names.to_vec())
    }
}

/// The folders of the classes in a folder.
struct ClassFolders {
    /// The name of the folder of each class as it is on the disk.
    folders: BTreeMap<String, String>,
    left_out: Vec<LeftOut>,
}

impl ClassFolders {
    /// Finds the folders in `root`, at least one.
    fn of(root: &Path) -> Result<Self> {
        let (mut folders, mut left_out, mut images) = (BTreeMap::new(), Vec::new(), 0);
        for (name, is_folder) in list(root)? {
            if !is_folder {
                let path = root.join(&name);
                let found = image_or_reason(&path);
                images += usize::from(found.is_ok());
                let reason = found.err().unwrap_or("it is an image in no folder of a class".into());
                left_out.push(LeftOut { path, reason });
            } else if let Some(other) = folders.insert(composed(&name), name.clone()) {
                let reason = format!(
                    "the folders {other:?} and {name:?} have the same name in two Unicode forms"
                );
                return Err(refuse(root, reason));
            }
        }
        if folders.is_empty() {
            let found = if images > 0 { format!(", but {images} images") } else { String::new() };
            return Err(refuse(root, format!("it contains no folder{found}")));
        }
        Ok(Self { folders, left_out })
    }

    /// Lists the images of the folders with the labels of `class_names`.
    fn list(self, root: &Path, class_names: Vec<String>) -> Result<FileList> {
        let labels: HashMap<_, _> = class_names.iter().map(|n| composed(n)).zip(0..).collect();
        let mut warnings = self.warnings();
        let (mut entries, mut left_out) = (Vec::new(), self.left_out);
        for (class, folder) in &self.folders {
            let Some(&label) = labels.get(class) else {
                return Err(refuse(root, format!("{folder} is not one of the classes")));
            };
            let mut paths = Vec::new();
            visit(root, folder, 0, &mut paths, &mut left_out)?;
            if paths.is_empty() {
                return Err(refuse(&root.join(folder), "it contains no image"));
            }
            paths.sort_unstable();
            let entry = |path| FileEntry { path, label, line: 0 };
            entries.extend(paths.into_iter().map(entry));
        }
        warnings.extend(nested(&entries));
        // Folders are in the order of their names, which may not be the order of `class_names`.
        entries.sort_by_key(|entry| entry.label);
        left_out.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(FileList::found(root, entries, class_names, left_out, warnings))
    }

    /// Returns a warning if names of folders differ in case alone.
    fn warnings(&self) -> Vec<String> {
        let mut spellings: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for name in self.folders.keys() {
            spellings.entry(name.to_lowercase()).or_default().push(name);
        }
        let alike = spellings.into_values().filter(|names| names.len() > 1);
        let warning = |names: Vec<&str>| {
            format!("the classes {} differ in upper and lower case alone", listed(&names))
        };
        alike.map(warning).collect()
    }
}

/// Returns a warning if all images are in folders inside the folders of the classes, and some of
/// these inner folders occur in every class, as if they were the classes.
fn nested(entries: &[FileEntry]) -> Option<String> {
    let mut inner: BTreeMap<i64, BTreeSet<&str>> = BTreeMap::new();
    for entry in entries {
        let mut parts = entry.path.split('/').skip(1);
        let (folder, _image) = (parts.next()?, parts.next()?);
        inner.entry(entry.label).or_default().insert(folder);
    }
    let mut folders = inner.into_values();
    let first = folders.next()?;
    let rest: Vec<_> = folders.collect();
    let shared = first.into_iter().filter(|name| rest.iter().all(|others| others.contains(name)));
    let shared: Vec<&str> = shared.collect();
    (!rest.is_empty() && !shared.is_empty()).then(|| {
        format!("each class has the folders {}; the classes are the outer folders", listed(&shared))
    })
}

fn refuse(folder: &Path, reason: impl Into<String>) -> Error {
    Error::ClassFolders { folder: folder.to_path_buf(), reason: reason.into() }
}

/// Adds the images below `root/inside` to `paths`, relative to `root`, and the other files to
/// `left_out`.
fn visit(
    root: &Path,
    inside: &str,
    depth: usize,
    paths: &mut Vec<String>,
    left_out: &mut Vec<LeftOut>,
) -> Result<()> {
    let folder = root.join(inside);
    if depth > MAX_DEPTH {
        return Err(refuse(&folder, format!("it is nested more than {MAX_DEPTH} levels deep")));
    }
    for (name, is_folder) in list(&folder)? {
        let path = format!("{inside}/{name}");
        if is_folder {
            visit(root, &path, depth + 1, paths, left_out)?;
            continue;
        }
        match image_or_reason(&root.join(&path)) {
            Ok(()) => paths.push(path),
            Err(reason) => left_out.push(LeftOut { path: root.join(&path), reason }),
        }
    }
    Ok(())
}

/// Returns whether the extension of a file is that of an image. The content of the file is not looked
/// at.
pub(super) fn has_image_extension(path: impl AsRef<Path>) -> bool {
    let extension = path.as_ref().extension().map(|extension| extension.to_string_lossy());
    extension.is_some_and(|extension| EXTENSIONS.contains(&&*extension.to_ascii_lowercase()))
}

/// Returns whether a file is an image by its extension, in upper or lower case, or by its first
/// bytes. AVIF and HEIC, which are not supported, are images by their extensions.
pub fn is_image_file(path: impl AsRef<Path>) -> bool {
    image_or_reason(path.as_ref()).is_ok()
}

/// Returns why a file is no image, if neither its extension nor its content is that of one.
fn image_or_reason(path: &Path) -> Result<(), String> {
    if has_image_extension(path) {
        return Ok(());
    }
    check_signature(path).map_err(|error| match error {
        Error::Image { reason, .. } => reason,
        Error::NotAFile { found, .. } => format!("it is {found}"),
        Error::Io { source, .. } => source.to_string(),
        other => other.to_string(),
    })
}

/// Returns the names in a folder that are not hidden, sorted, and whether each is a folder.
pub(super) fn list(folder: &Path) -> Result<Vec<(String, bool)>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // `is_dir` follows links; for a broken link it returns false.
        let is_folder = entry.path().is_dir();
        match name.into_string() {
            Ok(name) => names.push((name, is_folder)),
            Err(name) => return Err(refuse(folder, format!("{name:?} is not UTF-8"))),
        }
    }
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Creates a folder that contains empty files at `paths`.
    pub(in crate::data) fn tree(paths: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for path in paths {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"").unwrap();
        }
        root
    }

    fn found(list: &FileList) -> Vec<(&str, i64)> {
        list.entries().iter().map(|e| (e.path.as_str(), e.label)).collect()
    }

    #[test]
    fn classes_and_images_are_in_the_order_of_their_names() {
        let root = tree(&[
            "tulip/b.PNG",
            "tulip/a.jpg",
            "tulip/z/0.jpeg",
            "tulip/.hidden.png",
            "rose/2.png",
            "Zinnia/x.Jpg",
            ".git/a.png",
            "classes.txt",
            "rose/notes.txt",
            "rose/png",
            "2.webp",
            "rose/10.png",
        ]);
        let list = FileList::from_folders(root.path()).unwrap();
        assert_eq!(list.class_names(), ["Zinnia", "rose", "tulip"]);
        assert_eq!((list.num_classes(), list.root(), list.file()), (3, root.path(), root.path()));
        assert_eq!(
            found(&list),
            [
                ("Zinnia/x.Jpg", 0),
                ("rose/10.png", 1),
                ("rose/2.png", 1),
                ("tulip/a.jpg", 2),
                ("tulip/b.PNG", 2),
                ("tulip/z/0.jpeg", 2),
            ]
        );
        let left_out = list.left_out().iter().map(|file| {
            (file.path.strip_prefix(root.path()).unwrap().to_str().unwrap(), &*file.reason)
        });
        let left_out: Vec<_> = left_out.collect();
        let (empty, no_class) = ("the file is empty", "it is an image in no folder of a class");
        let expected = [
            ("2.webp", no_class),
            ("classes.txt", empty),
            ("rose/notes.txt", empty),
            ("rose/png", empty),
        ];
        assert_eq!(left_out, expected);
    }

    #[test]
    fn images_are_told_by_their_content_where_the_name_does_not() {
        let root = tree(&["a/1.png", "a/photo of me", "a/page.html", "a/2.png.part"]);
        fs::write(root.path().join("a/photo of me"), b"GIF89a").unwrap();
        fs::write(root.path().join("a/page.html"), b"<!doctype html>").unwrap();
        fs::write(root.path().join("a/2.png.part"), b"....ftypheic....").unwrap();
        let list = FileList::from_folders(root.path()).unwrap();
        assert_eq!(found(&list), [("a/1.png", 0), ("a/photo of me", 0)]);
        let reasons: Vec<_> = list.left_out().iter().map(|file| file.reason.as_str()).collect();
        assert!(reasons[0].contains("HEIC") && reasons[1].contains("not an image"), "{reasons:?}");
    }

    #[test]
    fn names_are_compared_in_one_unicode_form() {
        let (composed, decomposed) = ("caf\u{e9}", "cafe\u{301}");
        let root = tree(&[&format!("{decomposed}/1.png"), "b/1.png"]);
        let list = FileList::from_folders(root.path()).unwrap();
        assert_eq!(list.class_names(), ["b", composed]);
        assert_eq!(found(&list)[1], (&*format!("{decomposed}/1.png"), 1));
        for name in [composed, decomposed] {
            let names = [name, "b"].map(str::to_owned);
            let list = FileList::from_folders_of(root.path(), &names).unwrap();
            assert_eq!((found(&list)[0].1, list.class_names()), (0, &names[..]));
        }
        fs::create_dir(root.path().join(composed)).unwrap();
        let error = FileList::from_folders(root.path()).unwrap_err().to_string();
        assert!(error.contains("two Unicode forms"), "{error}");
        let root = tree(&["Cat/1.png", "cat/1.png"]);
        let warnings = FileList::from_folders(root.path()).unwrap().warnings().join(" ");
        assert!(warnings.contains("Cat, cat differ in upper and lower case"), "{warnings}");
        let root = tree(&["set1/cat/1.png", "set1/dog/1.png", "set2/dog/1.png"]);
        let warnings = FileList::from_folders(root.path()).unwrap().warnings().join(" ");
        assert!(warnings.contains("each class has the folders dog"), "{warnings}");
        let root = tree(&["cat/a/1.png", "dog/a/1.png", "dog/1.png"]);
        assert!(FileList::from_folders(root.path()).unwrap().warnings().is_empty());
    }

    #[test]
    fn another_dataset_gives_the_labels() {
        let root = tree(&["b/1.png", "a/1.png"]);
        let names = ["c", "b", "x", "a"].map(str::to_owned);
        let list = FileList::from_folders_of(root.path(), &names).unwrap();
        assert_eq!(found(&list), [("b/1.png", 1), ("a/1.png", 3)]);
        assert_eq!((list.num_classes(), list.class_names()), (4, &names[..]));
        let refused = FileList::from_folders_of(root.path(), &names[..3]).unwrap_err();
        assert!(refused.to_string().contains("a is not one of the classes"), "{refused}");
    }

    #[test]
    fn what_is_no_such_dataset_is_named() {
        let empty = tree(&["a/1.png", "b/.keep"]);
        let error = FileList::from_folders(empty.path()).unwrap_err();
        assert!(matches!(&error, Error::ClassFolders { folder, .. } if folder.ends_with("b")));
        let flat = tree(&["1.png"]);
        let error = FileList::from_folders(flat.path()).unwrap_err();
        assert!(matches!(&error, Error::ClassFolders { folder, .. } if folder == flat.path()));
        assert!(matches!(FileList::from_folders("/no/such"), Err(Error::Io { .. })));
        assert!(matches!(FileList::from_folders(flat.path().join("1.png")), Err(Error::Io { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_but_not_in_circles() {
        let root = tree(&["a/1.png"]);
        std::os::unix::fs::symlink(root.path().join("a/1.png"), root.path().join("a/2.png"))
            .unwrap();
        std::os::unix::fs::symlink(root.path().join("a"), root.path().join("b")).unwrap();
        assert_eq!(FileList::from_folders(root.path()).unwrap().entries().len(), 4);
        std::os::unix::fs::symlink(root.path(), root.path().join("a/up")).unwrap();
        let error = FileList::from_folders(root.path()).unwrap_err();
        assert!(matches!(error, Error::ClassFolders { .. } | Error::Io { .. }), "{error}");
    }
}
