//! Finds the weights in a pickle: the one dict of named tensors that is a state dict.

use std::collections::{BTreeMap, HashSet};

use super::value::{Arena, Id, Value, View};
use super::{MAX_KEY_BYTES, MAX_NAME_BYTES, PickleError, Result};

/// The tensors of a state dict, and the keys that lead to it in the file.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::checkpoint) struct StateDict {
    pub(in crate::checkpoint) tensors: BTreeMap<String, View>,
    /// The keys from the outermost dict to the state dict; empty if it is the outermost dict.
    pub(in crate::checkpoint) keys: Vec<String>,
}

/// How deep below the outermost dict a state dict may be.
const MAX_DEPTH: usize = 4;

/// Starts of keys below which there are no weights of a model.
const NO_WEIGHTS: [&str; 7] =
    ["optim", "lr_scheduler", "scheduler", "scaler", "amp", "rng", "random"];

/// A dict in the file that has tensors.
struct Candidate {
    dict: Id,
    keys: Vec<String>,
    likeness: Likeness,
}

/// How much the tensors of a dict look like the weights of a model.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Likeness {
    /// All tensors are scalars or of a dtype that no weight has, such as the state of a generator
    /// of random numbers.
    Other,
    /// There are arrays, whose names have one segment.
    Arrays,
    /// There are arrays whose names have several segments, as the names of modules have.
    Modules,
}

/// Returns the weights in a pickle whose value is `top`: the tensors of the one dict that looks
/// like a state dict. It may be the outermost dict, or be below any keys. Values other than
/// tensors are left out.
///
/// # Errors
/// [`PickleError::Several`] if there are several with different tensors, [`PickleError::Global`] if
/// there is an object of another class in place of one, [`PickleError::NoTensors`] otherwise.
pub(in crate::checkpoint) fn state_dict(values: &Arena, top: Id) -> Result<StateDict> {
    let mut candidates = candidates(values, top);
    let Some(best) = candidates.iter().map(|candidate| candidate.likeness).max() else {
        return Err(nothing(values, top));
    };
    candidates.retain(|candidate| candidate.likeness == best);
    let first = &candidates[0];
    let found = tensors(values, first.dict);
    let other = |candidate: &&Candidate| tensors(values, candidate.dict) != found;
    if best > Likeness::Other && candidates[1..].iter().any(|candidate| other(&candidate)) {
        let name = |candidate: &Candidate| match &candidate.keys[..] {
            [] => "the outermost dict".to_owned(),
            keys => keys.join("."),
        };
        return Err(PickleError::Several(candidates.iter().map(name).collect()));
    }
    Ok(StateDict { tensors: found, keys: first.keys.clone() })
}

/// Returns the dicts that have tensors, the outermost one first.
fn candidates(values: &Arena, top: Id) -> Vec<Candidate> {
    let (mut found, mut seen) = (Vec::new(), HashSet::from([top]));
    let mut level = vec![(top, Vec::new())];
    for _ in 0..=MAX_DEPTH {
        let mut next = Vec::new();
        for (dict, keys) in level {
            if let Some(likeness) = likeness(values, dict) {
                found.push(Candidate { dict, keys: keys.clone(), likeness });
            }
            for (key, inner) in dicts(values, dict) {
                if seen.insert(inner) {
                    next.push((inner, [&keys[..], &[key.to_owned()]].concat()));
                }
            }
        }
        level = next;
    }
    found
}

/// Returns the dicts directly below a dict, with their keys.
fn dicts(values: &Arena, dict: Id) -> impl Iterator<Item = (&str, Id)> {
    values.items(dict).iter().filter_map(|&(key, value)| {
        let key = values.text(key).ok().filter(|key| key.len() <= MAX_KEY_BYTES)?;
        let is_dict = matches!(values.get(value), Value::Dict(_));
        let weights = !NO_WEIGHTS.iter().any(|start| key.starts_with(start));
        (is_dict && weights).then_some((key, value))
    })
}

/// Returns the highest likeness of a tensor of a dict, or `None` if it has no tensor.
fn likeness(values: &Arena, dict: Id) -> Option<Likeness> {
    let of = |(name, view): (&str, &View)| {
        if view.shape.is_empty() || view.element.is_other() {
            Likeness::Other
        } else if name.contains('.') {
            Likeness::Modules
        } else {
            Likeness::Arrays
        }
    };
    named(values, dict).map(of).max()
}

/// Returns the named tensors of a dict. If a name was set twice, the last tensor counts.
fn tensors(values: &Arena, dict: Id) -> BTreeMap<String, View> {
    named(values, dict).map(|(name, view)| (name.to_owned(), view.clone())).collect()
}

fn named(values: &Arena, dict: Id) -> impl Iterator<Item = (&str, &View)> {
    values.items(dict).iter().filter_map(|&(key, value)| {
        match (values.get(key), values.get(value)) {
            (Value::Str(name), Value::Tensor(view)) if name.len() <= MAX_NAME_BYTES => {
                Some((name.as_str(), view))
            }
            _ => None,
        }
    })
}

/// Returns the error for a pickle without named tensors.
fn nothing(values: &Arena, top: Id) -> PickleError {
    let foreign = |id: Id| match values.get(id) {
        Value::Foreign(name) => Some(name.clone()),
        _ => None,
    };
    let inside = || values.items(top).iter().find_map(|&(_, value)| foreign(value));
    if let Some(name) = foreign(top).or_else(inside) {
        return PickleError::Global(name);
    }
    let keys = values.items(top).iter().filter_map(|&(key, _)| values.text(key).ok());
    let keys = keys.filter(|key| key.len() <= MAX_KEY_BYTES).map(str::to_owned);
    PickleError::NoTensors(keys.collect())
}
