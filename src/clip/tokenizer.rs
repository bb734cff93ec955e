//! CLIP's byte-level BPE tokenizer, built on the crate `tokenizers`.

use std::collections::HashMap;
use std::fmt::Display;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use serde_json::{Value, json};
use tch::Tensor;
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::contain::contain;
use crate::error::{Error, Result};

/// The token at the start of a text and (in `ENDS`) the token at its end. The first spelling is
/// that of OpenAI and Hugging Face, the second that of open_clip.
const STARTS: [&str; 2] = ["<|startoftext|>", "<start_of_text>"];
const ENDS: [&str; 2] = ["<|endoftext|>", "<end_of_text>"];

/// The suffix that marks the end of a word in the vocabulary.
const WORD_END: &str = "</w>";

/// The number of merges that CLIP uses from OpenAI's file, which contains more. The vocabulary of
/// 49,408 tokens consists of these merges, 256 bytes inside a word, 256 bytes at the end of a word
/// and 2 special tokens.
const MERGES: usize = 49_152 - 256 - 2;

/// The largest accepted size of the decompressed merges. OpenAI's file takes 3 MB.
const MAX_INFLATED: u64 = 64 << 20;

/// CLIP's tokenizer. It returns the same ids as Hugging Face's `CLIPTokenizer`.
///
/// It normalizes Unicode to NFC, replaces each run of white space by one space, converts the text
/// to lower case, splits it into words and merges pairs of bytes. OpenAI's own code first repairs
/// broken Unicode (ftfy) and replaces HTML entities. This tokenizer and Hugging Face's do not.
#[derive(Debug)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    start: i64,
    end: i64,
    vocab_size: i64,
}

impl ClipTokenizer {
    /// Opens a vocabulary file. The format is recognized by the content of the file:
    ///
    /// | format | files |
    /// |---|---|
    /// | Hugging Face, one file | `tokenizer.json` |
    /// | Hugging Face, two files | `vocab.json` with `merges.txt` beside it |
    /// | OpenAI, open_clip | `bpe_simple_vocab_16e6.txt.gz`, or the same file decompressed |
    ///
    /// If `path` is a folder, the first of `tokenizer.json`, `vocab.json` and
    /// `bpe_simple_vocab_16e6.txt.gz` that it contains is opened.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read, [`Error::UnknownFormat`] if the file has none of
    /// these formats or the folder contains none of these files, [`Error::CorruptFile`] if the
    /// content is not a valid vocabulary, [`Error::ListLine`] if a line of the merges is not a pair
    /// of tokens, [`Error::FileField`] if the vocabulary has no token for the start or the end of a
    /// text.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            let known = ["tokenizer.json", "vocab.json", "bpe_simple_vocab_16e6.txt.gz"];
            let found = known.iter().map(|name| path.join(name)).find(|file| file.exists());
            return Self::open(found.ok_or_else(|| {
                let reason = format!("the folder contains none of {}", known.join(", "));
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

    /// Builds CLIP's tokenizer from a vocabulary and merges. `file` is named in errors.
    fn from_parts(file: &Path, vocab: &Vocab, merges: &[(String, String)]) -> Result<Self> {
        let find = |names: [&'static str; 2], field| {
            let name = names.into_iter().find(|&name| vocab.contains_key(name));
            name.ok_or_else(|| without(file, names, field))
        };
        let (start, end) = (find(STARTS, "start token")?, find(ENDS, "end token")?);
        let text = pipeline(vocab, merges, start, end).to_string();
        Self::build(file, text.as_bytes())
    }

    /// Builds a tokenizer from the JSON format of Hugging Face's `tokenizers`. `file` is named in
    /// errors.
    fn build(file: &Path, json: &[u8]) -> Result<Self> {
        let corrupt = |e: tokenizers::Error| Error::corrupt(file, e.to_string());
        // A vocabulary that contradicts itself can make the crate panic.
        let panicked = |panic| Error::corrupt(file, format!("it made `tokenizers` fail: {panic}"));
        let read = contain(|| Tokenizer::from_bytes(json)).map_err(panicked)?;
        let mut tokenizer = read.map_err(corrupt)?;
        // `batch` truncates and pads instead.
        tokenizer.with_truncation(None).map_err(corrupt)?.with_padding(None);
        let find = |names: [&'static str; 2], field| {
            let id = names.into_iter().find_map(|name| tokenizer.token_to_id(name));
            id.map(i64::from).ok_or_else(|| without(file, names, field))
        };
        let (start, end) = (find(STARTS, "start token")?, find(ENDS, "end token")?);
        let highest = tokenizer.get_vocab(true).into_values().max().unwrap_or_default();
        Ok(ClipTokenizer { start, end, vocab_size: i64::from(highest) + 1, tokenizer })
    }

    /// Returns the size of the vocabulary: the highest id plus 1.
    pub fn vocab_size(&self) -> i64 {
        self.vocab_size
    }

    /// Returns the id of the token at the end of a text.
    pub fn end(&self) -> i64 {
        self.end
    }

    /// Returns the token ids of a text, with the start token in front and the end token behind.
    ///
    /// If the text itself contains one of the two special tokens in writing, it is encoded as that
    /// token, as in Hugging Face's tokenizer.
    ///
    /// # Errors
    /// [`Error::Input`] if the vocabulary has no token for a byte of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let refuse = |reason: &dyn Display| Error::Input {
            argument: "text",
            expected: "a text that the vocabulary covers".to_owned(),
            found: format!("{text:?}: {reason}"),
        };
        let encoding = contain(|| self.tokenizer.encode_fast(text, false));
        let encoding = encoding.map_err(|panic| refuse(&panic))?.map_err(|e| refuse(&e))?;
        let ids = encoding.get_ids().iter().map(|&id| i64::from(id));
        Ok([self.start].into_iter().chain(ids).chain([self.end]).collect())
    }

    /// Returns the token ids of `texts` as an i64 tensor `[B, context_length]` on the CPU.
    ///
    /// A longer text is truncated and still ends with the end token. A shorter text is padded with
    /// the end token, as in Hugging Face's tokenizer. OpenAI and open_clip pad with 0. The padding
    /// does not affect the features: see
    /// [`ClipText::features`](crate::backbone::ClipText::features).
    ///
    /// # Errors
    /// The errors of [`ClipTokenizer::encode`]; [`Error::Config`] if `context_length` is not within
    /// `2..=65536`.
    pub fn batch<S: AsRef<str>>(&self, texts: &[S], context_length: i64) -> Result<Tensor> {
        if !(2..=MAX_CONTEXT).contains(&context_length) {
            let expected = format!("within 2..={MAX_CONTEXT}");
            return Err(Error::config("context_length", expected, context_length));
        }
        let length = context_length as usize;
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

/// The largest context length. It keeps the memory of a batch of texts within bounds.
const MAX_CONTEXT: i64 = 1 << 16;

type Vocab = HashMap<String, u32>;

fn without(file: &Path, names: [&str; 2], field: &str) -> Error {
    Error::FileField {
        file: file.to_path_buf(),
        field: field.to_owned(),
        expected: names.join(" or "),
        found: "neither in the vocabulary".to_owned(),
    }
}

/// Parses at most `most` pairs of tokens, one pair a line. The first line states the version.
fn read_merges(file: &Path, bytes: &[u8], most: usize) -> Result<Vec<(String, String)>> {
    let text = std::str::from_utf8(bytes)
        .map_err(|_| unknown(file, "it is neither JSON, nor gzip, nor UTF-8 text"))?;
    let mut lines = text.lines().enumerate();
    if !lines.next().is_some_and(|(_, first)| first.contains("#version")) {
        return Err(unknown(file, "the first line of BPE merges must contain #version"));
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
        Err(Error::corrupt(file, format!("decompressed, it exceeds {MAX_INFLATED} bytes")))
    } else {
        Ok(inflated)
    }
}

/// Returns the vocabulary in CLIP's order: the letters that stand for bytes, the same letters at
/// the end of a word, the results of the merges, the two special tokens.
fn openai_vocab(merges: &[(String, String)]) -> Vocab {
    let mut letters: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    letters.sort_unstable();
    let inside = letters.iter().map(char::to_string);
    let at_end = letters.iter().map(|letter| format!("{letter}{WORD_END}"));
    let merged = merges.iter().map(|(a, b)| format!("{a}{b}"));
    let special = [STARTS[0], ENDS[0]].map(str::to_owned);
    inside.chain(at_end).chain(merged).chain(special).zip(0..).collect()
}

/// Returns the `tokenizer.json` that Hugging Face's `CLIPTokenizer` has for this vocabulary.
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
