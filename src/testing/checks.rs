//! The checks, one function for each promise of the contract.

use std::collections::BTreeMap;
use std::sync::Arc;

use tch::{Tensor, nn, nn::OptimizerConfig};

use super::passes::{Backward, SEED, alone, copy, disturb, loss, relative, variables};
use super::{Check, ensure};
use crate::backbone::{Backbone, Forward, Pass};
use crate::error::Error;
use crate::model::{PetlModel, audit_shape};
use crate::petl::{Method, MethodReader, PetlMethod, Unfrozen};
use crate::seam::NoMethod;

/// Checks that the untrained model computes the frozen backbone's features if the method promises
/// to start as the identity, and computes other features if it does not.
///
/// # Errors
/// Returns a [`Failure`](super::Failure) that states the difference.
pub fn starts_as_promised<B: Backbone>(model: &PetlModel<B>, images: &Tensor) -> Check {
    let method = &model.config().method;
    let features = tch::no_grad(|| model.features(images, false))?;
    let backbone = model.backbone();
    let frozen = tch::no_grad(|| backbone.forward(images, &NoMethod, Pass::default()))?;
    let gap = relative(&features, &frozen)?;
    // The trained copy of the weights lies at another address, so a product may round differently.
    let trains_matrices = method.inner().unfreezes().contains(&Unfrozen::All);
    let kept = match method.starts_as_identity() {
        true if trains_matrices => gap < 1e-6,
        promised => (gap == 0.0) == promised,
    };
    let promised = if method.starts_as_identity() { "promises" } else { "does not promise" };
    ensure(kept, || {
        format!(
            "the method {promised} to start as the identity, but the features differ by {gap:e}"
        )
    })
}

/// Checks that three training steps change every variable and do not change the backbone.
///
/// # Errors
/// Returns a [`Failure`](super::Failure) that names the weight.
pub fn trains_its_variables_alone<B: Backbone>(model: &PetlModel<B>, images: &Tensor) -> Check {
    let _alone = alone();
    let digest = model.backbone().digest()?;
    let before: BTreeMap<_, _> = variables(model)
        .into_iter()
        .map(|(name, variable)| Ok((name, copy(&variable)?)))
        .collect::<Result<_, tch::TchError>>()?;
    let mut optimizer = nn::AdamW::default().build(model.var_store(), 1e-2)?;
    for _ in 0..3 {
        let loss = loss(&model.forward(images, true)?)?;
        optimizer.zero_grad();
        loss.f_backward()?;
        optimizer.step();
    }
    ensure(model.backbone().digest()? == digest, || "training changed the frozen backbone".into())?;
    for (name, after) in variables(model) {
        ensure(after.requires_grad(), || format!("{name} is not trainable"))?;
        ensure(after != before[&name], || format!("training did not change {name}"))?;
    }
    for (name, weight) in model.backbone().named_weights() {
        let frozen = !weight.requires_grad() && !weight.grad().defined();
        ensure(frozen, || format!("the backbone's weight {name} received a gradient"))?;
    }
    let logits = tch::no_grad(|| model.forward(images, false))?;
    let finite = logits.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1;
    ensure(finite, || "the logits are not finite after three training steps".into())
}

/// Checks that backward computes a gradient for every variable. No gradient may be all zeros once
/// every variable is moved away from zero.
///
/// # Errors
/// Returns a [`Failure`](super::Failure) that names the variable.
pub fn every_variable_has_a_gradient<B: Backbone>(model: &PetlModel<B>, images: &Tensor) -> Check {
    disturb(model)?;
    loss(&model.forward(images, false)?)?.f_backward()?;
    for (name, variable) in variables(model) {
        let gradient = variable.f_grad()?;
        ensure(gradient.defined(), || format!("{name} has no gradient"))?;
        let most = gradient.f_abs()?.f_max()?.f_double_value(&[])?;
        ensure(most > 0.0, || format!("the largest entry of the gradient of {name} is {most}"))?;
    }
    Ok(())
}

/// Checks, with dropout and drop path on, that [`PetlModel::backward_recomputed`] and its variant
/// that starts from the kept prefix repeat one whole pass: the logits, the loss and the state of
/// the random generator are equal, and each gradient differs by at most `gap(name)`.
///
/// # Errors
/// Returns a [`Failure`](super::Failure) that names what differs.
pub fn recomputes_the_same_gradients<B: Backbone>(
    model: &PetlModel<B>,
    images: &Tensor,
    gap: impl Fn(&str) -> f64,
) -> Check {
    let _alone = alone();
    disturb(model)?;
    let loss_of = |logits: &Tensor| loss(logits);
    let whole = Backward::of(model, || {
        let logits = model.forward(images, true)?;
        let loss = loss(&logits)?;
        loss.f_backward()?;
        Ok((logits.f_detach()?, loss.f_detach()?))
    })?;
    let by_block = Backward::of(model, || model.backward_recomputed(images, loss_of))?;
    let same = (&by_block.logits, &by_block.loss) == (&whole.logits, &whole.loss);
    ensure(same, || "the logits or the loss of the block-by-block pass differ".into())?;
    ensure(by_block.next_draw == whole.next_draw, || {
        "the block-by-block pass leaves libtorch's generator in another state".into()
    })?;
    for (name, gradient) in &whole.gradients {
        let found = relative(&by_block.gradients[name], gradient)?;
        ensure(found <= gap(name), || {
            format!("the recomputed gradient of {name} differs by {found:e}")
        })?;
    }
    if model.frozen_blocks().is_none() {
        return Ok(());
    }
    let from_prefix = Backward::of(model, || {
        model.backward_recomputed_from(model.frozen_prefix(images)?, loss_of)
    })?;
    let same = (&from_prefix.logits, &from_prefix.loss) == (&whole.logits, &whole.loss);
    ensure(same, || "the logits or the loss computed from the kept prefix differ".into())?;
    for (name, gradient) in &from_prefix.gradients {
        ensure(*gradient == by_block.gradients[name], || {
            format!("the gradient of {name} computed from the kept prefix differs")
        })?;
    }
    tch::manual_seed(SEED);
    let logits = model.forward_from(model.frozen_prefix(images)?, true)?;
    ensure(logits == whole.logits, || {
        "the training logits computed from the kept prefix differ".into()
    })
}

/// Checks that in evaluation the logits stay the same if the blocks that the method does not change
/// are computed once and kept.
///
/// # Errors
/// Returns a [`Failure`](super::Failure) if the logits differ.
pub fn keeps_its_prefix<B: Backbone>(model: &PetlModel<B>, images: &Tensor) -> Check {
    let Some(blocks) = model.frozen_blocks() else { return Ok(()) };
    disturb(model)?;
    let (whole, from_prefix) = tch::no_grad(|| {
        let prefix = model.frozen_prefix(images)?;
        Ok::<_, Error>((model.forward(images, false)?, model.forward_from(prefix, false)?))
    })?;
    ensure(whole == from_prefix, || {
        format!(
            "the logits differ if the output of the first {blocks} blocks is kept, although \
             acts_from states that the method does not change these blocks"
        )
    })
}

/// Checks that the numbers of weights that the audit computes from shapes are equal to those of the
/// built model.
///
/// # Errors
/// Returns a [`Failure`](super::Failure) with the counts of both.
pub fn is_audited<B: Backbone>(model: &PetlModel<B>) -> Check {
    let row = audit_shape(&model.backbone().shape(), &model.config().method)?;
    let built = model.trainable_params();
    let (found, expected) =
        ((row.params, row.backbone), (built.method as i64, built.backbone() as i64));
    ensure(found == expected, || {
        format!(
            "the audit counts {found:?} weights of method and backbone, but the model has \
             {expected:?}"
        )
    })
}

/// Checks that a saved adapter loads with the same config and the same logits, and that the loaded
/// model is saved as the same bytes.
///
/// # Errors
/// Returns a [`Failure`](super::Failure) that says what differs.
pub fn comes_back_from_its_file<B: Backbone>(
    model: &PetlModel<B>,
    images: &Tensor,
    reader: Option<&MethodReader>,
) -> Check {
    let folder = tempfile::tempdir()?;
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    disturb(model)?;
    model.save_adapter(&first)?;
    let own = |name: &str, config: &serde_json::Value| {
        let found = custom(&model.config().method, name, config);
        found.ok_or_else(|| {
            format!("the file holds the method {name}, which is not the saved one").into()
        })
    };
    let reader = reader.unwrap_or(&own);
    let again = PetlModel::load_adapter_with(model.backbone().clone(), &first, reader)?;
    ensure(again.config() == model.config(), || "the loaded config differs".into())?;
    let logits = |model: &PetlModel<B>| tch::no_grad(|| model.forward(images, false));
    ensure(logits(&again)? == logits(model)?, || "the logits of the loaded model differ".into())?;
    again.save_adapter(&second)?;
    let same = std::fs::read(&first)? == std::fs::read(&second)?;
    ensure(same, || "the loaded model is saved as different bytes".into())
}

/// Returns the custom method with this name and config within `method`, if there is one.
fn custom(method: &Method, name: &str, config: &serde_json::Value) -> Option<Arc<dyn PetlMethod>> {
    match method {
        Method::Custom(found) if (found.name(), found.config()) == (name, config) => {
            found.code().cloned()
        }
        Method::LowBit(low_bit) => custom(&low_bit.method, name, config),
        Method::Compose { methods } => methods.iter().find_map(|part| custom(part, name, config)),
        _ => None,
    }
}
