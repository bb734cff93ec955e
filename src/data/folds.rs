//! Folds of a list for cross-validation.

use rand::seq::SliceRandom;

use super::few_shot::{by_class, generator};
use super::file_list::{FileEntry, FileList};
use crate::error::{Error, Result};

/// One fold of a cross-validation: the images that are held out, and those to train on.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Fold {
    /// The images of all other folds.
    pub train: FileList,
    /// The images of this fold.
    pub held_out: FileList,
}

impl FileList {
    /// Splits the list into `count` folds at random with `seed`, stratified by class: each image is
    /// held out in one fold, and the folds have as many images of each class, and as many in all,
    /// as the others or one more.
    ///
    /// The folds depend on the paths, the labels and the seed. They do not depend on the order of
    /// the list or on the machine. Their lists are sorted by label and then by path.
    ///
    /// # Errors
    /// [`Error::Config`] if `count` is below 2; [`Error::TooFewImages`] for the first class that
    /// has images, but fewer than `count`, so that a fold would have none of it.
    pub fn folds(&self, count: usize, seed: i64) -> Result<Vec<Fold>> {
        if count < 2 {
            return Err(Error::config("count", "2 folds or more", count));
        }
        let mut dealt: Vec<(&FileEntry, usize)> = Vec::new();
        for (label, mut images) in by_class(self) {
            if images.len() < count {
                let (file, class) = (self.file().to_path_buf(), self.class_name(label));
                let found = images.len();
                return Err(Error::TooFewImages { file, class, expected: count, found });
            }
            images.shuffle(&mut generator(b"k-folds\0", seed, label));
            // A class starts where the last one ended, so that no fold gets every odd image.
            let next = dealt.len();
            dealt.extend(images.into_iter().enumerate().map(|(at, e)| (e, (next + at) % count)));
        }
        dealt.sort_by(|(a, _), (b, _)| (a.label, &a.path, a.line).cmp(&(b.label, &b.path, b.line)));
        let list = |is_in: &dyn Fn(usize) -> bool| {
            let entries = dealt.iter().filter(|(_, fold)| is_in(*fold));
            self.with_entries(entries.map(|(entry, _)| (*entry).clone()).collect())
        };
        let fold = |own: usize| Fold {
            train: list(&|fold| fold != own),
            held_out: list(&|fold| fold == own),
        };
        Ok((0..count).map(fold).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Creates a list with so many images of each class.
    fn list(counts: &[usize], is_reversed: bool) -> FileList {
        let images = counts.iter().enumerate();
        let mut lines: Vec<String> = images
            .flat_map(|(label, &count)| (0..count).map(move |i| format!("{label}/{i}.png {label}")))
            .collect();
        if is_reversed {
            lines.reverse();
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("list.txt");
        std::fs::write(&file, lines.join("\n")).unwrap();
        FileList::read(folder.path(), file, None).unwrap()
    }

    fn paths(list: &FileList) -> Vec<&str> {
        list.entries().iter().map(|entry| entry.path.as_str()).collect()
    }

    #[test]
    fn each_image_is_held_out_once_and_folds_are_equally_large() {
        for (counts, count) in [(&[8, 8, 8][..], 4), (&[3, 5, 7, 0, 4], 3), (&[2; 10], 2)] {
            let (list, turned) = (list(counts, false), list(counts, true));
            let folds = list.folds(count, 5).unwrap();
            assert_eq!(folds.len(), count);
            let mut all: Vec<&str> = Vec::new();
            let sizes =
                |sizes: Vec<usize>| sizes.iter().max().unwrap() - sizes.iter().min().unwrap();
            for (fold, other) in folds.iter().zip(turned.folds(count, 5).unwrap()) {
                assert_eq!(paths(&fold.held_out), paths(&other.held_out));
                assert_eq!(fold.train.num_classes(), list.num_classes());
                let own: BTreeSet<_> = paths(&fold.held_out).into_iter().collect();
                let rest: BTreeSet<_> = paths(&fold.train).into_iter().collect();
                assert!(own.is_disjoint(&rest) && own.len() + rest.len() == list.entries().len());
                all.extend(own);
            }
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), list.entries().len());
            assert!(sizes(folds.iter().map(|f| f.held_out.entries().len()).collect()) <= 1);
            for label in 0..list.class_counts().len() {
                let of_class = |fold: &Fold| fold.held_out.class_counts()[label];
                assert!(sizes(folds.iter().map(of_class).collect()) <= 1, "{label}");
            }
        }
    }

    #[test]
    fn folds_are_fixed_by_the_seed() {
        let list = list(&[4, 4], false);
        let held_out = |seed| {
            let folds = list.folds(2, seed).unwrap();
            paths(&folds[0].held_out).into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        // The values are fixed here so that a new version of a dependency cannot change runs
        // unnoticed.
        assert_eq!(held_out(0), ["0/0.png", "0/3.png", "1/1.png", "1/3.png"]);
        assert!((1..9).any(|seed| held_out(seed) != held_out(0)));
    }

    #[test]
    fn a_class_with_fewer_images_than_folds_is_named() {
        let list = list(&[3, 2, 5], false);
        match list.folds(3, 0) {
            Err(Error::TooFewImages { class, expected: 3, found: 2, .. }) => assert_eq!(class, "1"),
            other => panic!("{other:?}"),
        }
        for count in [0, 1] {
            assert!(matches!(list.folds(count, 0), Err(Error::Config { .. })));
        }
    }
}
