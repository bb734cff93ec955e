//! A method that makes a tensor on the CPU, or that reads a value, is found.

use convpass::petl::{ActsFrom, Params, PetlMethod};
use convpass::seam::{BackboneShape, Layer, Place, Seam};
use convpass::testing::check_method;
use convpass::{FrozenViT, Method, PetlConfig, PetlModel, Result};
use convpass_accelerator::Accelerator;
use tch::{Device, Tensor};

use crate::child;
use crate::contract::images;
use crate::variants::Contract;

/// What a method does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mistake {
    /// It adds a tensor that is always on the CPU.
    OnCpu,
    /// It computes with a value of a tensor.
    ReadsValue,
}

/// Adds a trained bias behind the MLP of the first block.
#[derive(Clone, Copy, Debug)]
struct Wrong(Mistake);

impl PetlMethod for Wrong {
    fn name(&self) -> &'static str {
        "wrong"
    }

    fn config(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    fn validate(&self) -> Result<()> {
        Ok(())
    }

    fn needs(&self) -> &[Place] {
        &[Place::Blocks]
    }

    fn starts_as_identity(&self) -> bool {
        true
    }

    fn acts_from(&self, _: &BackboneShape) -> ActsFrom {
        ActsFrom::Block(0)
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        let zero = convpass::petl::Init::Constant(0.0);
        let bias = params.get("bias", &[shape.block_dims[0]], zero)?;
        Ok(Box::new(WrongSeam { bias, mistake: self.0 }))
    }
}

#[derive(Debug)]
struct WrongSeam {
    bias: Tensor,
    mistake: Mistake,
}

impl Seam for WrongSeam {
    fn after_layer(&self, layer: Layer, _: &Tensor, output: Tensor, _: bool) -> Result<Tensor> {
        if layer != Layer::Fc2(0) {
            return Ok(output);
        }
        let output = output.f_add(&self.bias)?;
        Ok(match self.mistake {
            Mistake::OnCpu => output.f_add(&Tensor::zeros([1], (output.kind(), Device::Cpu)))?,
            Mistake::ReadsValue => output.f_add_scalar(0.0 * self.bias.f_double_value(&[0])?)?,
        })
    }
}

#[test]
fn a_tensor_left_behind_and_a_value_that_is_read_are_found() {
    if !child::is_alone(
        "accelerator::mistakes::a_tensor_left_behind_and_a_value_that_is_read_are_found",
    ) {
        return;
    }
    let accelerator = Accelerator::hold();
    let (_, vit) = FrozenViT::variants().swap_remove(0);
    for mistake in [Mistake::OnCpu, Mistake::ReadsValue] {
        let method = Method::custom(Wrong(mistake));
        // On the CPU nothing is wrong with it.
        let on_cpu = FrozenViT::random(&vit, 1, Device::Cpu).unwrap();
        check_method(&method, &on_cpu, &images(4)).unwrap();
        let backbone = FrozenViT::random(&vit, 1, accelerator.device()).unwrap();
        let model = PetlModel::new(backbone, &PetlConfig::new(method, 5)).unwrap();
        let images = images(4).to_device(accelerator.device());
        let (found, counts) = accelerator.count(|| model.forward(&images, false));
        match mistake {
            Mistake::OnCpu => {
                let text = format!("{:?}", found.unwrap_err());
                assert!(text.contains("device"), "{text}");
            }
            Mistake::ReadsValue => assert_eq!(counts.waits["item"], 1, "{counts:?}"),
        }
    }
}
