//! [`Graph`]: collects the nodes and the constant tensors of an ONNX graph.

use std::collections::{BTreeMap, BTreeSet};

use tch::{Kind, Tensor};

use super::proto::{AttributeProto, NodeProto};
use crate::error::{Error, Result};

/// The result of a node, an input of the graph, or a constant, by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GraphValue(pub(super) String);

/// A graph under construction. Each function that adds a node returns its result, so that a node
/// can only read what comes before it.
#[derive(Debug, Default)]
pub(super) struct Graph {
    pub(super) nodes: Vec<NodeProto>,
    /// Constants in f32 and i64, in the order in which they are first used.
    pub(super) constants: Vec<(String, Tensor)>,
    /// How many values have each name, apart from the number behind it.
    names: BTreeMap<String, usize>,
    /// The part of the network that is under construction, such as `blocks.3.attn`.
    scope: String,
}

impl Graph {
    /// Declares an input of the graph.
    pub(super) fn input(&mut self, name: &str) -> GraphValue {
        self.names.insert(name.to_owned(), 1);
        GraphValue(name.to_owned())
    }

    /// Names the nodes that follow after a part of the network.
    pub(super) fn enter(&mut self, scope: impl Into<String>) {
        self.scope = scope.into();
    }

    /// Adds a node with one result.
    pub(super) fn node(
        &mut self,
        op: &str,
        inputs: &[&GraphValue],
        attributes: Vec<AttributeProto>,
    ) -> GraphValue {
        let name = self.fresh_name(op);
        self.push(op, inputs, vec![name.clone()], attributes);
        GraphValue(name)
    }

    /// Adds a node with `count` results.
    pub(super) fn node_with(
        &mut self,
        op: &str,
        inputs: &[&GraphValue],
        attributes: Vec<AttributeProto>,
        count: usize,
    ) -> Vec<GraphValue> {
        let outputs: Vec<String> = (0..count).map(|_| self.fresh_name(op)).collect();
        self.push(op, inputs, outputs.clone(), attributes);
        outputs.into_iter().map(GraphValue).collect()
    }

    /// Returns the constant `name` with the elements of `tensor`. A name stands for one tensor: a
    /// second constant of the same name is the first one.
    pub(super) fn constant(&mut self, name: impl Into<String>, tensor: Tensor) -> GraphValue {
        let name = name.into();
        if self.names.insert(name.clone(), 1).is_none() {
            self.constants.push((name.clone(), tensor));
        }
        GraphValue(name)
    }

    /// Returns a constant list of integers.
    pub(super) fn ints(&mut self, values: &[i64]) -> GraphValue {
        let text: Vec<String> = values.iter().map(i64::to_string).collect();
        self.constant(format!("ints.{}", text.join("_")), Tensor::from_slice(values))
    }

    /// Returns a constant number, in f32 and without dimensions.
    pub(super) fn number(&mut self, value: f64) -> GraphValue {
        self.constant(format!("number.{value}"), Tensor::from(value as f32))
    }

    /// Gives `value` the name `name`. It must be the result of the last node.
    pub(super) fn rename(&mut self, value: GraphValue, name: &str) -> GraphValue {
        let outputs = self.nodes.last_mut().into_iter().flat_map(|node| &mut node.output);
        for output in outputs.filter(|output| **output == value.0) {
            *output = name.to_owned();
        }
        GraphValue(name.to_owned())
    }

    fn push(
        &mut self,
        op: &str,
        inputs: &[&GraphValue],
        output: Vec<String>,
        attribute: Vec<AttributeProto>,
    ) {
        let input = inputs.iter().map(|value| value.0.clone()).collect();
        let (name, op_type) = (output[0].clone(), op.to_owned());
        self.nodes.push(NodeProto { input, output, name, op_type, attribute });
    }

    fn fresh_name(&mut self, op: &str) -> String {
        let mut name = format!("{}.{}", self.scope, op.to_lowercase());
        let count = self.names.entry(name.clone()).or_default();
        *count += 1;
        if *count > 1 {
            name = format!("{name}_{count}");
        }
        name
    }
}

/// Named tensors, each of which has to be used.
#[derive(Debug)]
pub(super) struct WeightSet {
    /// What the tensors belong to, for errors.
    owner: String,
    tensors: BTreeMap<String, Tensor>,
    used: BTreeSet<String>,
}

impl WeightSet {
    pub(super) fn new(owner: impl Into<String>, tensors: BTreeMap<String, Tensor>) -> Self {
        WeightSet { owner: owner.into(), tensors, used: BTreeSet::new() }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Returns the tensor `name`, which is then used.
    pub(super) fn get(&mut self, name: &str) -> Result<Tensor> {
        self.find(name)?.ok_or_else(|| {
            let reason = format!("it has no weight {name}");
            not_exportable(&self.owner, reason)
        })
    }

    /// Returns the tensor `name` if there is one.
    pub(super) fn find(&mut self, name: &str) -> Result<Option<Tensor>> {
        let Some(tensor) = self.tensors.get(name) else { return Ok(None) };
        self.used.insert(name.to_owned());
        match tensor.kind() {
            Kind::Float => Ok(Some(tensor.shallow_clone())),
            kind => Err(not_exportable(&self.owner, format!("{name} is in {kind:?}, not in f32"))),
        }
    }

    /// Returns an error if a tensor was not used: the graph would compute something else than the
    /// model.
    pub(super) fn check_used(&self) -> Result<()> {
        match self.tensors.keys().find(|name| !self.used.contains(*name)) {
            None => Ok(()),
            Some(name) => {
                let reason = format!("the graph has no place for its weight {name}");
                Err(not_exportable(&self.owner, reason))
            }
        }
    }
}

/// Returns the error for a part of a model that cannot be exported as ONNX.
pub(super) fn not_exportable(model: &str, reason: impl Into<String>) -> Error {
    Error::NotExportable { model: model.to_owned(), form: "ONNX", reason: reason.into() }
}
