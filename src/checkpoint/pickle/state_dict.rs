//! Finds the tensors in a pickled state dict.

use std::collections::BTreeMap;

use super::value::{Arena, Id, Value, View};
use super::{MAX_NAME_BYTES, Machine, Result};

/// Returns the tensors of a pickled state dict by name.
///
/// The tensors of the outermost dict are used. If it holds none, the function uses the one dict of
/// tensors under `state_dict`, `model` or `model_state`. Values other than tensors are left out.
pub(in crate::checkpoint) fn state_dict(pickle: &[u8]) -> Result<BTreeMap<String, View>> {
    let (values, top) = Machine::run(pickle)?;
    let at_top = tensors(&values, top);
    if !at_top.is_empty() {
        return Ok(at_top);
    }
    let mut nested = ["state_dict", "model", "model_state"]
        .into_iter()
        .filter_map(|key| item(&values, top, key))
        .map(|id| tensors(&values, id))
        .filter(|tensors| !tensors.is_empty());
    match (nested.next(), nested.next()) {
        (Some(tensors), None) => Ok(tensors),
        (None, _) => {
            Err("holds no state dict: there are named tensors neither at the top nor under \
                          state_dict, model or model_state"
                .into())
        }
        _ => Err("holds several state dicts".into()),
    }
}

/// Returns the value of `key`. If the key was set twice, the last value counts.
fn item(values: &Arena, dict: Id, key: &str) -> Option<Id> {
    let found = values.items(dict).iter().rfind(|(id, _)| values.text(*id) == Ok(key));
    found.map(|&(_, value)| value)
}

fn tensors(values: &Arena, dict: Id) -> BTreeMap<String, View> {
    let named = |&(key, value): &(Id, Id)| match (values.get(key), values.get(value)) {
        (Value::Str(name), Value::Tensor(view)) if name.len() <= MAX_NAME_BYTES => {
            Some((name.clone(), view.clone()))
        }
        _ => None,
    };
    values.items(dict).iter().filter_map(named).collect()
}
