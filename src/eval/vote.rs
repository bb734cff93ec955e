//! The answers of an ensemble by majority vote.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// Returns the class with the highest logit for each row of `logits` `[B, K]`, the first one of
/// several that are equal. A row with a logit that is NaN or infinite has no such class: `None`.
///
/// # Errors
/// [`Error::Input`] if `logits` is not `[B, K]` with a K of at least 1.
pub fn predictions(logits: &Tensor) -> Result<Vec<Option<i64>>> {
    let size = if logits.defined() { logits.size() } else { Vec::new() };
    let classes = match size[..] {
        [_, classes] if classes > 0 => classes as usize,
        _ => {
            let (argument, expected) = ("logits", "[B, K] with K >= 1".to_owned());
            return Err(Error::Input { argument, expected, found: format!("{size:?}") });
        }
    };
    let logits = logits.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    let values = Vec::<f64>::try_from(logits.f_contiguous()?.f_view([-1])?)?;
    Ok(values.chunks_exact(classes).map(highest).collect())
}

/// Returns the first of the highest logits, or `None` if one is not finite.
fn highest(logits: &[f64]) -> Option<i64> {
    if !logits.iter().all(|logit| logit.is_finite()) {
        return None;
    }
    let better =
        |best: usize, class: usize| if logits[class] > logits[best] { class } else { best };
    Some((0..logits.len()).fold(0, better) as i64)
}

/// Returns the answer of an ensemble to each query: the class that most members vote for, and of
/// several classes with equally many votes the smallest.
///
/// `members` has the votes of each member for every query, such as those of [`predictions`]. `None`
/// is no vote. A query for which no member votes has no answer. FewTrans (arXiv 2603.00478)
/// combines models that were trained with different learning rates in this way.
///
/// ```
/// use convpass::eval::vote;
/// # fn main() -> convpass::Result<()> {
/// let members = [[2, 1], [1, 1], [2, 0], [0, 0]].map(|votes| votes.map(Some));
/// assert_eq!(vote(&members)?, [Some(2), Some(0)]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::Input`] if there are no members, if they have different numbers of queries, or if a
/// class is negative.
pub fn vote<V: AsRef<[Option<i64>]>>(members: &[V]) -> Result<Vec<Option<i64>>> {
    let wrong = |expected: String, found: String| {
        Err(Error::Input { argument: "members", expected, found })
    };
    let Some(first) = members.first() else {
        return wrong("the votes of one member or more".to_owned(), "none".to_owned());
    };
    let queries = first.as_ref().len();
    for (at, votes) in members.iter().map(AsRef::as_ref).enumerate() {
        if votes.len() != queries {
            let found = format!("{} of member {at}", votes.len());
            return wrong(format!("{queries} votes, as of member 0"), found);
        }
        if let Some(class) = votes.iter().flatten().find(|class| **class < 0) {
            return wrong("classes from 0".to_owned(), format!("{class} of member {at}"));
        }
    }
    Ok((0..queries).map(|query| mode(members.iter().map(|votes| votes.as_ref()[query]))).collect())
}

/// Returns the most frequent class, the smallest one of several.
fn mode(votes: impl Iterator<Item = Option<i64>>) -> Option<i64> {
    let mut counts: BTreeMap<i64, usize> = BTreeMap::new();
    for class in votes.flatten() {
        *counts.entry(class).or_default() += 1;
    }
    let most = counts.values().max()?;
    counts.iter().find(|(_, count)| *count == most).map(|(&class, _)| class)
}
