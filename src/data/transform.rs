//! Normalization: converts u8 pixels to the floating-point range that a backbone was trained on.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::ffi::send;
use crate::preprocessing::{Preprocessing, PreprocessingSource};

/// A normalization of pixels in [0, 1]: `(x - mean) / std` for each channel.
///
/// Checkpoints of the same architecture are trained with different normalizations, and the choice
/// changes the results. Therefore there is no default: each run names its normalization, and each
/// result records it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    /// The mean and standard deviation of ImageNet-1k. Its name is `imagenet`.
    #[serde(rename = "imagenet")]
    ImageNet,
    /// Mean 0.5 and standard deviation 0.5, which gives values in [-1, 1]. Its name is `half`.
    /// Google's ViT checkpoints were trained with it.
    Half,
    /// No change: values stay in [0, 1]. Its name is `unit`.
    Unit,
    /// The mean and standard deviation of CLIP's training images. Its name is `clip`.
    Clip,
    /// Another mean and standard deviation of red, green and blue, for pixels in [0, 1]. Its text
    /// is `MEAN,MEAN,MEAN/STD,STD,STD`.
    Given {
        /// The mean.
        mean: [f32; 3],
        /// The standard deviation, which is positive.
        std: [f32; 3],
    },
}

impl Normalization {
    /// Every normalization that has a name.
    pub const ALL: [Self; 4] = [Self::ImageNet, Self::Half, Self::Unit, Self::Clip];

    /// Returns the name that is used in files and on the command line; `given` if the numbers are
    /// given instead of a name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ImageNet => "imagenet",
            Self::Half => "half",
            Self::Unit => "unit",
            Self::Clip => "clip",
            Self::Given { .. } => "given",
        }
    }

    /// Returns the normalization with the mean and standard deviation of `preprocessing`: the named
    /// one if there is one.
    pub fn of(preprocessing: &Preprocessing) -> Self {
        let (mean, std) = (preprocessing.mean, preprocessing.std);
        let is_same = |a: [f32; 3], b: [f32; 3]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        let named = |named: &Self| is_same(named.mean(), mean) && is_same(named.std(), std);
        Self::ALL.into_iter().find(named).unwrap_or(Self::Given { mean, std })
    }

    /// Returns the mean of red, green and blue, for pixels in [0, 1].
    pub const fn mean(self) -> [f32; 3] {
        match self {
            Self::ImageNet => [0.485, 0.456, 0.406],
            Self::Half => [0.5; 3],
            Self::Unit => [0.0; 3],
            Self::Clip => [0.481_454_66, 0.457_827_5, 0.408_210_73],
            Self::Given { mean, .. } => mean,
        }
    }

    /// Returns the standard deviation of red, green and blue, for pixels in [0, 1].
    pub const fn std(self) -> [f32; 3] {
        match self {
            Self::ImageNet => [0.229, 0.224, 0.225],
            Self::Half => [0.5; 3],
            Self::Unit => [1.0; 3],
            Self::Clip => [0.268_629_54, 0.261_302_6, 0.275_777_1],
            Self::Given { std, .. } => std,
        }
    }

    /// Normalizes u8 images `[B, H, W, 3]`. Returns a contiguous f32 tensor `[B, 3, H, W]` on the
    /// same device.
    ///
    /// # Errors
    /// [`Error::Input`] if the tensor has another shape or dtype.
    pub fn normalize(self, images: &Tensor) -> Result<Tensor> {
        let (kind, size) = (images.f_kind()?, images.size());
        if kind != Kind::Uint8 || !matches!(size[..], [_, _, _, 3]) {
            return Err(Error::Input {
                argument: "images",
                expected: "Uint8 [B, H, W, 3]".into(),
                found: format!("{kind:?} {size:?}"),
            });
        }
        let channel = |values: [f32; 3]| {
            send(&Tensor::f_from_slice(&values)?.f_view([1, 3, 1, 1])?, images.device())
        };
        let planes = images.f_permute([0, 3, 1, 2])?;
        // The order (divide by 255, subtract the mean, divide by the deviation) is that of the
        // published pipelines, so the rounding is the same. The whole batch is processed in few
        // calls, because each call may wait for a thread on a busy machine.
        let mut x = Tensor::f_empty(planes.size(), (Kind::Float, images.device()))?;
        x.f_copy_(&planes)?;
        x = x.f_divide_scalar_(255.0)?;
        if self != Self::Unit {
            x = x.f_sub_(&channel(self.mean())?)?;
            x = x.f_div_(&channel(self.std())?)?;
        }
        Ok(x)
    }
}

impl Preprocessing {
    /// Returns this preprocessing with the mean and standard deviation of `normalization`.
    pub fn with_normalization(mut self, normalization: Normalization) -> Self {
        if Normalization::of(&self) != normalization {
            (self.mean, self.std) = (normalization.mean(), normalization.std());
            self.source = PreprocessingSource::Caller;
        }
        self
    }
}

impl fmt::Display for Normalization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Given { mean, std } = self else { return f.pad(self.name()) };
        let text = |values: &[f32; 3]| values.map(|value| value.to_string()).join(",");
        f.pad(&format!("{}/{}", text(mean), text(std)))
    }
}

impl FromStr for Normalization {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let named = Self::ALL.into_iter().find(|n| n.name() == name);
        named.or_else(|| given(name)).ok_or_else(|| {
            let expected = "imagenet, half, unit, clip or MEAN,MEAN,MEAN/STD,STD,STD";
            Error::config("normalization", expected, name)
        })
    }
}

/// Parses `MEAN,MEAN,MEAN/STD,STD,STD`.
fn given(text: &str) -> Option<Normalization> {
    let numbers = |text: &str| -> Option<[f32; 3]> {
        let values: Option<Vec<f32>> = text.split(',').map(|value| value.parse().ok()).collect();
        values?.try_into().ok()
    };
    let (mean, std) = text.split_once('/')?;
    let (mean, std) = (numbers(mean)?, numbers(std)?);
    let fits = mean.iter().all(|value| value.is_finite())
        && std.iter().all(|value| value.is_finite() && *value > 0.0);
    fits.then_some(Normalization::Given { mean, std })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_in_text_and_in_json() {
        for n in Normalization::ALL {
            assert_eq!(n.to_string().parse::<Normalization>().unwrap(), n);
            assert_eq!(serde_json::to_string(&n).unwrap(), format!("\"{n}\""));
        }
        let given = Normalization::Given { mean: [0.43, 0.411, 0.296], std: [0.213, 0.156, 0.143] };
        assert_eq!(given.to_string(), "0.43,0.411,0.296/0.213,0.156,0.143");
        assert_eq!(given.to_string().parse::<Normalization>().unwrap(), given);
        let json = serde_json::to_string(&given).unwrap();
        assert_eq!(serde_json::from_str::<Normalization>(&json).unwrap(), given);
        for wrong in
            ["ImageNet", "0,0,0", "0,0/1,1", "0,0,0/1,1,0", "0,0,NaN/1,1,1", "0,0,0/1,1,-1"]
        {
            assert!(matches!(wrong.parse::<Normalization>(), Err(Error::Config { .. })), "{wrong}");
        }
    }

    #[test]
    fn agrees_with_the_formula_pixel_by_pixel() {
        let bytes: Vec<u8> = (0..2 * 3 * 5 * 3).map(|i| (i * 37 % 256) as u8).collect();
        let images = Tensor::from_slice(&bytes).view([2, 3, 5, 3]);
        let given = Normalization::Given { mean: [0.43, 0.411, 0.296], std: [0.213, 0.156, 0.143] };
        for n in Normalization::ALL.into_iter().chain([given]) {
            let x = n.normalize(&images).unwrap();
            assert_eq!((x.size(), x.kind()), (vec![2, 3, 3, 5], Kind::Float));
            assert!(x.is_contiguous());
            for (i, &byte) in bytes.iter().enumerate() {
                let (b, row, column, c) = (i / 45, i / 15 % 3, i / 3 % 5, i % 3);
                let at = [b as i64, c as i64, row as i64, column as i64];
                let expected = (f32::from(byte) / 255.0 - n.mean()[c]) / n.std()[c];
                assert!((x.double_value(&at) - f64::from(expected)).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn another_shape_or_kind_is_an_error() {
        for images in [
            Tensor::zeros([2, 3, 4, 4], (Kind::Uint8, tch::Device::Cpu)),
            Tensor::zeros([2, 4, 4, 3], (Kind::Float, tch::Device::Cpu)),
            Tensor::zeros([4, 4, 3], (Kind::Uint8, tch::Device::Cpu)),
        ] {
            assert!(matches!(Normalization::Half.normalize(&images), Err(Error::Input { .. })));
        }
    }
}
