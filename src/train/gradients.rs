//! The gradients of a step, and their sum over the processes of a run.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::captured::Captured;
use super::loss::Loss;
use super::run::Run;
use super::sampler::OwnPart;
use crate::backbone::Backbone;
use crate::error::Result;
use crate::eval::{Inputs, Team};
use crate::ffi::{clear_gradient, send};
use crate::model::PetlModel;
use crate::nn::Rows;

/// What a step adds up beside the gradients, over all images and processes.
#[derive(Debug)]
pub(super) struct StepSum {
    /// `[2]`: the mean loss of the images, and the number of images whose highest logit is that of
    /// their label. It may still have to be computed on the device.
    pub(super) values: Tensor,
    /// Whether a process was asked to end before this step.
    pub(super) is_stopped: bool,
}

impl<'a, B: Backbone> Run<'a, B> {
    /// Leaves the gradients of the mean loss of a step in the trainables. `images` are the images of
    /// the step in all processes, in order; `batches` yields those of this process. A `captured`
    /// step replays its pass.
    pub(super) fn gradients<'i>(
        &self,
        inputs: &'i Inputs<'i>,
        batches: &mut dyn Iterator<Item = Result<(Tensor, Tensor)>>,
        images: &[usize],
        captured: Option<&mut Captured<'i>>,
    ) -> Result<StepSum>
    where
        'a: 'i,
    {
        if let Some(captured) = captured {
            let values = self.replayed(inputs, batches, captured)?;
            return Ok(StepSum { values, is_stopped: self.stopping });
        }
        let before = take_gradients(self.variables.values())?;
        let parts = self.sampler.parts();
        let count = images.len() / self.config.batch_size;
        let is_one_pass = count == 1 && parts.len() == 1 && self.sampler.team.is_alone();
        // Each pass has its share in the mean of the step.
        let all = if is_one_pass { None } else { Some(inputs.labels_at(images)?) };
        let mut values = Vec::new();
        for batch in batches.take(count) {
            let (batch, labels) = batch?;
            for part in &parts {
                if part.within.is_empty() {
                    inputs.skip()?;
                    continue;
                }
                values.push(self.pass(inputs, (&batch, &labels), part, all.as_ref())?);
            }
        }
        let values = match &values[..] {
            [one] => one.shallow_clone(),
            [] => Tensor::f_zeros([2], (Kind::Float, Device::Cpu))?,
            _ => Tensor::f_stack(&values, 0)?.f_sum_dim_intlist(&[0i64][..], false, None)?,
        };
        before.into_iter().try_for_each(give_gradient)?;
        let sum = StepSum { values, is_stopped: self.stopping };
        sum_over(self.sampler.team, &self.variables, sum)
    }

    /// Adds the gradients of one pass. Returns the share of the loss and the number of hits, `[2]`.
    fn pass(
        &self,
        inputs: &Inputs,
        (batch, labels): (&Tensor, &Tensor),
        part: &OwnPart,
        all: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (first, length) = (part.within.start as i64, part.within.len() as i64);
        let batch = batch.f_narrow(0, first, length)?;
        let labels = labels.f_narrow(0, first, length)?;
        let loss = |logits: &Tensor| loss(&self.loss, logits, &labels, all);
        let _rows = part.rows.map(Rows::enter);
        let recompute = self.config.recompute;
        loss_and_hits(self.model, inputs, (&batch, &labels), recompute, &loss)
    }
}

/// Adds the gradients of a pass over a batch with the function `loss`. Returns the loss and the
/// number of hits, `[2]`.
pub(super) fn loss_and_hits<B: Backbone>(
    model: &PetlModel<B>,
    inputs: &Inputs,
    (batch, labels): (&Tensor, &Tensor),
    recompute: bool,
    loss: &dyn Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (logits, loss) = inputs.backward(model, batch, recompute, loss)?;
    // In bf16 and f16 there are no large numbers of hits.
    let kind = if loss.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let hits = logits.f_argmax(-1, false)?.f_eq_tensor(labels)?.f_sum(kind)?;
    Ok(Tensor::f_stack(&[&loss.f_to_kind(kind)?, &hits], 0)?)
}

/// Returns the loss of a pass: its mean, or its share in the mean over images with the labels `all`.
fn loss(loss: &Loss, logits: &Tensor, labels: &Tensor, all: Option<&Tensor>) -> Result<Tensor> {
    match all {
        None => loss.mean(logits, labels),
        Some(all) => loss.part(logits, labels, &send(all, labels.device())?),
    }
}

/// Sums the gradients of `variables` and `sum` over the processes, with one all-reduce over one
/// contiguous tensor. A variable has a gradient after it if it had one in any process.
fn sum_over(team: Team, variables: &BTreeMap<String, Tensor>, sum: StepSum) -> Result<StepSum> {
    if team.is_alone() {
        return Ok(sum);
    }
    let Some(first) = variables.values().next() else { return Ok(sum) };
    let (kind, device) = (Kind::Float, first.device());
    let (mut parts, mut has_gradient) = (Vec::new(), Vec::new());
    for variable in variables.values() {
        let gradient = variable.f_grad()?;
        has_gradient.push(if gradient.defined() { 1.0 } else { 0f32 });
        parts.push(if gradient.defined() {
            gradient.f_detach()?.f_to_kind(kind)?.f_reshape([-1])?
        } else {
            Tensor::f_zeros([variable.numel() as i64], (kind, device))?
        });
    }
    let stopped = if sum.is_stopped { 1.0 } else { 0.0 };
    let flags: Vec<f32> = [stopped].into_iter().chain(has_gradient).collect();
    parts.push(sum.values.f_to_kind(kind)?.f_to_device(device)?);
    parts.push(send(&Tensor::f_from_slice(&flags)?, device)?);
    let mut bucket = Tensor::f_cat(&parts, 0)?;
    team.sum(&mut bucket)?;
    let others = 2 + flags.len() as i64;
    let others = bucket.f_narrow(0, bucket.size()[0] - others, others)?;
    let others = others.f_to_device(Device::Cpu)?;
    let flags = Vec::<f32>::try_from(others.f_narrow(0, 2, flags.len() as i64)?)?;
    let mut start = 0;
    for (variable, &had) in variables.values().zip(&flags[1..]) {
        let length = variable.numel() as i64;
        if had > 0.0 {
            give_gradient(variable)?;
            let value = bucket.f_narrow(0, start, length)?.f_reshape(variable.size())?;
            tch::no_grad(|| variable.f_grad()?.f_copy_(&value))?;
        }
        start += length;
    }
    Ok(StepSum { values: others.f_narrow(0, 0, 2)?, is_stopped: flags[0] > 0.0 })
}

/// Takes the gradients of the last step away, and returns the variables that had one.
pub(super) fn take_gradients<'a>(
    variables: impl Iterator<Item = &'a Tensor>,
) -> Result<Vec<&'a Tensor>> {
    let mut before = Vec::new();
    for variable in variables {
        if variable.f_grad()?.defined() {
            clear_gradient(variable)?;
            before.push(variable);
        }
    }
    Ok(before)
}

/// Gives a variable without a gradient one of zero. An optimizer skips a variable that has never had
/// a gradient, but not one whose gradient is zero.
pub(super) fn give_gradient(variable: &Tensor) -> Result<()> {
    if variable.f_grad()?.defined() {
        return Ok(());
    }
    Ok(variable.f_sum(None::<Kind>)?.f_mul_scalar(0.0)?.f_backward()?)
}
