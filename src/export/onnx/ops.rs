//! The operations of the layers, as nodes.

use tch::Tensor;

use super::graph::{Graph, GraphValue, WeightSet};
use super::proto::AttributeProto;
use crate::error::Result;
use crate::nn::QUICK_GELU_SLOPE;

type Attribute = AttributeProto;

impl Graph {
    pub(super) fn add(&mut self, a: &GraphValue, b: &GraphValue) -> GraphValue {
        self.node("Add", &[a, b], Vec::new())
    }

    pub(super) fn mul(&mut self, a: &GraphValue, b: &GraphValue) -> GraphValue {
        self.node("Mul", &[a, b], Vec::new())
    }

    /// Multiplies by a number.
    pub(super) fn scaled(&mut self, x: &GraphValue, factor: f64) -> GraphValue {
        let factor = self.number(factor);
        self.mul(x, &factor)
    }

    pub(super) fn matmul(&mut self, a: &GraphValue, b: &GraphValue) -> GraphValue {
        self.node("MatMul", &[a, b], Vec::new())
    }

    pub(super) fn sigmoid(&mut self, x: &GraphValue) -> GraphValue {
        self.node("Sigmoid", &[x], Vec::new())
    }

    pub(super) fn relu(&mut self, x: &GraphValue) -> GraphValue {
        self.node("Relu", &[x], Vec::new())
    }

    /// Computes the softmax over the last dimension.
    pub(super) fn softmax(&mut self, x: &GraphValue) -> GraphValue {
        self.node("Softmax", &[x], vec![Attribute::int("axis", -1)])
    }

    pub(super) fn transpose(&mut self, x: &GraphValue, order: &[i64]) -> GraphValue {
        self.node("Transpose", &[x], vec![Attribute::ints("perm", order)])
    }

    /// Reshapes; a size of 0 is the size that `x` has there, as always for the batch.
    pub(super) fn reshape(&mut self, x: &GraphValue, sizes: &[i64]) -> GraphValue {
        let sizes = self.ints(sizes);
        self.node("Reshape", &[x, &sizes], Vec::new())
    }

    pub(super) fn concat(&mut self, parts: &[&GraphValue], axis: i64) -> GraphValue {
        match parts {
            [only] => (*only).clone(),
            _ => self.node("Concat", parts, vec![Attribute::int("axis", axis)]),
        }
    }

    /// Returns the elements `start..start + len` of a dimension.
    pub(super) fn narrow(&mut self, x: &GraphValue, axis: i64, start: i64, len: i64) -> GraphValue {
        let [start, end, axis] = [[start], [start + len], [axis]].map(|value| self.ints(&value));
        self.node("Slice", &[x, &start, &end, &axis], Vec::new())
    }

    /// Cuts a dimension into parts of these sizes.
    pub(super) fn split(&mut self, x: &GraphValue, axis: i64, sizes: &[i64]) -> Vec<GraphValue> {
        let parts = self.ints(sizes);
        self.node_with("Split", &[x, &parts], vec![Attribute::int("axis", axis)], sizes.len())
    }

    /// Computes the mean over the tokens of `[B, T, C]`: `[B, C]`.
    pub(super) fn mean_of_tokens(&mut self, x: &GraphValue) -> GraphValue {
        let attributes = vec![Attribute::ints("axes", &[1]), Attribute::int("keepdims", 0)];
        self.node("ReduceMean", &[x], attributes)
    }

    /// Returns the token `index` of `[B, T, C]`: `[B, C]`.
    pub(super) fn token(&mut self, x: &GraphValue, index: i64) -> GraphValue {
        let index = self.constant(format!("index.{index}"), Tensor::from(index));
        self.node("Gather", &[x, &index], vec![Attribute::int("axis", 1)])
    }

    /// Computes `[B, in, H, W] -> [B, out, H', W']`.
    pub(super) fn conv(
        &mut self,
        x: &GraphValue,
        (weight, bias): (&GraphValue, Option<&GraphValue>),
        [kernel, stride, padding]: [i64; 3],
    ) -> GraphValue {
        let inputs: Vec<&GraphValue> = [x, weight].into_iter().chain(bias).collect();
        let attributes = vec![
            Attribute::ints("kernel_shape", &[kernel; 2]),
            Attribute::ints("strides", &[stride; 2]),
            Attribute::ints("pads", &[padding; 4]),
        ];
        self.node("Conv", &inputs, attributes)
    }

    /// Multiplies by the transpose of `weight [out, in]` and adds `bias [out]`:
    /// `[.., in] -> [.., out]`.
    pub(super) fn product(
        &mut self,
        x: &GraphValue,
        name: &str,
        weight: &Tensor,
        bias: Option<Tensor>,
    ) -> Result<GraphValue> {
        let weight = self.constant(format!("{name}.weight"), weight.f_transpose(0, 1)?);
        let product = self.matmul(x, &weight);
        Ok(match bias {
            Some(bias) => {
                let bias = self.constant(format!("{name}.bias"), bias);
                self.add(&product, &bias)
            }
            None => product,
        })
    }

    /// Runs the linear layer `name` of `source`.
    pub(super) fn linear(
        &mut self,
        x: &GraphValue,
        source: &mut WeightSet,
        name: &str,
    ) -> Result<GraphValue> {
        let (weight, bias) =
            (source.get(&format!("{name}.weight"))?, source.find(&format!("{name}.bias"))?);
        self.product(x, name, &weight, bias)
    }

    /// Runs the rows `start..start + len` of the linear layer `name`. The constants are named after
    /// `part`.
    pub(super) fn linear_rows(
        &mut self,
        x: &GraphValue,
        (source, name): (&mut WeightSet, &str),
        (start, len): (i64, i64),
        part: &str,
    ) -> Result<GraphValue> {
        let weight = source.get(&format!("{name}.weight"))?.f_narrow(0, start, len)?;
        let bias = source.find(&format!("{name}.bias"))?;
        let bias = bias.map(|bias| bias.f_narrow(0, start, len)).transpose()?;
        self.product(x, &format!("{name}.{part}"), &weight, bias)
    }

    /// Runs the layer norm `name` of `source` over the last dimension.
    pub(super) fn norm(
        &mut self,
        x: &GraphValue,
        source: &mut WeightSet,
        name: &str,
        eps: f64,
    ) -> Result<GraphValue> {
        let [weight, bias] = ["weight", "bias"].map(|part| format!("{name}.{part}"));
        let (weight_tensor, bias_tensor) = (source.get(&weight)?, source.get(&bias)?);
        let weight = self.constant(weight, weight_tensor);
        let bias = self.constant(bias, bias_tensor);
        let attributes = vec![Attribute::int("axis", -1), Attribute::float("epsilon", eps as f32)];
        Ok(self.node("LayerNormalization", &[x, &weight, &bias], attributes))
    }

    /// Computes the exact GELU, in the form that runtimes recognize and compute as one.
    pub(super) fn gelu(&mut self, x: &GraphValue) -> GraphValue {
        let (root, one) = (self.number(std::f64::consts::SQRT_2), self.number(1.0));
        let scaled = self.node("Div", &[x, &root], Vec::new());
        let erf = self.node("Erf", &[&scaled], Vec::new());
        let sum = self.add(&erf, &one);
        let product = self.mul(x, &sum);
        self.scaled(&product, 0.5)
    }

    /// Computes GELU with the tanh approximation.
    pub(super) fn gelu_tanh(&mut self, x: &GraphValue) -> GraphValue {
        let square = self.mul(x, x);
        let cube = self.mul(&square, x);
        let cube = self.scaled(&cube, 0.044715);
        let sum = self.add(x, &cube);
        let inner = self.scaled(&sum, (2.0 / std::f64::consts::PI).sqrt());
        let tanh = self.node("Tanh", &[&inner], Vec::new());
        let one = self.number(1.0);
        let sum = self.add(&tanh, &one);
        let product = self.mul(x, &sum);
        self.scaled(&product, 0.5)
    }

    /// Computes `x * sigmoid(1.702 x)`.
    pub(super) fn quick_gelu(&mut self, x: &GraphValue) -> GraphValue {
        let scaled = self.scaled(x, QUICK_GELU_SLOPE);
        let gate = self.sigmoid(&scaled);
        self.mul(x, &gate)
    }

    /// Computes `x * sigmoid(x)`.
    pub(super) fn silu(&mut self, x: &GraphValue) -> GraphValue {
        let gate = self.sigmoid(x);
        self.mul(x, &gate)
    }
}
