//! Writes predictions as text, JSON or CSV.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

use crate::flags::OutputFormat;

/// A class of an image and its probability.
#[derive(Clone)]
pub struct ClassScore {
    pub label: usize,
    pub probability: f32,
}

#[derive(Serialize)]
struct Image<'a> {
    image: &'a str,
    predictions: Vec<Class<'a>>,
}

#[derive(Serialize)]
struct Class<'a> {
    label: usize,
    class: &'a str,
    probability: f32,
}

#[derive(Serialize)]
struct ScoreRow<'a> {
    image: &'a str,
    rank: usize,
    label: usize,
    class: &'a str,
    probability: f32,
}

pub struct Writer<W: Write> {
    out: Out<W>,
    classes: Vec<String>,
    written: usize,
}

enum Out<W: Write> {
    Text(W),
    Json(W),
    Csv(Box<csv::Writer<W>>),
}

impl<W: Write> Writer<W> {
    pub fn new(format: OutputFormat, out: W, classes: Vec<String>) -> Self {
        let out = match format {
            OutputFormat::Text => Out::Text(out),
            OutputFormat::Json => Out::Json(out),
            OutputFormat::Csv => Out::Csv(Box::new(csv::Writer::from_writer(out))),
        };
        Writer { out, classes, written: 0 }
    }

    pub fn write(&mut self, path: &Path, predictions: &[ClassScore]) -> io::Result<()> {
        let image = &*path.to_string_lossy();
        let classes = predictions.iter().map(|&ClassScore { label, probability }| {
            let class = self.classes.get(label).map_or("", String::as_str);
            Class { label, class, probability }
        });
        match &mut self.out {
            Out::Text(out) => {
                write!(out, "{image}")?;
                for Class { class, probability, .. } in classes {
                    write!(out, "\t{class} {probability:.4}")?;
                }
                writeln!(out)?;
            }
            Out::Json(out) => {
                serde_json::to_writer(&mut *out, &Image { image, predictions: classes.collect() })?;
                writeln!(out)?;
            }
            Out::Csv(out) => {
                for (rank, Class { label, class, probability }) in (1..).zip(classes) {
                    out.serialize(ScoreRow { image, rank, label, class, probability })?;
                }
            }
        }
        self.written += 1;
        Ok(())
    }

    /// Flushes the output, so that a reader sees each batch as soon as it is classified.
    pub fn flush(&mut self) -> io::Result<()> {
        match &mut self.out {
            Out::Text(out) | Out::Json(out) => out.flush(),
            Out::Csv(out) => out.flush(),
        }
    }

    /// Flushes the output and returns the number of images that were written.
    pub fn finish(&mut self) -> io::Result<usize> {
        self.flush().map(|()| self.written)
    }
}
