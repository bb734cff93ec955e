//! The state of a run that goes on in several processes: rank 0 has read it, and gives it to the
//! others.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::gradients::give_gradient;
use super::optimizer::Optimizer;
use super::state::{Reached, stored, without_gradient};
use crate::error::{Error, Result};
use crate::eval::Team;

/// What the others have to know beside the tensors.
#[derive(Serialize, Deserialize)]
struct Shared<R> {
    reached: R,
    /// Whether tensors follow.
    is_resumed: bool,
    without_gradient: BTreeSet<String>,
}

/// Gives what rank 0 `found` in its state file to the other processes of `team`: where the run is,
/// the weights and the state of the optimizer, after `steps` steps.
pub(super) fn share(
    team: Team,
    found: Option<Reached>,
    variables: &BTreeMap<String, Tensor>,
    optimizer: &mut dyn Optimizer,
    steps_per_epoch: usize,
) -> Result<Reached> {
    let is_resumed = found.is_some();
    let reached = found.unwrap_or_default();
    if team.is_alone() {
        return Ok(reached);
    }
    let own =
        Shared { reached: &reached, is_resumed, without_gradient: without_gradient(variables)? };
    let text =
        serde_json::to_string(&own).map_err(|e| Error::io("the state of the run")(e.into()))?;
    let text = text_of_first(team, &text)?;
    let shared: Shared<Reached> =
        serde_json::from_str(&text).map_err(|e| Error::io("the state of the run")(e.into()))?;
    if !shared.is_resumed {
        return Ok(reached);
    }
    let mut reached = if team.is_first() { reached } else { shared.reached };
    if !team.is_first() {
        for (name, variable) in variables {
            if !shared.without_gradient.contains(name) {
                give_gradient(variable)?;
            }
        }
        if let Some(best) = &mut reached.best {
            for (name, variable) in variables {
                best.weights.insert(name.clone(), variable.f_detach_copy()?);
            }
        }
    }
    let best = reached.best.iter().flat_map(|best| best.weights.values());
    let tensors = stored(variables, optimizer)?;
    for tensor in tensors.values().chain(best) {
        let mut tensor = tensor.f_detach()?;
        team.broadcast(&mut tensor)?;
    }
    if !team.is_first() {
        optimizer.resume(reached.cursor.epoch * steps_per_epoch + reached.cursor.step)?;
    }
    Ok(reached)
}

/// Returns the text of rank 0.
fn text_of_first(team: Team, own: &str) -> Result<String> {
    let mut length = Tensor::f_from_slice(&[own.len() as i64])?;
    team.broadcast(&mut length)?;
    let length = length.f_int64_value(&[0])?;
    let mut bytes = if team.is_first() {
        Tensor::f_from_slice(own.as_bytes())?
    } else {
        Tensor::f_zeros([length], (Kind::Uint8, Device::Cpu))?
    };
    team.broadcast(&mut bytes)?;
    Ok(String::from_utf8_lossy(&Vec::<u8>::try_from(&bytes)?).into_owned())
}
