//! Class names as the weights of a classifier.

use tch::{Kind, Tensor};

#[cfg(feature = "clip")]
use super::{ClipTokenizer, Templates};
use crate::backbone::{Backbone, ClipText, FrozenViT};
use crate::error::{Error, Result};

/// The factor on cosines of a text tower whose file has none: where CLIP's training ends.
const USUAL_SCALE: f64 = 100.0;

/// Texts that are run through the tower at a time.
const BATCH: i64 = 256;

/// A classifier out of the encoded names of its classes: cosines between an image's embedding and
/// each class's, times a factor.
#[derive(Debug)]
pub struct ZeroShot {
    /// `[K, D]`, rows of length 1.
    weight: Tensor,
    scale: f64,
}

impl ZeroShot {
    /// Encodes each class with each template: features of length 1, their mean over the templates,
    /// and that at length 1. The factor is the tower's
    /// ([`ClipText::logit_scale`]), or 100 where it has none.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no class, or the tokenizer is another model's: not of as many
    /// tokens as the tower's table, or with an end token that is not the one it reads; as
    /// [`ClipText::features`] and [`ClipTokenizer::encode`].
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
            return Err(Error::config("classes", "at least one", 0));
        }
        // [K, templates, T]
        Self::from_ids(text, &Tensor::f_stack(&ids, 0)?)
    }

    /// Encodes the classes from token ids `[K, templates, T]`, i64, of the sentences of each class.
    ///
    /// # Errors
    /// [`Error::Input`] for another rank, no class or no template; as [`ClipText::features`].
    pub fn from_ids(text: &ClipText, ids: &Tensor) -> Result<Self> {
        let size = size(ids);
        let &[classes, templates, length] = &size[..] else {
            return Err(input("ids", "[K, templates, T]", &size));
        };
        if classes < 1 || templates < 1 {
            return Err(input("ids", "[K, templates, T], none of them 0", &size));
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

    /// The classes' embeddings, `[K, D]`, each of length 1.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The factor on the cosines.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Embeddings `[B, D]` of images ([`FrozenViT::project`]), of any length, to logits `[B, K]`.
    ///
    /// # Errors
    /// [`Error::Input`] if the embeddings are of another width.
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

    /// The weight `[K, C]` of a head over the unprojected features of `vit` that classifies as this
    /// does: `f * E * P` for embeddings E of the classes, the image tower's projection P, and one
    /// number f.
    ///
    /// A linear head cannot bring each embedding to length 1. That divides the logits of an image by
    /// one positive number and leaves their order, so that the head's highest class is the zero-shot
    /// one for every f; the loss and its gradients do depend on f. It is this classifier's factor
    /// divided by the mean length of the embeddings of `images` (`[B, 3, H, W]`, some of those to be
    /// trained on), which makes the head's logits those of [`ZeroShot::logits`] but for how much the
    /// length of an image's embedding differs from the mean.
    ///
    /// # Errors
    /// [`Error::Config`] if `vit` has no projection or one of another width; as
    /// [`FrozenViT::features`].
    pub fn head(&self, vit: &FrozenViT, images: &Tensor) -> Result<Tensor> {
        let projection = vit.projection()?.values(Kind::Float)?;
        let (found, dim) = (projection.size()[0], self.weight.size()[1]);
        if found != dim {
            return Err(Error::config("projection", format!("{dim}, as the texts' is"), found));
        }
        let embeddings = tch::no_grad(|| vit.project(&vit.features(images)?))?;
        let mean = length(&embeddings.f_to_kind(Kind::Float)?)?.f_mean(Kind::Float)?;
        let factor = self.scale / mean.f_double_value(&[])?;
        if !factor.is_finite() {
            return Err(input("images", "some whose embeddings have a length", &images.size()));
        }
        let weight = self.weight.f_to_device(vit.device())?;
        Ok(weight.f_matmul(&projection)?.f_mul_scalar(factor)?)
    }
}

/// Refuses a tokenizer whose ids mean something else to the tower, or nothing.
#[cfg(feature = "clip")]
fn check_tokenizer(text: &ClipText, tokenizer: &ClipTokenizer) -> Result<()> {
    let (config, found) = (text.config(), tokenizer.vocab_size());
    if found != config.vocab_size {
        let expected = format!("{}, the rows of the token table", config.vocab_size);
        return Err(Error::config("the tokenizer's vocabulary", expected, found));
    }
    // Without an id of its own the tower reads the highest.
    let read = config.end_token.unwrap_or(config.vocab_size - 1);
    if read != tokenizer.end() {
        let expected = format!("{}, the tokenizer's", tokenizer.end());
        return Err(Error::config("end_token", expected, read));
    }
    Ok(())
}

/// The dimensions of a tensor of the caller's; none where it is not defined, whose own libtorch
/// refuses to tell.
fn size(x: &Tensor) -> Vec<i64> {
    if x.defined() { x.size() } else { Vec::new() }
}

/// `[.., D]` to the length of each vector, `[.., 1]`.
fn length(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_norm_scalaropt_dim(2, [-1], true)?)
}

/// `[.., D]` with each vector at length 1.
fn unit(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_div(&length(x)?)?)
}

fn input(argument: &'static str, expected: &str, found: &[i64]) -> Error {
    Error::Input { argument, expected: expected.to_owned(), found: format!("{found:?}") }
}
