//! Looks at all images of a run before it starts, and prints what is odd about them.

use std::num::NonZeroUsize;

use anyhow::{Result, bail};
use convpass::data::{FileList, LeftOut, Survey, SurveyDepth, overlap};

use crate::failure::chain_of;
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
/// how many these are. Each of them is named. The first list is that of the training images.
///
/// # Errors
/// If an image cannot be read and `--skip-unreadable` is not given, or if no training image of a
/// class can be read.
pub fn readable(
    lists: [Option<FileList>; 3],
    flags: SurveyFlags,
    threads: ThreadFlags,
) -> Result<([Option<FileList>; 3], usize)> {
    let depth = if flags.verify_images { SurveyDepth::Pixels } else { SurveyDepth::Headers };
    let threads = threads.threads.map_or_else(std::thread::available_parallelism, Ok);
    let threads = threads.unwrap_or(NonZeroUsize::MIN);
    let (mut readable, mut named, mut images) = ([const { None }; 3], Vec::new(), 0);
    let before = lists.clone();
    for (list, readable) in lists.into_iter().zip(&mut readable) {
        let Some(list) = list else { continue };
        let survey = Survey::of(&list, depth, threads)?;
        images += survey.images;
        *readable = Some(if survey.unreadable.is_empty() {
            list
        } else if flags.skip_unreadable {
            list.without_unreadable(&survey)?
        } else {
            list
        });
        named.extend(survey.unreadable.into_iter().map(|image| chain_of(image.error)));
    }
    let count = named.len();
    for reason in named.iter().filter(|_| !is_quiet()) {
        eprintln!("unreadable: {reason}");
    }
    let list = before[0].as_ref().filter(|list| list.entries().iter().any(|e| e.line > 0));
    if let (true, Some(list)) = (count == images, list) {
        let (file, root) = (list.file().display(), list.root().display());
        bail!("{file}: none of its {count} images can be read; its paths are relative to {root}");
    }
    if count > 0 && !flags.skip_unreadable {
        bail!(
            "{count} of {images} images cannot be read; repair or remove them, or go on without \
             them with --skip-unreadable"
        );
    }
    if count > 0 && !is_quiet() {
        eprintln!("skipped {count} of {images} images");
    }
    if let ([Some(before), ..], [Some(train), ..]) = (&before, &readable) {
        let counts = before.class_counts().into_iter().zip(train.class_counts());
        let lost = counts.into_iter().position(|(before, now)| before > 0 && now == 0);
        if let Some(label) = lost {
            bail!("no training image of class {} can be read", before.class_name(label as i64));
        }
    }
    Ok((readable, count))
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
