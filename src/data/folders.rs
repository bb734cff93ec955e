//! Datasets that have one folder for each class.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use super::file_list::{FileEntry, FileList};
use crate::error::{Error, Result};

/// The extensions of image files, in lower case.
const EXTENSIONS: [&str; 3] = ["jpg", "jpeg", "png"];
/// The largest depth of nested folders. A deeper folder is probably in a cycle of links.
const MAX_DEPTH: usize = 32;

impl FileList {
    /// Lists the images of a dataset with one folder for each class: `root/CLASS/.../NAME.jpg`. The
    /// extension is `jpg`, `jpeg` or `png`, in upper or lower case.
    ///
    /// The classes are the folders in `root`, sorted by the bytes of their names. The images of a
    /// class are sorted by their paths. Hidden files and files with another extension are skipped.
    /// Symbolic links are followed.
    ///
    /// # Errors
    /// [`Error::Io`] if a folder cannot be read; [`Error::ClassFolders`] if `root` contains no
    /// folder, a class has no image, folders are nested more than 32 levels deep, or a name is not
    /// UTF-8.
    pub fn from_folders(root: impl AsRef<Path>) -> Result<Self> {
        let root = root.as_ref();
        let classes = folders(root)?;
        Self::of_classes(root, &classes, classes.clone())
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
        Self::of_classes(root, class_names, folders(root)?)
    }

    fn of_classes(root: &Path, class_names: &[String], folders: Vec<String>) -> Result<Self> {
        let labels: HashMap<_, _> = class_names.iter().zip(0..).collect();
        let mut entries = Vec::new();
        for folder in folders {
            let Some(&label) = labels.get(&folder) else {
                return Err(refuse(root, format!("{folder} is not one of the classes")));
            };
            let mut paths = Vec::new();
            visit(root, &folder, 0, &mut paths)?;
            if paths.is_empty() {
                return Err(refuse(&root.join(folder), "it contains no JPEG or PNG file"));
            }
            paths.sort_unstable();
            let entry = |path| FileEntry { path, label, line: 0 };
            entries.extend(paths.into_iter().map(entry));
        }
        // Folders are in the order of their names, which may not be the order of `class_names`.
        entries.sort_by_key(|entry| entry.label);
        Ok(Self::found(root, entries, class_names.to_vec()))
    }
}

fn refuse(folder: &Path, reason: impl Into<String>) -> Error {
    Error::ClassFolders { folder: folder.to_path_buf(), reason: reason.into() }
}

/// Returns the sorted names of the folders in `root`, at least one.
fn folders(root: &Path) -> Result<Vec<String>> {
    let names = list(root)?.into_iter().filter(|(_, is_folder)| *is_folder).map(|(name, _)| name);
    let mut names: Vec<_> = names.collect();
    names.sort_unstable();
    if names.is_empty() { Err(refuse(root, "it contains no folder")) } else { Ok(names) }
}

/// Adds the images below `root/inside` to `paths`, relative to `root`.
fn visit(root: &Path, inside: &str, depth: usize, paths: &mut Vec<String>) -> Result<()> {
    let folder = root.join(inside);
    if depth > MAX_DEPTH {
        return Err(refuse(&folder, format!("it is nested more than {MAX_DEPTH} levels deep")));
    }
    for (name, is_folder) in list(&folder)? {
        let path = format!("{inside}/{name}");
        if is_folder {
            visit(root, &path, depth + 1, paths)?;
        } else if is_image(&name) {
            paths.push(path);
        }
    }
    Ok(())
}

fn is_image(name: &str) -> bool {
    let extension = name.rsplit_once('.').map(|(_, extension)| extension.to_ascii_lowercase());
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension.as_str()))
}

/// Returns the names in a folder that are not hidden, and whether each is a folder.
fn list(folder: &Path) -> Result<Vec<(String, bool)>> {
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
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Creates a folder that contains empty files at `paths`.
    fn tree(paths: &[&str]) -> tempfile::TempDir {
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
