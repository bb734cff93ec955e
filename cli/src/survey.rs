//! Looks at all images of a run before it starts, and prints what is odd about them.

use std::collections::HashSet;
use std::num::NonZeroUsize;

use anyhow::{Result, bail};
use convpass::data::vtab::{VtabFolder, VtabSplit};
use convpass::data::{FileEntry, FileList, LeftOut, Survey, SurveyDepth, overlap};

use crate::failure::chain_of_ref;
use crate::flags::{SurveyFlags, ThreadFlags};
use crate::processes::is_quiet;

/// The most lines that a warning has one for each image.
const SHOWN: usize = 10;

/// Prints a line for each warning and for each file that is left out.
pub fn say(warnings: &[String], left_out: &[LeftOut]) {
    if is_quiet() {
        return;
    }
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    for LeftOut { path, reason, .. } in left_out {
        eprintln!("left out: {}: {reason}", path.display());
    }
}

/// Looks at the images of `lists`, and returns the lists without the images that cannot be read and
/// how many these are. Each of them is named once, also if several lists have it.
///
/// # Errors
/// If an image cannot be read and `--skip-unreadable` is not given.
pub fn readable(
    lists: Vec<FileList>,
    flags: SurveyFlags,
    threads: ThreadFlags,
) -> Result<(Vec<FileList>, usize)> {
    let depth = if flags.verify_images { SurveyDepth::Pixels } else { SurveyDepth::Headers };
    let threads = threads.threads.map_or_else(std::thread::available_parallelism, Ok);
    let threads = threads.unwrap_or(NonZeroUsize::MIN);
    let (mut images, mut named) = (HashSet::new(), HashSet::new());
    let mut surveys = Vec::new();
    for list in &lists {
        let path = |entry: &FileEntry| list.root().join(&entry.path);
        images.extend(list.entries().iter().map(path));
        let survey = Survey::of(list, depth, threads)?;
        for image in &survey.unreadable {
            let is_new = named.insert(path(&list.entries()[image.index]));
            if is_new && !is_quiet() {
                eprintln!("unreadable: {}", chain_of_ref(&image.error));
            }
        }
        surveys.push(survey);
    }
    let (count, images) = (named.len(), images.len());
    let of_file = lists.iter().find(|list| list.entries().iter().any(|e| e.line > 0));
    if let (true, Some(list)) = (count == images, of_file) {
        let (file, root) = (list.file().display(), list.root().display());
        bail!("{file}: none of its {count} images can be read; its paths are relative to {root}");
    }
    if count == 0 {
        return Ok((lists, 0));
    }
    if !flags.skip_unreadable {
        bail!(
            "{count} of {images} images cannot be read; repair or remove them, or go on without \
             them with --skip-unreadable"
        );
    }
    if !is_quiet() {
        eprintln!("skipped {count} of {images} images");
    }
    let rest = lists.iter().zip(&surveys).map(|(list, survey)| match survey.unreadable[..] {
        [] => Ok(list.clone()),
        _ => list.without_unreadable(survey),
    });
    Ok((rest.collect::<Result<_, _>>()?, count))
}

/// Does the same as [`readable`] for the lists of a run, of which the first is that of the training
/// images.
///
/// # Errors
/// The errors of [`readable`]; if no training image of a class can be read.
pub fn readable_parts(
    lists: [Option<FileList>; 3],
    flags: SurveyFlags,
    threads: ThreadFlags,
) -> Result<([Option<FileList>; 3], usize)> {
    let (found, count) = readable(lists.iter().flatten().cloned().collect(), flags, threads)?;
    let mut found = found.into_iter();
    let [train, val, test] = lists.map(|list| Some((list?, found.next()?)));
    if let Some((before, now)) = &train {
        has_all_classes(before, now)?;
    }
    Ok(([train, val, test].map(|list| Some(list?.1)), count))
}

/// Prints what is odd about the sets of a command, and does the same as [`readable`] for them.
///
/// # Errors
/// The errors of [`readable`].
pub fn readable_sets<'a>(
    lists: impl Iterator<Item = &'a FileList>,
    flags: SurveyFlags,
    threads: ThreadFlags,
) -> Result<(Vec<FileList>, usize)> {
    let lists: Vec<FileList> = lists.cloned().collect();
    for list in &lists {
        say(list.warnings(), list.left_out());
    }
    readable(lists, flags, threads)
}

/// Does the same as [`readable`] for the four lists of each task, and warns of test images that are
/// training images too.
///
/// # Errors
/// The errors of [`readable_parts`].
pub fn readable_tasks(
    tasks: Vec<VtabFolder>,
    flags: SurveyFlags,
    threads: ThreadFlags,
) -> Result<(Vec<VtabFolder>, usize)> {
    let lists = tasks.iter().flat_map(|task| VtabSplit::ALL.map(|split| task.split(split).clone()));
    let (lists, count) = readable(lists.collect(), flags, threads)?;
    let mut lists = lists.into_iter();
    let of_task = |task: VtabFolder| {
        let mut found = task.clone();
        for (split, list) in VtabSplit::ALL.into_iter().zip(lists.by_ref()) {
            found = found.with_split(split, list)?;
        }
        for split in [VtabSplit::Train800, VtabSplit::Train800Val200] {
            has_all_classes(task.split(split), found.split(split))?;
        }
        let [train, test] = [VtabSplit::Train800Val200, VtabSplit::Test].map(|s| found.split(s));
        say_overlaps(&[("training", Some(train)), ("test", Some(test))]);
        Ok(found)
    };
    Ok((tasks.into_iter().map(of_task).collect::<Result<_>>()?, count))
}

/// Returns an error if a class that the list `before` has is missing in `now`.
pub fn has_all_classes(before: &FileList, now: &FileList) -> Result<()> {
    let counts = before.class_counts().into_iter().zip(now.class_counts());
    match counts.into_iter().position(|(before, now)| before > 0 && now == 0) {
        Some(label) => {
            bail!("no training image of class {} can be read", before.class_name(label as i64))
        }
        None => Ok(()),
    }
}

/// Prints a warning for each two of the sets that have images with the same bytes.
pub fn say_overlaps(sets: &[(&str, Option<&FileList>)]) {
    for (at, &(second, list)) in sets.iter().enumerate() {
        for &(first, other) in &sets[..at] {
            if let (Some(other), Some(list)) = (other, list) {
                say_overlap((first, other), (second, list));
            }
        }
    }
}

/// Prints a warning if images of two sets have the same bytes.
pub fn say_overlap(first: (&str, &FileList), second: (&str, &FileList)) {
    if is_quiet() {
        return;
    }
    let found = overlap(first.1, second.1);
    if found.is_empty() {
        return;
    }
    let (count, first, second) = (found.len(), first.0, second.0);
    eprintln!("warning: {count} {second} images are {first} images too:");
    for pair in found.iter().take(SHOWN) {
        eprintln!("  {} = {}", pair.second.display(), pair.first.display());
    }
    if count > SHOWN {
        eprintln!("  and {} more", count - SHOWN);
    }
}
