//! A model in evaluation as plain f32 weights, which is what an export writes.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::petl_model::PetlModel;
use crate::backbone::Backbone;
use crate::error::Result;
use crate::petl::{Method, PassValues};
use crate::seam::BackboneShape;

/// A model with as much of its method as possible folded into the weights of the backbone. All
/// tensors are in f32 on the CPU.
#[derive(Debug)]
pub(crate) struct Folded<B> {
    pub(crate) backbone: B,
    /// The methods that do not fold into weights, in the order in which they act at each place.
    pub(crate) methods: Vec<FoldedMethod>,
    /// `[K, C]`.
    pub(crate) head_weight: Tensor,
    /// `[K]`.
    pub(crate) head_bias: Tensor,
}

/// A method beside the backbone, with the values of its own weights by name.
#[derive(Debug)]
pub(crate) struct FoldedMethod {
    pub(crate) method: Method,
    #[cfg_attr(not(feature = "onnx"), expect(dead_code, reason = "only graphs use them"))]
    pub(crate) values: BTreeMap<String, Tensor>,
}

impl<B: Backbone> PetlModel<B> {
    /// Folds every method into the backbone that can be folded in while the others act, too. A
    /// method that stores its weights at few bits counts as the method that it contains, over the
    /// values of its codes.
    pub(crate) fn folded(&self) -> Result<Folded<B>> {
        tch::no_grad(|| {
            let values = self.evaluated_values()?;
            let backbone = plain(self.unfrozen.as_ref().unwrap_or(self.backbone()))?;
            let shape = backbone.shape();
            let methods = flat(&self.config().method);
            let alone = methods.len() == 1;
            let (mut folds, mut others) = (Vec::new(), Vec::new());
            for method in methods {
                let mut own = PassValues::new(Kind::Float);
                let seam = method.build(&mut own.of(&values), &shape)?;
                if seam.can_merge() && (alone || method.inner().folds_beside_others()) {
                    folds.push(method.clone());
                } else {
                    own.refresh(|_, _| Ok(true))?;
                    others.push(FoldedMethod { method: method.clone(), values: own.named() });
                }
            }
            Ok(Folded {
                backbone: merged(backbone, folds, &values, &shape)?,
                methods: others,
                head_weight: plain_tensor(&self.head.weight)?,
                head_bias: match &self.head.bias {
                    Some(bias) => plain_tensor(bias)?,
                    None => Tensor::f_zeros([self.config().num_classes], FLOAT)?,
                },
            })
        })
    }

    /// Returns the values that an evaluation in f32 computes with, by the names of the variables.
    fn evaluated_values(&self) -> Result<BTreeMap<String, Tensor>> {
        let variables: BTreeMap<_, _> = self.var_store().variables().into_iter().collect();
        let mut coded = PassValues::new(Kind::Float);
        self.config().method.build(&mut coded.of(&variables), &self.backbone().shape())?;
        coded.refresh(|name, variable| self.low_bit.is_coded(name, variable))?;
        let named = variables.into_iter().chain(coded.named());
        named.map(|(name, value)| Ok((name, plain_tensor(&value)?))).collect()
    }
}

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

fn plain_tensor(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?)
}

/// Returns the backbone in f32 on the CPU. Weights in int8 are multiplied by their scales.
pub(crate) fn plain<B: Backbone>(backbone: &B) -> Result<B> {
    let named: BTreeMap<&str, &Tensor> =
        backbone.named_weights().iter().map(|(name, weight)| (name.as_str(), weight)).collect();
    backbone.map_weights(&mut |name, weight| {
        let value = plain_tensor(weight)?;
        let scale = name.strip_suffix(".weight").map(|layer| format!("{layer}.scale"));
        match scale.and_then(|scale| named.get(scale.as_str())) {
            Some(scale) if weight.kind() == Kind::Int8 => {
                Ok(value.f_mul(&plain_tensor(scale)?.f_unsqueeze(1)?)?)
            }
            _ => Ok(value),
        }
    })
}

/// Returns the methods that a method consists of, in order.
fn flat(method: &Method) -> Vec<&Method> {
    match method {
        Method::Compose { methods } => methods.iter().flat_map(flat).collect(),
        Method::LowBit(config) => flat(&config.method),
        method => vec![method],
    }
}

fn merged<B: Backbone>(
    backbone: B,
    methods: Vec<Method>,
    values: &BTreeMap<String, Tensor>,
    shape: &BackboneShape,
) -> Result<B> {
    if methods.is_empty() {
        return Ok(backbone);
    }
    let mut own = PassValues::new(Kind::Float);
    let seam = Method::Compose { methods }.build(&mut own.of(values), shape)?;
    own.refresh(|_, _| Ok(true))?;
    backbone.merge(&*seam)
}
