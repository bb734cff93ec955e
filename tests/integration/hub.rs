//! Checkpoints of the Hugging Face hub: fetched from a server on loopback that speaks its protocol, and
//! found in a cache laid out as the Python library lays it out.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Output;
use std::sync::{Arc, Mutex};

use convpass::{AnyBackbone, Backbone, Error};
use sha2::{Digest, Sha256};
use tch::Device;

use crate::child;
use crate::golden::fixtures;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server has, and what it was asked.
#[derive(Default)]
struct Hub {
    files: BTreeMap<String, Vec<u8>>,
    /// Digests that differ from those of the files.
    wrong_digest: bool,
    /// How many bodies of a file are still to be cut off in the middle.
    cuts: Mutex<usize>,
    asked: Mutex<Vec<String>>,
}

impl Hub {
    fn new(files: &[(&str, &[u8])]) -> Hub {
        let files = files.iter().map(|(name, data)| ((*name).to_owned(), data.to_vec()));
        Hub { files: files.collect(), ..Hub::default() }
    }

    /// Serves in the background and returns the server's address.
    fn serve(self) -> (Arc<Hub>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let hub = Arc::new(self);
        let served = hub.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                served.answer(stream);
            }
        });
        (hub, address)
    }

    fn answer(&self, stream: TcpStream) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
        let Some(first) = lines.next() else { return };
        let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
        let header = |name: &str| {
            let line = headers.iter().find(|line| line.to_lowercase().starts_with(name));
            line.and_then(|line| line.split_once(": ")).map(|(_, value)| value.to_owned())
        };
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        let range = header("range");
        let token = header("authorization").unwrap_or_default();
        let said = format!("{path} {} {token}", range.as_deref().unwrap_or("-"));
        self.asked.lock().unwrap().push(said.trim().to_owned());
        self.respond(stream, &path, range.as_deref());
    }

    fn respond(&self, mut stream: TcpStream, path: &str, range: Option<&str>) {
        let mut send = |status: &str, headers: &str, body: &[u8]| {
            let head = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n", body.len());
            let _ = stream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes());
            let mut cuts = self.cuts.lock().unwrap();
            let is_cut = *cuts > 0 && body.len() > 1000;
            *cuts -= usize::from(is_cut);
            let sent = if is_cut { body.len() / 2 } else { body.len() };
            let _ = stream.write_all(&body[..sent]);
        };
        let api = ["main", "v1", COMMIT].map(|name| format!("/api/models/o/n/revision/{name}"));
        if api.iter().any(|known| known == path) {
            let names = self.files.keys().map(|name| serde_json::json!({ "rfilename": name }));
            let info = serde_json::json!({"sha": COMMIT, "siblings": names.collect::<Vec<_>>()});
            return send(
                "200 OK",
                "Content-Type: application/json\r\n",
                info.to_string().as_bytes(),
            );
        }
        let name = path.strip_prefix(&format!("/o/n/resolve/{COMMIT}/")).unwrap_or_default();
        let Some(data) = self.files.get(name) else {
            return send("404 Not Found", "", b"");
        };
        let digest = if self.wrong_digest { [0; 32].into() } else { Sha256::digest(data) };
        let bounds = range.and_then(|range| range.strip_prefix("bytes=")).unwrap_or("0-");
        let (from, to) = bounds.split_once('-').unwrap();
        let from: usize = from.parse().unwrap();
        let to = to.parse().map_or(data.len(), |to: usize| to + 1);
        let headers = format!(
            "ETag: \"{digest:x}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {from}-{}/{}\r\n",
            to - 1,
            data.len()
        );
        send("206 Partial Content", &headers, &data[from..to]);
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

const CHECKPOINT: &str = "CONVPASS_TEST_HUB_CHECKPOINT";

/// Opens a checkpoint in a process of its own, whose environment names server and cache.
fn open(checkpoint: &str, home: &Path, variables: &[(&str, &str)]) -> Output {
    let mut command = child::test("hub::opens_the_checkpoint_of_its_environment");
    for name in ["HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "XDG_CACHE_HOME"] {
        command.env_remove(name);
    }
    command
        .env(CHECKPOINT, checkpoint)
        .env("HF_HOME", home)
        .env("HF_ENDPOINT", "http://127.0.0.1:9");
    command.envs(variables.iter().copied()).arg("--nocapture").output().unwrap()
}

#[test]
fn opens_the_checkpoint_of_its_environment() {
    let Ok(checkpoint) = std::env::var(CHECKPOINT) else { return };
    match AnyBackbone::open(checkpoint, Device::Cpu) {
        Ok(backbone) => println!("opened {}.", backbone.digest().unwrap()),
        Err(error @ Error::Hub { .. }) => println!("refused {error}."),
        Err(error) => panic!("{error:?}"),
    }
}

fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let line =
        text.lines().find_map(|line| line.strip_suffix('.').filter(|line| line.contains(' ')));
    line.unwrap_or(&text).to_owned()
}

/// The bytes of a small checkpoint, and what is said of it once it is opened.
fn small_vit() -> (Vec<u8>, String) {
    let file = fixtures().join("timm_vit/class_token/model.safetensors");
    let digest = AnyBackbone::open(&file, Device::Cpu).unwrap().digest().unwrap();
    (std::fs::read(file).unwrap(), format!("opened {digest}"))
}

#[test]
fn a_checkpoint_is_fetched_once_with_the_configs_beside_it() {
    let (weights, opened) = small_vit();
    let home = tempfile::tempdir().unwrap();
    let files: [(&str, &[u8]); 4] = [
        ("README.md", b"# read me"),
        ("model.safetensors", &weights),
        ("preprocessor_config.json", b"{}"),
        ("pytorch_model.bin", b"not asked for"),
    ];
    let (hub, address) = Hub::new(&files).serve();
    let variables = [("HF_ENDPOINT", &*address), ("HF_TOKEN", "hf_secret")];
    assert_eq!(said(&open("hf:o/n", home.path(), &variables)), opened);
    let asked = hub.asked();
    assert!(asked.iter().all(|line| line.ends_with("Bearer hf_secret")), "{asked:?}");
    for (part, expected) in [("README", false), ("pytorch", false), ("preprocessor", true)] {
        assert_eq!(asked.iter().any(|line| line.contains(part)), expected, "{part} in {asked:?}");
    }
    // Again, by the commit, by the file, and without a network: nothing is asked.
    assert_eq!(said(&open("hf:o/n", home.path(), &variables)), opened);
    let named = format!("hf:o/n@{COMMIT}:model.safetensors");
    assert_eq!(said(&open(&named, home.path(), &variables)), opened);
    assert_eq!(said(&open("hf:o/n", home.path(), &[("HF_HUB_OFFLINE", "1")])), opened);
    assert_eq!(hub.asked(), [""; 0]);
    // Another name of the same commit needs its commit alone.
    assert_eq!(said(&open("hf:o/n@v1", home.path(), &variables)), opened);
    assert_eq!(hub.asked().len(), 1);
}

#[test]
fn a_cut_download_is_taken_up_where_it_was_cut_and_never_half_a_file() {
    let (weights, opened) = small_vit();
    let home = tempfile::tempdir().unwrap();
    let cut = |cuts| {
        Hub { cuts: Mutex::new(cuts), ..Hub::new(&[("model.safetensors", &weights)]) }.serve()
    };
    let (_, address) = cut(100);
    let text = said(&open("hf:o/n", home.path(), &[("HF_ENDPOINT", &address)]));
    assert!(text.starts_with("refused hf:o/n: model.safetensors: "), "{text}");
    let snapshot = home.path().join("hub/models--o--n/snapshots").join(COMMIT);
    assert!(!snapshot.join("model.safetensors").exists());
    let (hub, address) = cut(1);
    assert_eq!(said(&open("hf:o/n", home.path(), &[("HF_ENDPOINT", &address)])), opened);
    let asked = hub.asked();
    // A repository without a config is asked about once a process.
    assert_eq!(asked.iter().filter(|line| line.starts_with("/api")).count(), 1, "{asked:?}");
    let resumed = |line: &&String| line.contains("bytes=") && !line.contains("bytes=0-");
    assert!(asked.iter().filter(resumed).count() >= 1, "{asked:?}");
}

#[test]
fn what_is_wrong_is_said() {
    let (weights, _) = small_vit();
    let home = tempfile::tempdir().unwrap();
    let wrong = Hub { wrong_digest: true, ..Hub::new(&[("model.safetensors", &weights)]) };
    let (_, wrong) = wrong.serve();
    let (_, none) = Hub::new(&[("README.md", b"")]).serve();
    let several: [(&str, &[u8]); 2] = [("a.pth", b"x"), ("b.pth", b"y")];
    let (_, several) = Hub::new(&several).serve();
    for (name, endpoint, part) in [
        ("hf:o/n", &*wrong, "expected the SHA-256 0000"),
        ("hf:o/n", &none, "no checkpoint; it has README.md"),
        ("hf:o/n", &several, "several checkpoints; add :FILE to choose of a.pth, b.pth"),
        ("hf:o/other", &none, "does not exist, or it is private"),
        ("hf:o/n", "http://127.0.0.1:9", "refused hf:o/n: "),
        ("hf:o", &none, "expected hf:OWNER/NAME"),
    ] {
        let text = said(&open(name, home.path(), &[("HF_ENDPOINT", endpoint)]));
        assert!(text.starts_with("refused") && text.contains(part), "{name}: {text}");
    }
    let text = said(&open("hf:o/n", home.path(), &[("HF_HUB_OFFLINE", "1")]));
    assert!(text.contains("HF_HUB_OFFLINE is set") && text.contains("hub"), "{text}");
}

/// `blobs` hold the files, `snapshots/COMMIT` links to them, `refs/main` names the commit.
#[cfg(unix)]
#[test]
fn a_cache_of_the_python_library_is_read_without_a_network() {
    let (weights, opened) = small_vit();
    let home = tempfile::tempdir().unwrap();
    let repo = home.path().join("hub/models--o--n");
    let snapshot = repo.join("snapshots").join(COMMIT);
    for folder in [&snapshot, &repo.join("blobs"), &repo.join("refs")] {
        std::fs::create_dir_all(folder).unwrap();
    }
    std::fs::write(repo.join("blobs/abc"), &weights).unwrap();
    std::fs::write(repo.join("refs/main"), COMMIT).unwrap();
    std::os::unix::fs::symlink("../../blobs/abc", snapshot.join("model.safetensors")).unwrap();
    for name in ["hf:o/n", "hf:o/n@main:model.safetensors", &format!("hf:o/n@{COMMIT}")] {
        let output = open(name, home.path(), &[("HF_HUB_OFFLINE", "yes")]);
        assert_eq!(said(&output), opened, "{name}");
    }
    let cache = home.path().join("hub").to_str().unwrap().to_owned();
    let elsewhere = tempfile::tempdir().unwrap();
    let variables = [("HF_HUB_CACHE", &*cache), ("HF_HUB_OFFLINE", "1")];
    assert_eq!(said(&open("hf:o/n", elsewhere.path(), &variables)), opened);
}
