//! The method, and what it trains of the backbone, in the dtype that a pass computes in.

use std::cell::RefCell;
use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::low_bit::LowBit;
use crate::backbone::Backbone;
use crate::error::Result;
use crate::petl::{Method, PassValues};
use crate::seam::Seam;

/// A method over values of its f32 variables in another dtype, or of few bits: built once, its
/// values written anew as the variables change.
#[derive(Debug)]
pub(super) struct Adapted<B> {
    pub(super) method: Box<dyn Seam>,
    /// The backbone over such values, where the method trains it and the pass is not in f32.
    pub(super) unfrozen: Option<B>,
    values: RefCell<PassValues>,
}

impl<B: Backbone> Adapted<B> {
    /// Over `variables`, for passes in `kind`.
    pub(super) fn new(
        method: &Method,
        variables: &BTreeMap<String, Tensor>,
        backbone: &B,
        unfrozen: Option<&B>,
        kind: Kind,
    ) -> Result<Self> {
        let mut values = PassValues::new(kind);
        let method = method.build(&mut values.of(variables), &backbone.shape())?;
        // What is trained is f32, and weights that are kept in f16 stay so.
        let unfrozen = unfrozen.filter(|_| kind != Kind::Float);
        let unfrozen =
            unfrozen.map(|unfrozen| converted(unfrozen, kind, &mut values)).transpose()?;
        Ok(Adapted { method, unfrozen, values: RefCell::new(values) })
    }

    /// Brings the values up to date.
    pub(super) fn refresh(&self, low_bit: &LowBit) -> Result<()> {
        self.values.borrow_mut().refresh(|name, variable| low_bit.is_coded(name, variable))
    }
}

/// `unfrozen` in `kind`, over values of those weights that are variables.
fn converted<B: Backbone>(unfrozen: &B, kind: Kind, values: &mut PassValues) -> Result<B> {
    let weights = unfrozen.named_weights().iter();
    let variables: BTreeMap<&str, &Tensor> = weights
        .filter(|(_, weight)| weight.requires_grad())
        .map(|(name, weight)| (name.as_str(), weight))
        .collect();
    tch::no_grad(|| unfrozen.to_kind(kind))?.map_weights(&mut |name, weight| match variables
        .get(name)
    {
        Some(variable) => values.add(name, variable, None),
        None => Ok(weight.shallow_clone()),
    })
}
