//! The house rule that no lint of Cargo.toml checks: imports run one way.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::root;

/// Each layer may import those before it. `data` stands aside and sees only `error` and
/// `preprocessing`; anyone may use `contain`, `ffi` and `files`.
const ORDER: [&str; 14] = [
    "error",
    "distributed",
    "preprocessing",
    "nn",
    "seam",
    "backbone",
    "petl",
    "checkpoint",
    "clip",
    "model",
    "export",
    "eval",
    "train",
    "testing",
];

fn may_import(layer: &str, imported: &str) -> bool {
    let place = |name| ORDER.iter().position(|l| *l == name);
    match (layer, imported) {
        _ if layer == imported => true,
        (_, "contain" | "ffi" | "files") => true,
        ("contain" | "ffi" | "files", _) => imported == "error",
        ("data", _) => ["error", "preprocessing"].contains(&imported),
        // `eval` and what follows are fed by it.
        (_, "data") => place(layer) >= place("eval"),
        _ => matches!((place(layer), place(imported)), (Some(a), Some(b)) if b < a),
    }
}

/// Every Rust file below `src`, with the name of its layer: the first folder, or the file at the top.
fn sources() -> Vec<(String, PathBuf)> {
    fn visit(dir: &Path, out: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("src can be listed") {
            let path = entry.expect("src can be listed").path();
            if path.is_dir() {
                visit(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push(path);
            }
        }
    }
    let src = root().join("src");
    let mut files = Vec::new();
    visit(&src, &mut files);
    files
        .into_iter()
        .map(|file| {
            let inside = file.strip_prefix(&src).expect("below src");
            let first = inside.iter().next().expect("a file name").to_string_lossy();
            (first.trim_end_matches(".rs").to_string(), file)
        })
        .filter(|(layer, _)| layer != "lib")
        .collect()
}

/// The code of a file: without comments, and without the tests at its end, which may import what they like.
fn code(text: &str) -> String {
    let shipped = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    shipped
        .lines()
        .map(|l| l.split("//").next().unwrap_or_default())
        .fold(String::new(), |all, l| all + l + "\n")
}

/// The first path segment after each `crate::`, with `crate::{a, b::c}` taken apart.
fn imports(code: &str) -> Vec<String> {
    let ident =
        |s: &str| s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = Vec::new();
    for (at, key) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[at + key.len()..];
        match rest.strip_prefix('{') {
            Some(group) => {
                found.extend(top_level(group).into_iter().map(|item| ident(item.trim())))
            }
            None => found.push(ident(rest)),
        }
    }
    found
}

/// The items of a brace group, whose opening brace is already taken; inner groups stay with their item.
fn top_level(group: &str) -> Vec<&str> {
    let (mut depth, mut start, mut items) = (0usize, 0, Vec::new());
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                items.push(&group[start..i]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                items.push(&group[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    items.retain(|item| !item.trim().is_empty());
    items
}

#[test]
fn imports_run_one_way() {
    let mut wrong = Vec::new();
    for (layer, file) in sources() {
        let code = code(&fs::read_to_string(&file).expect("a source file"));
        for imported in imports(&code) {
            // A capital or an unknown name is a root re-export: name its module, so that this test can see it.
            if !may_import(&layer, &imported) {
                wrong.push(format!("{}: `{layer}` imports crate::{imported}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "imports that run upward:\n{}", wrong.join("\n"));
}

#[test]
fn the_reader_sees_every_form_of_import() {
    let text = "use crate::nn::norm;\nuse crate::{error::{Error, Result}, seam::Seam};\nlet x = crate::petl::f();\n\
                use tch::nn; // crate::train::x\n#[cfg(test)]\nmod tests { use crate::report::X; }\n";
    assert_eq!(imports(&code(text)), ["nn", "error", "seam", "petl"]);
    assert!(
        may_import("train", "data") && may_import("nn", "ffi") && may_import("petl", "backbone")
    );
    assert!(
        !may_import("backbone", "petl") && !may_import("data", "nn") && !may_import("nn", "data")
    );
    assert!(!may_import("model", "Error"), "a root re-export hides the layer");
}
