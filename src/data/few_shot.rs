//! Few-shot subsets: a few images of each class.

use std::collections::BTreeMap;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::file_list::{FileEntry, FileList};
use crate::error::{Error, Result};

impl FileList {
    /// Draws `per_class` images of each class at random with `seed`.
    ///
    /// The images drawn of a class depend on its paths, its label and the seed. They do not depend
    /// on the order of the list or on the machine. The images of a smaller `per_class` are a subset
    /// of those of a larger one. The result is sorted by label and then by path. Save it with
    /// [`FileList::save`].
    ///
    /// # Errors
    /// [`Error::TooFewImages`] for the first class that has fewer images, with its name or label;
    /// [`Error::Config`] if `per_class` is 0.
    pub fn few_shot(&self, per_class: usize, seed: i64) -> Result<Self> {
        self.draw(per_class, seed, per_class)
    }

    /// Draws images like [`FileList::few_shot`], but uses all images of a class that has fewer than
    /// `per_class`.
    ///
    /// # Errors
    /// [`Error::Config`] if `per_class` is 0.
    pub fn few_shot_at_most(&self, per_class: usize, seed: i64) -> Result<Self> {
        self.draw(per_class, seed, 0)
    }

    fn draw(&self, per_class: usize, seed: i64, at_least: usize) -> Result<Self> {
        if per_class == 0 {
            return Err(Error::config("per_class", "1 or more", 0));
        }
        let classes = by_class(self);
        if at_least > 0 {
            self.check_counts(&classes, at_least)?;
        }
        let mut drawn = Vec::new();
        for (label, mut images) in classes {
            images.shuffle(&mut generator(b"few-shot", seed, label));
            images.truncate(per_class);
            images.sort_by(|a, b| (&a.path, a.line).cmp(&(&b.path, b.line)));
            drawn.extend(images.into_iter().cloned());
        }
        Ok(self.with_entries(drawn))
    }

    fn check_counts(
        &self,
        classes: &BTreeMap<i64, Vec<&FileEntry>>,
        expected: usize,
    ) -> Result<()> {
        for label in 0..self.num_classes() {
            let found = classes.get(&label).map_or(0, Vec::len);
            if found < expected {
                let (file, class) = (self.file().to_path_buf(), self.class_name(label));
                return Err(Error::TooFewImages { file, class, expected, found });
            }
        }
        Ok(())
    }
}

/// Returns the images of each class that has any, sorted by path.
pub(super) fn by_class(list: &FileList) -> BTreeMap<i64, Vec<&FileEntry>> {
    let mut classes: BTreeMap<i64, Vec<&FileEntry>> = BTreeMap::new();
    for entry in list.entries() {
        classes.entry(entry.label).or_default().push(entry);
    }
    for images in classes.values_mut() {
        images.sort_by(|a, b| (&a.path, a.line).cmp(&(&b.path, b.line)));
    }
    classes
}

/// Creates the random generator of a class. Draws with different purposes have nothing in common.
pub(super) fn generator(purpose: &[u8; 8], seed: i64, label: i64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&label.to_le_bytes());
    key[24..].copy_from_slice(purpose);
    ChaCha8Rng::from_seed(key)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Creates a list of 20 images of class 0, 30 of class 1 and 1 of class 3, sorted by `key`.
    fn list(key: impl Fn(&(String, i64)) -> u64) -> FileList {
        let counts = [(20, 0), (30, 1), (1, 3)];
        let mut images: Vec<_> = counts
            .iter()
            .flat_map(|&(count, label)| {
                (0..count).map(move |i| (format!("{label}/{i}.png"), label))
            })
            .collect();
        images.sort_by_key(key);
        let text: String = images.iter().map(|(path, label)| format!("{path} {label}\n")).collect();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("list.txt");
        std::fs::write(&file, text).unwrap();
        FileList::read(folder.path(), file, None).unwrap()
    }

    fn paths(list: &FileList) -> Vec<&str> {
        list.entries().iter().map(|entry| entry.path.as_str()).collect()
    }

    #[test]
    fn each_class_gives_as_many_and_the_order_of_the_list_does_not_matter() {
        let plain = list(|_| 0);
        let mixed =
            list(|(path, _)| path.bytes().fold(7, |h: u64, b| h.wrapping_mul(31) ^ u64::from(b)));
        assert_ne!(paths(&plain), paths(&mixed));
        for per_class in [1, 2, 4, 8, 16] {
            let few = plain.few_shot_at_most(per_class, 5).unwrap();
            assert_eq!(paths(&few), paths(&mixed.few_shot_at_most(per_class, 5).unwrap()));
            let counts: Vec<_> = (0..4)
                .map(|label| few.entries().iter().filter(|e| e.label == label).count())
                .collect();
            assert_eq!(counts, [per_class, per_class, 0, 1]);
            assert_eq!(few.num_classes(), 4);
            let distinct: BTreeSet<_> = paths(&few).into_iter().collect();
            assert_eq!(distinct.len(), few.entries().len());
        }
        let few = plain.few_shot_at_most(2, 5).unwrap();
        // The values are fixed here so that a new version of a dependency cannot change runs
        // unnoticed.
        assert_eq!(paths(&few), ["0/14.png", "0/9.png", "1/20.png", "1/3.png", "3/0.png"]);
    }

    #[test]
    fn more_images_contain_the_fewer_and_seeds_differ() {
        let list = list(|_| 0);
        let draw = |per_class, seed| list.few_shot_at_most(per_class, seed).unwrap();
        let of =
            |list: &FileList| paths(list).into_iter().map(str::to_owned).collect::<BTreeSet<_>>();
        assert!(of(&draw(4, 0)).is_subset(&of(&draw(8, 0))));
        assert_ne!(of(&draw(4, 0)), of(&draw(4, 1)));
        // Over many seeds, all images are drawn equally often.
        let mut counts = [0; 20];
        for seed in 0..2000 {
            for entry in draw(4, seed).entries().iter().filter(|entry| entry.label == 0) {
                counts[entry.path[2..].trim_end_matches(".png").parse::<usize>().unwrap()] += 1;
            }
        }
        assert!(counts.iter().all(|&count: &i32| count.abs_diff(400) < 100), "{counts:?}");
    }

    #[test]
    fn a_class_with_too_few_images_is_named() {
        let list = list(|_| 0);
        let refusal = |list: &FileList, per_class| match list.few_shot(per_class, 0) {
            Err(Error::TooFewImages { class, expected, found, file }) => {
                assert!(file.ends_with("list.txt"));
                (class, expected, found)
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(refusal(&list, 1), ("2".into(), 1, 0));
        assert_eq!(refusal(&list, 25), ("0".into(), 25, 20));
        let names = ["a", "b", "c", "d"].map(str::to_owned).to_vec();
        assert_eq!(refusal(&list.clone().with_class_names(names).unwrap(), 1), ("c".into(), 1, 0));
        assert!(matches!(list.few_shot_at_most(0, 0), Err(Error::Config { .. })));
        assert!(matches!(list.few_shot(0, 0), Err(Error::Config { .. })));
    }
}
