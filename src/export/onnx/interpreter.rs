//! Computes an exported graph with libtorch, from the bytes of its file: the twin of the graph that
//! the tests compare with the model.

use std::collections::HashMap;

use prost::Message;
use tch::{Device, Kind, Tensor};

use super::proto::{ModelProto, NodeProto, TensorProto};

/// Runs the file on `images`. `data` are the bytes of the file beside it.
///
/// A node that reads a value that does not exist yet panics, and so does an unknown operator.
pub(super) fn run(file: &[u8], data: &[u8], images: &Tensor) -> Tensor {
    let model = ModelProto::decode(file).unwrap();
    let graph = model.graph.unwrap();
    let mut values: HashMap<String, Tensor> =
        graph.initializer.iter().map(|t| (t.name.clone(), constant(t, data))).collect();
    assert_eq!(values.len(), graph.initializer.len(), "each constant has a name of its own");
    values.insert(graph.input[0].name.clone(), images.shallow_clone());
    for node in &graph.node {
        let inputs: Vec<&Tensor> = node.input.iter().map(|name| &values[name]).collect();
        let outputs = apply(node, &inputs);
        assert_eq!(outputs.len(), node.output.len(), "{}", node.name);
        for (name, value) in node.output.iter().zip(outputs) {
            assert!(values.insert(name.clone(), value).is_none(), "{name} is computed twice");
        }
    }
    let output = values[&graph.output[0].name].shallow_clone();
    let dims = graph.output[0].of.clone().unwrap().tensor_type.unwrap().shape.unwrap().dim;
    assert_eq!(dims[1].dim_value, Some(output.size()[1]));
    output
}

fn constant(tensor: &TensorProto, data: &[u8]) -> Tensor {
    let bytes = match (&tensor.raw_data, &tensor.external_data[..]) {
        (Some(bytes), []) => &bytes[..],
        (None, [_, offset, length]) => {
            let [at, len] = [offset, length].map(|entry| entry.value.parse::<usize>().unwrap());
            &data[at..at + len]
        }
        _ => panic!("{} has its elements in one place", tensor.name),
    };
    let kind = if tensor.data_type == TensorProto::INT64 { Kind::Int64 } else { Kind::Float };
    let count: i64 = tensor.dims.iter().product();
    assert_eq!(bytes.len(), count as usize * kind.elt_size_in_bytes(), "{}", tensor.name);
    Tensor::f_from_data_size(bytes, &tensor.dims, kind).unwrap()
}

fn ints(tensor: &Tensor) -> Vec<i64> {
    Vec::try_from(tensor.flatten(0, -1)).unwrap()
}

fn apply(node: &NodeProto, x: &[&Tensor]) -> Vec<Tensor> {
    let attribute = |name: &str| node.attribute.iter().find(|a| a.name == name);
    let int = |name: &str| attribute(name).and_then(|a| a.i).unwrap();
    let list = |name: &str| attribute(name).unwrap().ints.clone();
    let output = match node.op_type.as_str() {
        "Add" => x[0] + x[1],
        "Mul" => x[0] * x[1],
        "Div" => x[0] / x[1],
        "MatMul" => x[0].matmul(x[1]),
        "Erf" => x[0].erf(),
        "Tanh" => x[0].tanh(),
        "Sigmoid" => x[0].sigmoid(),
        "Relu" => x[0].relu(),
        "Softmax" => x[0].softmax(int("axis"), Kind::Float),
        "Transpose" => x[0].permute(list("perm")),
        "Concat" => Tensor::cat(x, int("axis")),
        "ReduceMean" => x[0].mean_dim(list("axes"), int("keepdims") == 1, Kind::Float),
        "Gather" => x[0].select(int("axis"), x[1].int64_value(&[])),
        "Shape" => Tensor::from_slice(&x[0].size()[int("start") as usize..int("end") as usize]),
        "Expand" => {
            let shape = ints(x[1]);
            let size = x[0].size();
            let larger: Vec<i64> = size.iter().zip(&shape).map(|(a, b)| *a.max(b)).collect();
            x[0].expand(larger, false)
        }
        "Reshape" => {
            let (size, wanted) = (x[0].size(), ints(x[1]));
            let place = |(at, &wanted): (usize, &i64)| if wanted == 0 { size[at] } else { wanted };
            x[0].reshape(wanted.iter().enumerate().map(place).collect::<Vec<_>>())
        }
        "Slice" => {
            let [start, end, axis] = [1, 2, 3].map(|i: usize| ints(x[i])[0]);
            assert!(
                0 <= start && start < end && end <= x[0].size()[axis as usize],
                "{}",
                node.name
            );
            x[0].narrow(axis, start, end - start)
        }
        "Split" => return x[0].split_with_sizes(ints(x[1]), int("axis")),
        "Conv" => {
            let (kernel, strides, pads) = (list("kernel_shape"), list("strides"), list("pads"));
            assert_eq!(x[1].size()[2..], kernel);
            x[0].conv2d(x[1], x.get(2).copied(), strides, &pads[..2], [1, 1], 1)
        }
        "LayerNormalization" => {
            assert_eq!(int("axis"), -1);
            let eps = attribute("epsilon").and_then(|a| a.f).unwrap();
            let size = [*x[0].size().last().unwrap()];
            x[0].layer_norm(size, Some(x[1]), Some(x[2]), f64::from(eps), false)
        }
        other => panic!("no operator {other}"),
    };
    vec![output]
}

/// A tensor of this shape that looks random and is always the same.
pub(super) fn waves(shape: &[i64], step: f64) -> Tensor {
    let count: i64 = shape.iter().product();
    (Tensor::arange(count, (Kind::Float, Device::Cpu)) * step).sin().view(shape)
}
