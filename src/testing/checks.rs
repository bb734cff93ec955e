//! The checks, one function for each promise.

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

/// The untrained model has the frozen backbone's features where the method promises it, and only
/// there.
///
/// # Errors
/// A [`Failure`] that says by how much they differ.
pub fn starts_as_promised<B: Backbone>(model: &PetlModel<B>, images: &Tensor) -> Check {
    let method = &model.config().method;
    let features = tch::no_grad(|| model.features(images, false))?;
    let backbone = model.backbone();
    let frozen = tch::no_grad(|| backbone.forward(images, &NoMethod, Pass::default()))?;
    let gap = relative(&features, &frozen)?;
    // The same weights at another address: a product may round differently.
    let trains_matrices = method.inner().unfreezes().contains(&Unfrozen::All);
    let kept = match method.starts_as_identity() {
        true if trains_matrices => gap < 1e-6,
        promised => (gap == 0.0) == promised,
    };
    let promised = if method.starts_as_identity() { "promises" } else { "does not promise" };
    ensure(kept, || {
        format!("it {promised} to start as the identity, and the features are off by {gap:e}")
    })
}

/// Three steps change every variable and nothing of the backbone.
///
/// # Errors
/// A [`Failure`] that names the weight.
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
        ensure(after.requires_grad(), || format!("{name} is no trainable variable"))?;
        ensure(after != before[&name], || format!("{name} was not trained"))?;
    }
    for (name, weight) in model.backbone().named_weights() {
        let frozen = !weight.requires_grad() && !weight.grad().defined();
        ensure(frozen, || format!("the backbone's {name} took a gradient"))?;
    }
    let logits = tch::no_grad(|| model.forward(images, false))?;
    let finite = logits.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1;
    ensure(finite, || "logits are not finite after three steps".into())
}

/// Backward reaches every variable, with more than zeros once none starts at zero.
///
/// # Errors
/// A [`Failure`] that names the variable.
pub fn every_variable_has_a_gradient<B: Backbone>(model: &PetlModel<B>, images: &Tensor) -> Check {
    disturb(model)?;
    loss(&model.forward(images, false)?)?.f_backward()?;
    for (name, variable) in variables(model) {
        let gradient = variable.f_grad()?;
        ensure(gradient.defined(), || format!("{name} has no gradient"))?;
        let most = gradient.f_abs()?.f_max()?.f_double_value(&[])?;
        ensure(most > 0.0, || format!("the gradient of {name} is {most}"))?;
    }
    Ok(())
}

/// With dropout and drop path on: [`PetlModel::backward_recomputed`], and the same from the kept
/// prefix, give the logits, the loss and the draws of one whole pass, and gradients within
/// `gap(name)` of its.
///
/// # Errors
/// A [`Failure`] that names what differs.
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
    ensure(same, || "logits or loss of the pass block by block differ".into())?;
    ensure(by_block.next_draw == whole.next_draw, || {
        "the pass block by block leaves libtorch's generator in another state".into()
    })?;
    for (name, gradient) in &whole.gradients {
        let found = relative(&by_block.gradients[name], gradient)?;
        ensure(found <= gap(name), || {
            format!("the recomputed gradient of {name} is off by {found:e}")
        })?;
    }
    if model.frozen_blocks().is_none() {
        return Ok(());
    }
    let from_prefix = Backward::of(model, || {
        model.backward_recomputed_from(model.frozen_prefix(images)?, loss_of)
    })?;
    let same = (&from_prefix.logits, &from_prefix.loss) == (&whole.logits, &whole.loss);
    ensure(same, || "logits or loss from the kept prefix differ".into())?;
    for (name, gradient) in &from_prefix.gradients {
        ensure(*gradient == by_block.gradients[name], || {
            format!("the gradient of {name} from the kept prefix differs")
        })?;
    }
    tch::manual_seed(SEED);
    let logits = model.forward_from(model.frozen_prefix(images)?, true)?;
    ensure(logits == whole.logits, || "training logits from the kept prefix differ".into())
}

/// In evaluation, the blocks that the method leaves as they are give the same logits when they are
/// computed once and kept.
///
/// # Errors
/// A [`Failure`] if they do not.
pub fn keeps_its_prefix<B: Backbone>(model: &PetlModel<B>, images: &Tensor) -> Check {
    let Some(blocks) = model.frozen_blocks() else { return Ok(()) };
    disturb(model)?;
    let (whole, from_prefix) = tch::no_grad(|| {
        let prefix = model.frozen_prefix(images)?;
        Ok::<_, Error>((model.forward(images, false)?, model.forward_from(prefix, false)?))
    })?;
    ensure(whole == from_prefix, || {
        format!("logits from what leaves the first {blocks} blocks differ (acts_from says so)")
    })
}

/// The count without a model is that of the built one, and the bytes are those of its file.
///
/// # Errors
/// A [`Failure`] with both counts.
pub fn is_audited<B: Backbone>(model: &PetlModel<B>) -> Check {
    let row = audit_shape(&model.backbone().shape(), &model.config().method)?;
    let built = model.trainable_params();
    let (found, expected) =
        ((row.params, row.backbone), (built.method as i64, built.backbone() as i64));
    ensure(found == expected, || {
        format!(
            "the audit counts {found:?} weights of method and backbone, the model has {expected:?}"
        )
    })
}

/// What is saved loads with the same config and the same logits, and is saved again as the same
/// bytes.
///
/// # Errors
/// A [`Failure`] that says what differs.
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
        found.ok_or_else(|| format!("the file holds another method {name} than was saved").into())
    };
    let reader = reader.unwrap_or(&own);
    let again = PetlModel::load_adapter_with(model.backbone().clone(), &first, reader)?;
    ensure(again.config() == model.config(), || "the loaded config is another one".into())?;
    let logits = |model: &PetlModel<B>| tch::no_grad(|| model.forward(images, false));
    ensure(logits(&again)? == logits(model)?, || "logits of the loaded model differ".into())?;
    again.save_adapter(&second)?;
    let same = std::fs::read(&first)? == std::fs::read(&second)?;
    ensure(same, || "the loaded model is saved as other bytes".into())
}

/// The method of that name and config within `method`.
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
