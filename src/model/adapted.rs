//! The method and the trained weights of the backbone, in the dtype that a pass computes in.

use std::cell::RefCell;
use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::low_bit::LowBit;
use crate::backbone::Backbone;
use crate::error::Result;
use crate::petl::{Method, PassValues};
use crate::seam::Seam;

/// A method built over values that are computed from its f32 variables: in another dtype, or with
/// few bits. The method is built once; the values are updated when the variables change.
#[derive(Debug)]
pub(super) struct Adapted<B> {
    pub(super) method: Box<dyn Seam>,
    /// The backbone over such values, if the method trains the backbone and the pass is not in f32.
    pub(super) unfrozen: Option<B>,
    values: RefCell<PassValues>,
}

impl<B: Backbone> Adapted<B> {
    /// Builds the method over values of `variables` for passes in the dtype `kind`.
    pub(super) fn new(
        method: &Method,
        variables: &BTreeMap<String, Tensor>,
        backbone: &B,
        unfrozen: Option<&B>,
        kind: Kind,
    ) -> Result<Self> {
        let mut values = PassValues::new(kind);
        let method = method.build(&mut values.of(variables), &backbone.shape())?;
        // A pass in f32 uses the trained weights themselves, which are f32; weights kept in f16
        // stay in f16.
        let unfrozen = unfrozen.filter(|_| kind != Kind::Float);
        let unfrozen =
            unfrozen.map(|unfrozen| converted(unfrozen, kind, &mut values)).transpose()?;
        Ok(Adapted { method, unfrozen, values: RefCell::new(values) })
    }

    /// Updates the values from the variables.
    pub(super) fn refresh(&self, low_bit: &LowBit) -> Result<()> {
        self.values.borrow_mut().refresh(|name, variable| low_bit.is_coded(name, variable))
    }
}

/// Converts `unfrozen` to the dtype `kind`. The weights that are variables become entries of
/// `values`.
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
