//! A classifier whose weights are the encoded names of its classes.

use tch::{Kind, Tensor};

#[cfg(feature = "clip")]
use super::{ClipTokenizer, Templates};
use crate::backbone::{Backbone, ClipText, FrozenViT};
use crate::error::{Error, Result};

/// The logit scale of a text tower whose file contains none: the value that CLIP's training ends
/// with.
const USUAL_SCALE: f64 = 100.0;

/// The number of texts that one forward pass of the text tower encodes.
const BATCH: i64 = 256;

/// A zero-shot classifier. The logit of a class is the cosine between the image's embedding and the
/// class's text embedding, times a factor.
#[derive(Debug)]
pub struct ZeroShot {
    /// `[K, D]`; each row has length 1.
    weight: Tensor,
    scale: f64,
}

impl ZeroShot {
    /// Creates a classifier from class names.
    ///
    /// Each class is encoded with each template. The features are normalized to length 1, averaged
    /// over the templates, and the mean is normalized again. The factor is the text tower's
    /// [`ClipText::logit_scale`], or 100 if it has none.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no class, or if the tokenizer belongs to another model: its
    /// vocabulary size differs from that of the text tower, or its end token is not the one that
    /// the tower reads. Also the errors of [`ClipText::features`] and [`ClipTokenizer::encode`].
    #[cfg(feature = "clip")]
    pub fn encode<S: AsRef<str>>(
        text: &ClipText,
        tokenizer: &ClipTokenizer,
        classes: &[S],
        templates: &Templates,
    ) -> Result<Self> {
        check_tokenizer(text, tokenizer)?;
        let mut ids = Vec::new();
        for class in classes {
            let prompts: Vec<String> = templates.fill(class.as_ref()).collect();
            ids.push(tokenizer.batch(&prompts, text.config().context_length)?);
        }
        if ids.is_empty() {
            return Err(Error::config("classes", "at least one class", 0));
        }
        // [K, templates, T]
        Self::from_ids(text, &Tensor::f_stack(&ids, 0)?)
    }

    /// Creates a classifier from the token ids of the sentences of each class, i64
    /// `[K, templates, T]`.
    ///
    /// # Errors
    /// [`Error::Input`] if `ids` has another rank, no class or no template; also the errors of
    /// [`ClipText::features`].
    pub fn from_ids(text: &ClipText, ids: &Tensor) -> Result<Self> {
        let size = size(ids);
        let &[classes, templates, length] = &size[..] else {
            return Err(input("ids", "[K, templates, T]", &size));
        };
        if classes < 1 || templates < 1 {
            return Err(input("ids", "[K, templates, T] with K, templates >= 1", &size));
        }
        let ids = ids.f_reshape([classes.saturating_mul(templates), length])?;
        let parts = ids.f_split(BATCH, 0)?;
        let features = parts.iter().map(|part| text.features(part)).collect::<Result<Vec<_>>>()?;
        let features = Tensor::f_cat(&features, 0)?;
        // [K * templates, D] -> [K, D]
        let mean = unit(&features)?.f_unflatten(0, [classes, templates])?;
        let weight = unit(&mean.f_mean_dim(1, false, Kind::Float)?)?;
        Ok(ZeroShot { weight, scale: text.logit_scale().unwrap_or(USUAL_SCALE) })
    }

    /// Returns the text embeddings of the classes, `[K, D]`, each of length 1.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Returns the factor that multiplies the cosines.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Returns the logits `[B, K]` of image embeddings `[B, D]` ([`FrozenViT::project`]). The
    /// embeddings need not have length 1.
    ///
    /// # Errors
    /// [`Error::Input`] if the last dimension of the embeddings is not D.
    pub fn logits(&self, embeddings: &Tensor) -> Result<Tensor> {
        let dim = self.weight.size()[1];
        let size = size(embeddings);
        if size.last() != Some(&dim) {
            return Err(input("embeddings", &format!("[B, {dim}]"), &size));
        }
        let embeddings = unit(&embeddings.f_to_kind(Kind::Float)?)?;
        let weight = self.weight.f_to_device(embeddings.device())?;
        Ok(embeddings.f_linear(&weight, None::<&Tensor>)?.f_mul_scalar(self.scale)?)
    }

    /// Returns the weight `[K, C]` of a linear head over the unprojected features of `vit` that
    /// predicts the same class as this classifier.
    ///
    /// The weight is `f * E * P`, where E are the embeddings of the classes, P is the projection of
    /// the image tower, and f is a number.
    ///
    /// A linear head cannot normalize each image embedding to length 1. The normalization divides
    /// all logits of an image by the same positive number, so the predicted class does not depend
    /// on it or on f. The loss and its gradients do depend on f. Therefore f is this classifier's
    /// factor divided by the mean length of the embeddings of `images` (`[B, 3, H, W]`; pass some
    /// of the training images). The head's logits then equal [`ZeroShot::logits`] for an image
    /// whose embedding has the mean length.
    ///
    /// # Errors
    /// [`Error::Config`] if `vit` has no projection or a projection of another width;
    /// [`Error::Input`] if the mean length is 0 or NaN; also the errors of
    /// [`FrozenViT::features`].
    pub fn head(&self, vit: &FrozenViT, images: &Tensor) -> Result<Tensor> {
        let projection = vit.projection()?.values(Kind::Float)?;
        let (found, dim) = (projection.size()[0], self.weight.size()[1]);
        if found != dim {
            return Err(Error::config("projection", format!("{dim} wide, as for text"), found));
        }
        let embeddings = tch::no_grad(|| vit.project(&vit.features(images)?))?;
        let mean = length(&embeddings.f_to_kind(Kind::Float)?)?.f_mean(Kind::Float)?;
        let factor = self.scale / mean.f_double_value(&[])?;
        if !factor.is_finite() {
            return Err(input("images", "images whose embeddings are not zero", &images.size()));
        }
        let weight = self.weight.f_to_device(vit.device())?;
        Ok(weight.f_matmul(&projection)?.f_mul_scalar(factor)?)
    }
}

/// Checks that the tokenizer's vocabulary size and end token fit the text tower.
#[cfg(feature = "clip")]
fn check_tokenizer(text: &ClipText, tokenizer: &ClipTokenizer) -> Result<()> {
    let (config, found) = (text.config(), tokenizer.vocab_size());
    if found != config.vocab_size {
        let expected = format!("{}, the size of the token embedding", config.vocab_size);
        return Err(Error::config("the tokenizer's vocabulary", expected, found));
    }
    // A text tower without a configured end token reads at the highest id.
    let read = config.end_token.unwrap_or(config.vocab_size - 1);
    if read != tokenizer.end() {
        let expected = format!("{}, the tokenizer's end token", tokenizer.end());
        return Err(Error::config("end_token", expected, read));
    }
    Ok(())
}

/// Returns the dimensions of a tensor, or an empty list if the tensor is undefined. libtorch does
/// not return the dimensions of an undefined tensor.
fn size(x: &Tensor) -> Vec<i64> {
    if x.defined() { x.size() } else { Vec::new() }
}

/// Returns the length of each vector of `[.., D]` as `[.., 1]`.
fn length(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_norm_scalaropt_dim(2, [-1], true)?)
}

/// Returns `[.., D]` with each vector normalized to length 1.
fn unit(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_div(&length(x)?)?)
}

fn input(argument: &'static str, expected: &str, found: &[i64]) -> Error {
    Error::Input { argument, expected: expected.to_owned(), found: format!("{found:?}") }
}
