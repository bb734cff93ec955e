//! The program as a process, and what several tests run it on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use convpass::data::bundled::{self, BundledTask};

pub const BACKBONE: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/vit_fashion_mnist.safetensors");

/// A subcommand of the program.
pub fn convpass(subcommand: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_convpass-program"));
    command.arg(subcommand);
    command
}

/// Runs a command. Returns its exit code, and standard output and standard error in one text.
pub fn run(command: &mut Command) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (status.code(), text)
}

/// `finetune` of a linear probe of the bundled digits, with the folder `data` of [`trained`].
pub fn finetune_digits(data: &Path) -> Command {
    let mut command = convpass("finetune");
    command.arg("--data").arg(data).args(["--task", "digits", "--method", "linear_probe"]);
    command.args(["--backbone", BACKBONE, "--normalization", "half", "--epochs", "20"]);
    command.args(["--lr", "1e-1", "--batch-size", "50"]);
    command
}

/// The folder of the bundled digits, with the run of a trained probe in `run`. Tests share it and do
/// not write into it.
pub fn trained() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("trained");
        let _left_over = fs::remove_dir_all(&root);
        fs::create_dir_all(&root).unwrap();
        bundled::write(&root, BundledTask::Digits, 32, 0).unwrap();
        let (status, text) = run(finetune_digits(&root).arg("--out").arg(root.join("run")));
        assert_eq!(status, Some(0), "{text}");
        root
    })
}

/// A folder of its own with a copy of the trained run in `run`, and a link to the digits.
pub fn copy_of_trained() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    fs::create_dir(&run).unwrap();
    for name in ["run.json", "adapter.safetensors"] {
        fs::copy(trained().join("run").join(name), run.join(name)).unwrap();
    }
    std::os::unix::fs::symlink(trained().join("digits"), folder.path().join("digits")).unwrap();
    folder
}

/// Photos of 40 x 30 in a folder for each class, which is lit in another corner; `hue` is the domain.
pub fn photos(folder: &Path, classes: &[&str], each: u32, hue: usize) {
    for class in classes {
        let place = ["east", "north", "south", "west"].iter().position(|name| name == class);
        let (left, top) = ((place.unwrap() % 2) as u32 * 20, (place.unwrap() / 2) as u32 * 15);
        fs::create_dir_all(folder.join(class)).unwrap();
        for i in 0..each {
            let photo = image::RgbImage::from_fn(40, 30, |x, y| {
                let is_lit = (left..left + 20).contains(&x) && (top..top + 15).contains(&y);
                let mut pixel = [((x * 7 + y * 13 + i * 31) % 90) as u8; 3];
                pixel[hue] += if is_lit { 160 } else { 0 };
                image::Rgb(pixel)
            });
            photo.save(folder.join(class).join(format!("{i}.png"))).unwrap();
        }
    }
}
