//! Decodes images on threads, a bounded number of images ahead of their use.

use std::io::{self, BufRead, Read};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use convpass::data::{Resize, is_image_file};
use walkdir::WalkDir;

use crate::failure::chain_of;

/// The most bytes of a line of a list. A longer line cannot be a path.
const MAX_LINE: u64 = 64 << 10;

/// The path of an image, and its pixels row by row or the reason why it cannot be read.
pub type Decoded = (PathBuf, Result<Vec<u8>, String>);

/// Decodes and resizes the images of `arguments` on `threads` threads, and returns them in order.
/// At most `ahead` images are decoded before they are used, so that memory does not depend on the
/// number of images. The threads end when the iterator is dropped.
pub fn decode_ahead(
    arguments: Vec<PathBuf>,
    resize: Resize,
    threads: NonZeroUsize,
    ahead: usize,
) -> io::Result<impl Iterator<Item = Decoded>> {
    type Pixels = Result<Vec<u8>, String>;
    // `places` keeps the order: each image has a receiver there. `jobs` hands each image with the
    // matching sender to the decoding threads.
    let (places, in_order) = sync_channel::<(PathBuf, Receiver<Pixels>)>(ahead);
    let (jobs, to_decode) = sync_channel::<(PathBuf, Sender<Pixels>)>(ahead);
    let to_decode = Arc::new(Mutex::new(to_decode));
    for _ in 0..threads.get().min(ahead) {
        let to_decode = to_decode.clone();
        thread::Builder::new().name("decode".into()).spawn(move || {
            loop {
                let job = to_decode.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok((path, place)) = job else { break };
                // If the iterator was dropped, nobody receives the result.
                let _sent = place.send(decode(&path, resize));
            }
        })?;
    }
    thread::Builder::new().name("list".into()).spawn(move || {
        let mut hand_out = |image: Result<PathBuf, (PathBuf, String)>| {
            let (sender, receiver) = channel();
            match image {
                Ok(path) => {
                    let placed = places.send((path.clone(), receiver)).is_ok();
                    placed && jobs.send((path, sender)).is_ok()
                }
                Err((path, reason)) => {
                    let _sent = sender.send(Err(reason));
                    places.send((path, receiver)).is_ok()
                }
            }
        };
        for argument in arguments {
            if !list(&argument, &mut hand_out) {
                break;
            }
        }
    })?;
    Ok(in_order.into_iter().map(|(path, pixels)| {
        let decoded = pixels.recv().unwrap_or_else(|_| {
            Err(format!("{}: its decoding thread ended without a result", path.display()))
        });
        (path, decoded)
    }))
}

fn decode(path: &Path, resize: Resize) -> Result<Vec<u8>, String> {
    let image = resize.read(path).map_err(|error| match error {
        // This error does not name the file.
        convpass::Error::Input { .. } => format!("{}: {}", path.display(), chain_of(error)),
        error => chain_of(error),
    })?;
    Ok(image.into_raw_vec_and_offset().0)
}

/// Calls `hand_out` with each image of an argument: a file, the images below a folder, or the paths
/// on standard input for `-`. Returns `false` as soon as `hand_out` does.
fn list(
    argument: &Path,
    hand_out: &mut impl FnMut(Result<PathBuf, (PathBuf, String)>) -> bool,
) -> bool {
    if argument == Path::new("-") {
        return list_stdin(hand_out);
    }
    if !argument.is_dir() {
        return hand_out(Ok(argument.to_owned()));
    }
    let mut is_empty = true;
    // Only the names of one folder are held and sorted at a time. A link to a folder above is an
    // error, not a loop.
    for entry in WalkDir::new(argument).follow_links(true).sort_by_file_name() {
        let image = match entry {
            Ok(entry) if entry.file_type().is_dir() || !is_image_file(entry.path()) => continue,
            Ok(entry) => Ok(entry.into_path()),
            Err(error) => {
                let path = error.path().unwrap_or(argument).to_owned();
                Err((path, error.to_string()))
            }
        };
        is_empty = false;
        if !hand_out(image) {
            return false;
        }
    }
    if is_empty {
        let reason = format!("{}: no image below this folder", argument.display());
        return hand_out(Err((argument.to_owned(), reason)));
    }
    true
}

/// Calls `hand_out` with the path on each line of standard input.
fn list_stdin(hand_out: &mut impl FnMut(Result<PathBuf, (PathBuf, String)>) -> bool) -> bool {
    let (mut input, mut line) = (io::stdin().lock(), Vec::new());
    loop {
        line.clear();
        let refuse =
            |reason: String| Err((PathBuf::from("-"), format!("standard input: {reason}")));
        match input.by_ref().take(MAX_LINE + 1).read_until(b'\n', &mut line) {
            Ok(0) => return true,
            Ok(length) if length as u64 > MAX_LINE => {
                hand_out(refuse(format!("a line of more than {MAX_LINE} bytes")));
                return false;
            }
            Ok(_) => {}
            Err(error) => {
                hand_out(refuse(error.to_string()));
                return false;
            }
        }
        while line.last().is_some_and(|end| matches!(end, b'\n' | b'\r')) {
            line.pop();
        }
        if !line.is_empty() && !hand_out(Ok(path(&line))) {
            return false;
        }
    }
}

/// Returns the path of a line. On Unix any bytes are a path.
#[cfg(unix)]
fn path(bytes: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

#[cfg(not(unix))]
fn path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(String::from_utf8_lossy(bytes).into_owned())
}
