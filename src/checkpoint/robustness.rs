//! Tests with golden values of every container, and with files that are cut off, damaged or
//! malicious.

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use zip::write::SimpleFileOptions;

use super::entry::numel;
use super::tensor_file::{read_index, read_tensor};
use super::{Container, TensorFile};
use crate::error::{Error, Result};
use crate::ffi::alloc_probe::largest_allocation;

const GOOD: [(&str, Container); 7] = [
    ("plain.safetensors", Container::Safetensors),
    ("stored.npz", Container::Npz),
    ("deflated.npz", Container::Npz),
    ("top.pt", Container::Torch),
    ("nested.pt", Container::Torch),
    ("expanded.pt", Container::Torch),
    ("old.pt", Container::TorchLegacy),
];

fn fixture(name: &str) -> PathBuf {
    let folder = "tests/integration/fixtures/containers";
    Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join(name)
}

#[derive(serde::Deserialize)]
struct Golden {
    shape: Vec<i64>,
    values: Vec<f32>,
}

#[test]
fn every_container_gives_the_golden_values() {
    let golden = std::fs::read(fixture("golden.json")).unwrap();
    let golden: BTreeMap<String, BTreeMap<String, Golden>> =
        serde_json::from_slice(&golden).unwrap();
    for (file, container) in GOOD {
        let opened = TensorFile::open(fixture(file)).unwrap();
        assert_eq!(opened.container(), container);
        assert!(opened.names().is_sorted());
        for (name, expected) in &golden[file] {
            assert_eq!(opened.shape(name), Some(expected.shape.as_slice()), "{file} {name}");
            let tensor = opened.tensor(name).unwrap();
            assert_eq!(tensor.size(), expected.shape, "{file} {name}");
            assert!(tensor.is_contiguous() && tensor.kind() == tch::Kind::Float);
            let values = Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap();
            assert_eq!(values, expected.values, "{file} {name}");
        }
        if !["nested.pt", "expanded.pt", "old.pt"].contains(&file) {
            assert!(matches!(opened.tensor("ints"), Err(Error::ElementType { .. })), "{file}");
        }
        assert!(matches!(opened.tensor("none"), Err(Error::Input { argument: "name", .. })));
    }
    let opened = TensorFile::open(fixture("plain.safetensors")).unwrap();
    assert_eq!(opened.metadata()["made_by"], "make.py");
}

#[test]
fn what_is_no_container_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let open = |bytes: &[u8]| {
        let path = folder.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        TensorFile::open(path)
    };
    for (bytes, word) in [
        (&b""[..], "empty"),
        (b"some text\n", "neither"),
        (b"\x89HDF\r\n\x1a\n\0\0", "HDF5"),
        (b"\x93NUMPY\x01\x00", ".npy"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"\x80\x02}q\x00.", "plain pickle"),
        (b"{\"model_type\": \"vit\"}", "JSON"),
        (&zipped(&[("readme.txt", b"text")]), "zip"),
    ] {
        let error = open(bytes).unwrap_err();
        assert!(matches!(error, Error::UnknownFormat { .. }), "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    assert!(matches!(TensorFile::open(folder.path().join("missing")), Err(Error::Io { .. })));
    // Opening a folder looks for the checkpoint in it; this folder has none.
    let error = TensorFile::open(folder.path()).unwrap_err();
    assert!(matches!(error, Error::UnknownFormat { .. }), "{error}");
    let code = TensorFile::open(fixture("code.pt")).unwrap_err();
    assert!(matches!(&code, Error::PickleGlobal { global, .. } if global.contains("ReLU")));
    for (file, word) in [("script.pt", "TorchScript"), ("too_expanded.pt", "[4000, 4000]")] {
        let error = TensorFile::open(fixture(file)).unwrap_err();
        assert!(matches!(&error, Error::CorruptFile { reason, .. } if reason.contains(word)));
    }
}

/// Reads every tensor, and checks that no allocation is larger than the size of the file justifies.
fn read_all(bytes: &[u8]) -> Result<usize> {
    let (path, bytes) = (Path::new("memory"), &bytes.to_vec());
    let (largest, count) = largest_allocation(|| -> Result<usize> {
        let (_, index) = read_index(path, bytes)?;
        let mut count = 0;
        for (name, entry) in &index.entries {
            if let Ok((tensor, _)) = read_tensor(path, bytes, &index, name) {
                assert_eq!(tensor.size(), entry.shape);
                assert!(numel(&entry.shape).unwrap() <= 1032 * bytes.len());
                count += 1;
            }
        }
        Ok(count)
    });
    // The tables of the zip and pickle readers start at a few hundred kilobytes at most.
    assert!(largest <= 1032 * bytes.len() + (1 << 18), "{largest} for {}", bytes.len());
    count
}

#[test]
fn every_prefix_of_a_file_is_read_or_refused() {
    for (file, _) in GOOD {
        let bytes = std::fs::read(fixture(file)).unwrap();
        for len in 0..bytes.len() {
            assert!(read_all(&bytes[..len]).is_err(), "{file} cut to {len}");
        }
    }
}

#[test]
fn damaged_files_are_read_or_refused() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (file, _) in GOOD {
        let bytes = std::fs::read(fixture(file)).unwrap();
        let mut refused = 0;
        for _ in 0..3000 {
            let mut damaged = bytes.clone();
            for _ in 0..rng.random_range(1..=4) {
                let at = rng.random_range(0..damaged.len());
                damaged[at] = match rng.random_range(0..3) {
                    0 => rng.random(),
                    1 => damaged[at] ^ (1 << rng.random_range(0..8)),
                    _ => *[0, 0x7f, 0x80, 0xff, b'9'].get(rng.random_range(0..5)).unwrap(),
                };
            }
            refused += usize::from(read_all(&damaged).is_err());
        }
        assert!(refused > 0, "{file}");
    }
}

/// Returns a zip archive of entries that are not compressed.
fn zipped(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for &(name, content) in entries {
        let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::STORE);
        zip.start_file(name, stored).unwrap();
        zip.write_all(content).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn safetensors(header: &str, stated: u64, data: &[u8]) -> Vec<u8> {
    [&stated.to_le_bytes(), header.as_bytes(), data].concat()
}

fn npy(shape: &str, data: &[u8]) -> Vec<u8> {
    let text = format!("{{'descr': '<f4', 'fortran_order': True, 'shape': {shape}, }}\n");
    [b"\x93NUMPY\x01\x00", &(text.len() as u16).to_le_bytes()[..], text.as_bytes(), data].concat()
}

#[test]
fn files_that_claim_more_than_they_hold_are_refused() {
    let tensor = |shape: &str, end: u64| {
        let header =
            format!(r#"{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#);
        safetensors(&header, header.len() as u64, &[0; 4])
    };
    assert_eq!(read_all(&tensor("[1]", 4)).unwrap(), 1);
    let mut files = vec![
        tensor("[4611686018427387904]", 4),
        tensor("[4611686018427387904,4611686018427387904]", 4),
        tensor("[0,18446744073709551615]", 0),
        tensor("[1]", 1 << 62),
        safetensors("{\"x\":1}", 1 << 60, &[]),
        safetensors("{}", u64::MAX, &[]),
    ];
    assert_eq!(read_all(&zipped(&[("x.npy", &npy("(1,)", &[0; 4]))])).unwrap(), 1);
    for shape in [
        "(4611686018427387904,)",
        "(4294967296, 4294967296, 4294967296)",
        "(0, 9223372036854775807, 2)",
        "(2,)",
        "(0,)",
    ] {
        files.push(zipped(&[("x.npy", &npy(shape, &[0; 4]))]));
    }
    // Deflated entries that claim gigabytes.
    let deflated = std::fs::read(fixture("deflated.npz")).unwrap();
    files.push(claim(&deflated, u32::MAX - 1));
    files.push(claim(&deflated, 1 << 30));
    for (index, file) in files.iter().enumerate() {
        let (largest, result) = largest_allocation(|| read_all(file));
        assert!(matches!(result, Err(Error::CorruptFile { .. })), "{index}: {result:?}");
        assert!(largest < 1 << 20, "{index}: {largest}");
    }
}

/// Returns the archive with `size` as the inflated size of each entry in its central directory.
fn claim(zip: &[u8], size: u32) -> Vec<u8> {
    let mut zip = zip.to_vec();
    let heads: Vec<_> = (0..zip.len()).filter(|&at| zip[at..].starts_with(b"PK\x01\x02")).collect();
    assert!(!heads.is_empty());
    for at in heads {
        zip[at + 24..at + 28].copy_from_slice(&size.to_le_bytes());
    }
    zip
}

/// The offsets are possible by themselves, but the place of the last one in a file is not.
#[test]
fn a_safetensors_header_whose_offsets_overflow_is_refused() {
    let size = (1u64 << 61) - 1;
    let tensor = |number: u64| {
        let (start, end) = (number * size, (number + 1) * size);
        format!(r#""{number}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{end}]}}"#)
    };
    let header = format!("{{{}}}", (0..8).map(tensor).collect::<Vec<_>>().join(","));
    let file = safetensors(&header, header.len() as u64, &[0; 4]);
    assert!(matches!(read_all(&file), Err(Error::CorruptFile { .. })));
}

#[test]
fn entries_that_overlap_are_refused() {
    let mut zip = zipped(&[("a.npy", &npy("(1,)", &[0; 4])), ("b.npy", &npy("(1,)", &[0; 4]))]);
    let second = (0..zip.len()).rfind(|&at| zip[at..].starts_with(b"PK\x01\x02")).unwrap();
    zip[second + 42..second + 46].copy_from_slice(&[0; 4]);
    assert!(read_all(&zip).is_err());
}

#[test]
fn a_checksum_that_does_not_match_is_told() {
    let mut zip = zipped(&[("x.npy", &npy("(1,)", b"abcd"))]);
    let at = zip.windows(4).position(|w| w == b"abcd").unwrap();
    zip[at] ^= 1;
    let path = Path::new("memory");
    let (_, index) = read_index(path, &zip).unwrap();
    let error = read_tensor(path, &zip, &index, "x").map(drop).unwrap_err();
    assert!(matches!(&error, Error::CorruptFile { reason, .. } if reason.contains("checksum")));
}
