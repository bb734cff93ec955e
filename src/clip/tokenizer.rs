//! CLIP's byte-level BPE over the crate `tokenizers`.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use serde_json::{Value, json};
use tch::Tensor;
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::error::{Error, Result};

/// The tokens at the start and the end of a text, as OpenAI and Hugging Face write them, and as
/// open_clip does.
const STARTS: [&str; 2] = ["<|startoftext|>", "<start_of_text>"];
const ENDS: [&str; 2] = ["<|endoftext|>", "<end_of_text>"];

/// What stands in the vocabulary at the end of a word.
const WORD_END: &str = "</w>";

/// Merges that CLIP takes from OpenAI's file, which holds more: 49,152 tokens, less the bytes inside
/// and at the end of a word, and the two special tokens.
const MERGES: usize = 49_152 - 256 - 2;

/// OpenAI's file takes 3 MB; what inflates to more than this is another.
const MAX_INFLATED: u64 = 64 << 20;

/// CLIP's tokenizer, of the same ids as Hugging Face's `CLIPTokenizer`.
///
/// It composes Unicode (NFC), makes each run of white space one space, lower-cases, splits into
/// words and merges pairs of bytes. OpenAI's own code also repairs broken Unicode (ftfy) and
/// replaces HTML entities first, which Hugging Face's tokenizer does not and neither does this one.
#[derive(Debug)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    start: i64,
    end: i64,
    vocab_size: i64,
}

impl ClipTokenizer {
    /// Opens a vocabulary in any of the forms that it is kept in, told apart by content:
    ///
    /// | form | files |
    /// |---|---|
    /// | Hugging Face, one file | `tokenizer.json` |
    /// | Hugging Face, two files | `vocab.json` with `merges.txt` beside it |
    /// | OpenAI, open_clip | `bpe_simple_vocab_16e6.txt.gz`, or the same not packed |
    ///
    /// Of a folder the first of these that it holds.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no such file, [`Error::UnknownFormat`] if it is none of them,
    /// [`Error::CorruptFile`] if it is no vocabulary, [`Error::FileField`] if that has no token for
    /// the start or the end of a text.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            let known = ["tokenizer.json", "vocab.json", "bpe_simple_vocab_16e6.txt.gz"];
            let found = known.iter().map(|name| path.join(name)).find(|file| file.exists());
            return Self::open(found.ok_or_else(|| {
                let reason = format!("a folder without any of {}", known.join(", "));
                Error::UnknownFormat { file: path.to_path_buf(), reason }
            })?);
        }
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        if bytes.starts_with(b"{") {
            let corrupt = |e: serde_json::Error| Error::corrupt(path, e.to_string());
            let file: Value = serde_json::from_slice(&bytes).map_err(corrupt)?;
            if file.get("model").is_some_and(Value::is_object) {
                return Self::build(path, &bytes);
            }
            let vocab = serde_json::from_value(file).map_err(corrupt)?;
            let merges = path.with_file_name("merges.txt");
            let text = std::fs::read(&merges).map_err(Error::io(&merges))?;
            return Self::from_parts(path, &vocab, &read_merges(&merges, &text, usize::MAX)?);
        }
        let merges = if bytes.starts_with(b"\x1f\x8b") {
            read_merges(path, &inflate(path, &bytes)?, MERGES)?
        } else {
            read_merges(path, &bytes, MERGES)?
        };
        Self::from_parts(path, &openai_vocab(&merges), &merges)
    }

    /// A tokenizer of CLIP's kind over the vocabulary in `file`.
    fn from_parts(file: &Path, vocab: &Vocab, merges: &[(String, String)]) -> Result<Self> {
        let find = |names: [&'static str; 2], field| {
            let name = names.into_iter().find(|&name| vocab.contains_key(name));
            name.ok_or_else(|| without(file, names, field))
        };
        let (start, end) = (find(STARTS, "start token")?, find(ENDS, "end token")?);
        let text = pipeline(vocab, merges, start, end).to_string();
        Self::build(file, text.as_bytes())
    }

    /// A tokenizer from the JSON of Hugging Face's `tokenizers`, which `file` holds or led to.
    fn build(file: &Path, json: &[u8]) -> Result<Self> {
        let corrupt = |e: tokenizers::Error| Error::corrupt(file, e.to_string());
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(corrupt)?;
        // Both are done here.
        tokenizer.with_truncation(None).map_err(corrupt)?.with_padding(None);
        let find = |names: [&'static str; 2], field| {
            let id = names.into_iter().find_map(|name| tokenizer.token_to_id(name));
            id.map(i64::from).ok_or_else(|| without(file, names, field))
        };
        let (start, end) = (find(STARTS, "start token")?, find(ENDS, "end token")?);
        let highest = tokenizer.get_vocab(true).into_values().max().unwrap_or_default();
        Ok(ClipTokenizer { start, end, vocab_size: i64::from(highest) + 1, tokenizer })
    }

    /// One more than the highest id.
    pub fn vocab_size(&self) -> i64 {
        self.vocab_size
    }

    /// The id of the token at the end of a text.
    pub fn end(&self) -> i64 {
        self.end
    }

    /// The ids of a text, between those of the start and the end. Where the text itself has one of
    /// the two special tokens written out, that is the token, as in Hugging Face's tokenizer.
    ///
    /// # Errors
    /// [`Error::Input`] if the vocabulary has no token for some byte of it.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|e| Error::Input {
            argument: "text",
            expected: "one that the vocabulary covers".to_owned(),
            found: format!("{text:?}: {e}"),
        })?;
        let ids = encoding.get_ids().iter().map(|&id| i64::from(id));
        Ok([self.start].into_iter().chain(ids).chain([self.end]).collect())
    }

    /// The ids of texts, `[B, context_length]` i64 on the CPU. A longer text is cut and keeps the
    /// end token; a shorter one is filled with the end token, as Hugging Face does. (OpenAI and
    /// open_clip fill with 0. Neither is read: see
    /// [`ClipText::features`](crate::backbone::ClipText::features).)
    ///
    /// # Errors
    /// As [`ClipTokenizer::encode`]; [`Error::Config`] for a length below 2.
    pub fn batch<S: AsRef<str>>(&self, texts: &[S], context_length: i64) -> Result<Tensor> {
        let Some(length) = usize::try_from(context_length).ok().filter(|&length| length >= 2)
        else {
            return Err(Error::config("context_length", "2 or more", context_length));
        };
        let mut all = Vec::with_capacity(texts.len().saturating_mul(length));
        for text in texts {
            let mut ids = self.encode(text.as_ref())?;
            if ids.len() > length {
                ids.truncate(length - 1);
            }
            ids.resize(length, self.end);
            all.extend(ids);
        }
        Ok(Tensor::f_from_slice(&all)?.f_view([texts.len() as i64, context_length])?)
    }
}

type Vocab = HashMap<String, u32>;

fn without(file: &Path, names: [&str; 2], field: &str) -> Error {
    Error::FileField {
        file: file.to_path_buf(),
        field: field.to_owned(),
        expected: names.join(" or "),
        found: "none in the vocabulary".to_owned(),
    }
}

/// At most `most` pairs, one a line after a line that tells the version.
fn read_merges(file: &Path, bytes: &[u8], most: usize) -> Result<Vec<(String, String)>> {
    let text = std::str::from_utf8(bytes)
        .map_err(|_| unknown(file, "neither JSON, nor gzip, nor text in UTF-8"))?;
    let mut lines = text.lines().enumerate();
    if !lines.next().is_some_and(|(_, first)| first.contains("#version")) {
        return Err(unknown(file, "its first line tells no #version, as merges of a BPE do"));
    }
    let pair = |(at, line): (usize, &str)| match line.split_once(' ') {
        Some((a, b)) if !a.is_empty() && !b.is_empty() && !b.contains(' ') => {
            Ok((a.to_owned(), b.to_owned()))
        }
        _ => {
            let reason = format!("expected two tokens to merge, found {line:?}");
            Err(Error::ListLine { file: file.to_path_buf(), line: at + 1, reason })
        }
    };
    lines.filter(|(_, line)| !line.is_empty()).take(most).map(pair).collect()
}

fn unknown(file: &Path, reason: &str) -> Error {
    Error::UnknownFormat { file: file.to_path_buf(), reason: reason.to_owned() }
}

fn inflate(file: &Path, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut inflated = Vec::new();
    let mut reader = GzDecoder::new(bytes).take(MAX_INFLATED + 1);
    reader.read_to_end(&mut inflated).map_err(|e| Error::corrupt(file, e.to_string()))?;
    if inflated.len() as u64 > MAX_INFLATED {
        Err(Error::corrupt(file, format!("it inflates to more than {MAX_INFLATED} bytes")))
    } else {
        Ok(inflated)
    }
}

/// CLIP's order: the letters that stand for bytes, the same at the end of a word, what the merges
/// make, the two special tokens.
fn openai_vocab(merges: &[(String, String)]) -> Vocab {
    let mut letters: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    letters.sort_unstable();
    let inside = letters.iter().map(char::to_string);
    let at_end = letters.iter().map(|letter| format!("{letter}{WORD_END}"));
    let merged = merges.iter().map(|(a, b)| format!("{a}{b}"));
    let special = [STARTS[0], ENDS[0]].map(str::to_owned);
    inside.chain(at_end).chain(merged).chain(special).zip(0..).collect()
}

/// What Hugging Face's `CLIPTokenizer` makes of a vocabulary, as its `tokenizer.json` says it.
fn pipeline(vocab: &Vocab, merges: &[(String, String)], start: &str, end: &str) -> Value {
    let words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
    let words = [start, end].map(|token| token.replace('|', r"\|")).join("|") + "|" + words;
    let special = |token: &str| {
        json!({
            "id": vocab[token], "content": token, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false,
        })
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(start), special(end)],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "NFC" },
            { "type": "Replace", "pattern": { "Regex": r"\s+" }, "content": " " },
            { "type": "Lowercase" },
        ] },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": words }, "behavior": "Removed", "invert": true },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        ] },
        "post_processor": null,
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": end, "continuing_subword_prefix": "",
            "end_of_word_suffix": WORD_END, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocab, "merges": merges,
        },
    })
}
