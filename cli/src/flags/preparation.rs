//! Flags of the preparation of images: resize, crop and interpolation.

use std::fmt;

use anyhow::Result;
use clap::{Args, ValueEnum};
use convpass::Preprocessing;
use convpass::backbone::{Resampling, ResizeMode};
use convpass::data::Resize;

use super::Opened;

/// The preparation of images, and changes of it.
#[derive(Args, Clone, Copy, Default)]
pub struct PreparationFlags {
    /// Resize, crop and interpolation of the images [default: checkpoint with --images, published
    /// with --task].
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Data")]
    preprocessing: Option<Preparation>,
    #[command(flatten)]
    resize: ResizeFlags,
}

/// Changes of the resize.
#[derive(Args, Clone, Copy, Default)]
pub struct ResizeFlags {
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
        let (resize, interpolation) = match self.preprocessing.unwrap_or(default) {
            Preparation::Checkpoint => {
                let known = opened.backbone.preprocessing();
                (known.resize, known.interpolation)
            }
            Preparation::Published => (ResizeMode::Squash, Resampling::Bicubic),
        };
        let filter = self.resize.filter().unwrap_or(interpolation);
        opened.resized(self.resize.resize.unwrap_or(resize), filter)
    }
}

impl ResizeFlags {
    /// Returns `resize` with the changes.
    pub fn apply(&self, resize: Resize) -> Result<Resize> {
        let size = resize.image_size();
        let changed = match self.resize {
            Some(ResizeMode::CenterCrop { shorter_side }) => {
                Resize::center_crop(shorter_side, size)?
            }
            Some(_) => Resize::bicubic(size)?,
            None => resize,
        };
        let filter = self.filter().unwrap_or(resize.interpolation());
        Ok(changed.with_interpolation(filter).with_orientation(resize.orientation()))
    }

    /// Returns whether there is a change.
    pub fn any(&self) -> bool {
        self.resize.is_some() || self.interpolation.is_some()
    }

    fn filter(&self) -> Option<Resampling> {
        self.interpolation.map(|filter| match filter {
            Interpolation::Bilinear => Resampling::Bilinear,
            Interpolation::Bicubic => Resampling::Bicubic,
        })
    }
}

impl fmt::Display for ResizeFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let resize = self.resize.map(|resize| match resize {
            ResizeMode::CenterCrop { shorter_side } => {
                format!("shorter side {shorter_side} pixels, then the centre")
            }
            _ => "squashed".to_owned(),
        });
        let filter = self.filter().map(|filter| match filter {
            Resampling::Bilinear => "bilinear".to_owned(),
            _ => "bicubic".to_owned(),
        });
        let parts: Vec<String> = resize.into_iter().chain(filter).collect();
        f.write_str(&parts.join(", "))
    }
}

fn parse_resize(text: &str) -> std::result::Result<ResizeMode, String> {
    if text == "squash" {
        return Ok(ResizeMode::Squash);
    }
    match text.parse() {
        Ok(shorter_side @ 1..=65_535) => Ok(ResizeMode::CenterCrop { shorter_side }),
        _ => Err("expected squash, or the pixels of the shorter side".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use convpass::data::Orientation;

    use super::*;

    #[test]
    fn a_flag_changes_its_part_of_the_resize_alone() {
        let trained = Resize::bicubic((20, 30)).unwrap().with_orientation(Orientation::Stored);
        let same = ResizeFlags::default().apply(trained).unwrap();
        assert_eq!(same, trained);
        let crop = ResizeMode::CenterCrop { shorter_side: 40 };
        let flags = ResizeFlags { resize: Some(crop), interpolation: None };
        let expected = Resize::center_crop(40, (20, 30)).unwrap();
        let expected = expected.with_orientation(Orientation::Stored);
        assert_eq!(flags.apply(trained).unwrap(), expected);
        let filter = Some(Interpolation::Bilinear);
        let flags = ResizeFlags { resize: Some(ResizeMode::Squash), interpolation: filter };
        let squashed = Resize::bilinear((20, 30)).unwrap();
        let squashed = squashed.with_orientation(Orientation::Stored);
        assert_eq!(flags.apply(expected).unwrap(), squashed);
        assert_eq!(flags.to_string(), "squashed, bilinear");
        let small = ResizeMode::CenterCrop { shorter_side: 10 };
        assert!(ResizeFlags { resize: Some(small), interpolation: None }.apply(trained).is_err());
    }
}
