//! The values that a pass computes with where they are not the variables themselves: in another
//! dtype, or on a codebook of few bits.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::low_bit::Coding;
use super::params::{Param, ParamSource};
use crate::error::{Error, Result};

/// Values of f32 variables in the dtype of a pass.
///
/// A method is built over these tensors once. [`PassValues::refresh`] then writes those anew whose
/// variable has changed, in place and with a graph that leads to the variable, so that neither the
/// method nor a value that is still right is made again.
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
    /// libtorch's count of writes to the variable when the value was written.
    version: Option<i64>,
}

impl PassValues {
    pub(crate) fn new(kind: Kind) -> Self {
        PassValues { kind, values: Vec::new() }
    }

    /// The tensor that will hold the value of `variable`.
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

    /// A source of weights that adds a value for each variable that is asked for.
    pub(crate) fn of<'a>(
        &'a mut self,
        variables: &'a BTreeMap<String, Tensor>,
    ) -> impl ParamSource + 'a {
        Adding { values: self, variables }
    }

    /// Writes the values anew that are out of date. `is_coded` says whether a variable holds a
    /// value of its codebook already.
    pub(crate) fn refresh(
        &mut self,
        is_coded: impl Fn(&str, &Tensor) -> Result<bool>,
    ) -> Result<()> {
        // Whether gradients are tracked here: tch has no question for it.
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
        // A graph that this pass does not need does no harm.
        let graph_fits = if trained { has_graph || !tracked } else { !has_graph };
        if self.version == Some(version) && graph_fits {
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
                expected: format!("one named {} of shape {:?}", param.name, param.shape),
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
        // Two passes over one value, and one without gradients in between.
        assert_eq!((tch::no_grad(&mut refresh), refresh()), (with_graph, with_graph));
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
