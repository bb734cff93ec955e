//! The values that a pass computes with if they differ from the variables: values in another dtype,
//! or values rounded to a codebook of few bits.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::low_bit::Coding;
use super::params::{Param, ParamSource};
use crate::error::{Error, Result};
use crate::ffi::Recording;

/// Values of f32 variables in the dtype of a pass.
///
/// A method is built over these tensors once. After that, [`PassValues::refresh`] rewrites the
/// values of changed variables. It writes in place and connects each value to its variable in the
/// autograd graph, so the method and the unchanged values stay as they are.
#[derive(Debug)]
pub(crate) struct PassValues {
    kind: Kind,
    values: Vec<PassValue>,
}

#[derive(Debug)]
struct PassValue {
    name: String,
    variable: Tensor,
    coding: Option<Coding>,
    value: Tensor,
    /// libtorch's version counter of the variable when the value was written.
    version: Option<i64>,
}

impl PassValues {
    pub(crate) fn new(kind: Kind) -> Self {
        PassValues { kind, values: Vec::new() }
    }

    /// Adds a value for `variable` and returns the tensor that will hold it.
    pub(crate) fn add(
        &mut self,
        name: &str,
        variable: &Tensor,
        coding: Option<Coding>,
    ) -> Result<Tensor> {
        let value = variable.f_detach()?.f_zeros_like()?.f_to_kind(self.kind)?;
        let (variable, tensor) = (variable.shallow_clone(), value.shallow_clone());
        self.values.push(PassValue {
            name: name.to_owned(),
            variable,
            coding,
            value,
            version: None,
        });
        Ok(tensor)
    }

    /// Returns a source of weights that adds a value for each requested variable.
    pub(crate) fn of<'a>(
        &'a mut self,
        variables: &'a BTreeMap<String, Tensor>,
    ) -> impl ParamSource + 'a {
        Adding { values: self, variables }
    }

    /// Returns the values by the names of their variables. They share memory with those of the pass.
    pub(crate) fn named(&self) -> BTreeMap<String, Tensor> {
        let named = |value: &PassValue| (value.name.clone(), value.value.shallow_clone());
        self.values.iter().map(named).collect()
    }

    /// Rewrites the values that are out of date. `is_coded` returns whether a variable already
    /// holds a value of its codebook.
    pub(crate) fn refresh(
        &mut self,
        is_coded: impl Fn(&str, &Tensor) -> Result<bool>,
    ) -> Result<()> {
        // This tests whether gradients are tracked; tch has no function for it.
        let leaf = Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?.f_set_requires_grad(true)?;
        let tracked = leaf.f_neg()?.requires_grad();
        for value in &mut self.values {
            value.refresh(tracked, &is_coded)?;
        }
        Ok(())
    }
}

impl PassValue {
    fn refresh(
        &mut self,
        tracked: bool,
        is_coded: impl Fn(&str, &Tensor) -> Result<bool>,
    ) -> Result<()> {
        let version = self.variable.f_internal_version()?;
        let (has_graph, trained) = (self.value.requires_grad(), self.variable.requires_grad());
        // A value may keep a graph that this pass does not need.
        let graph_fits = if trained { has_graph || !tracked } else { !has_graph };
        // Replays of a recorded pass follow an optimizer, so the writes have to be part of it.
        if self.version == Some(version) && graph_fits && !Recording::is_active() {
            return Ok(());
        }
        let value = match self.coding {
            Some(coding) if !is_coded(&self.name, &self.variable)? => {
                coding.straight_through(&self.variable)?
            }
            _ => self.variable.shallow_clone(),
        };
        let _detached = self.value.f_detach_()?;
        self.value.f_copy_(&value)?;
        self.version = Some(version);
        Ok(())
    }
}

struct Adding<'a> {
    values: &'a mut PassValues,
    variables: &'a BTreeMap<String, Tensor>,
}

impl ParamSource for Adding<'_> {
    fn get(&mut self, param: &Param) -> Result<Tensor> {
        match self.variables.get(param.name) {
            Some(variable) if variable.size() == param.shape => {
                self.values.add(param.name, variable, param.coding())
            }
            found => Err(Error::Input {
                argument: "variables",
                expected: format!("a variable {} of shape {:?}", param.name, param.shape),
                found: found.map_or("none".to_owned(), |found| format!("{:?}", found.size())),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_written_when_its_variable_changed_and_gradients_reach_the_variable() {
        let mut variable = Tensor::from_slice(&[1f32, -2.0]).set_requires_grad(true);
        let mut values = PassValues::new(Kind::BFloat16);
        let value = values.add("w", &variable, None).unwrap();
        let mut refresh = || {
            values.refresh(|_, _| Ok(false)).unwrap();
            value.f_internal_version().unwrap()
        };
        let without_graph = tch::no_grad(&mut refresh);
        assert_eq!(tch::no_grad(&mut refresh), without_graph);
        let with_graph = refresh();
        assert!(with_graph > without_graph && value.requires_grad());
        // Two passes use one value, and a pass without gradients runs in between.
        assert_eq!((tch::no_grad(&mut refresh), refresh()), (with_graph, with_graph));
        // A recorded pass writes it each time.
        let recorded = {
            let _recording = Recording::enter();
            refresh()
        };
        assert!(recorded > with_graph);
        for _ in 0..2 {
            (&value * 3.0).sum(Kind::Float).backward();
        }
        assert_eq!(variable.grad(), Tensor::from_slice(&[6f32, 6.0]));
        tch::no_grad(|| variable.f_add_scalar_(1.0).map(drop)).unwrap();
        refresh();
        assert_eq!(value.to_kind(Kind::Float).detach(), Tensor::from_slice(&[2f32, -1.0]));
        variable.zero_grad();
        (&value * 3.0).sum(Kind::Float).backward();
        assert_eq!(variable.grad(), Tensor::from_slice(&[3f32, 3.0]));
    }
}
