//! Flags of the preparation of images: resize, crop and interpolation.

use clap::{Args, ValueEnum};
use convpass::Preprocessing;
use convpass::backbone::{PreprocessingSource, Resampling, ResizeMode};

use super::Opened;

/// The preparation of images, and changes of it.
#[derive(Args, Clone, Copy, Default)]
pub struct PreparationFlags {
    /// Resize, crop and interpolation of the images [default: checkpoint with --images, published
    /// with --task].
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Data")]
    preprocessing: Option<Preparation>,
    /// Resize both sides to the image size (squash), or the shorter side to this many pixels, after
    /// which the centre is cut out [default: as --preprocessing says].
    #[arg(long, value_name = "squash|PIXELS", value_parser = parse_resize, help_heading = "Data")]
    resize: Option<ResizeMode>,
    /// Filter of the resize [default: as --preprocessing says].
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Data")]
    interpolation: Option<Interpolation>,
}

/// A named preparation of images.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Preparation {
    /// As the checkpoint was trained, if the files beside it say it; else published.
    Checkpoint,
    /// The published Convpass protocol: both sides are resized, with a bicubic filter.
    Published,
}

/// A filter of a resize.
#[derive(Clone, Copy, ValueEnum)]
pub enum Interpolation {
    Bilinear,
    Bicubic,
}

impl PreparationFlags {
    /// Returns how images are prepared for the backbone. Without the flag it is `default`.
    pub fn apply(&self, opened: &Opened, default: Preparation) -> Preprocessing {
        let known = opened.backbone.preprocessing().clone();
        let chosen = match self.preprocessing.unwrap_or(default) {
            Preparation::Checkpoint => known.clone(),
            Preparation::Published => Preprocessing {
                resize: ResizeMode::Squash,
                interpolation: Resampling::Bicubic,
                ..known.clone()
            },
        };
        let interpolation = self.interpolation.map(|filter| match filter {
            Interpolation::Bilinear => Resampling::Bilinear,
            Interpolation::Bicubic => Resampling::Bicubic,
        });
        let mut chosen = Preprocessing {
            resize: self.resize.unwrap_or(chosen.resize),
            interpolation: interpolation.unwrap_or(chosen.interpolation),
            ..chosen
        };
        if (chosen.resize, chosen.interpolation) != (known.resize, known.interpolation) {
            chosen.source = PreprocessingSource::Caller;
        }
        chosen
    }
}

fn parse_resize(text: &str) -> Result<ResizeMode, String> {
    if text == "squash" {
        return Ok(ResizeMode::Squash);
    }
    match text.parse() {
        Ok(shorter_side @ 1..=65_535) => Ok(ResizeMode::CenterCrop { shorter_side }),
        _ => Err("expected squash, or the pixels of the shorter side".to_owned()),
    }
}
