//! Adapted models against a PyTorch statement of the equations over timm's and transformers' blocks.

use std::collections::HashSet;
use std::error::Error;

use convpass::{Backbone, FrozenSwin, FrozenViT, Method, PetlConfig, PetlModel};
use tch::{Kind, Tensor};

use crate::golden::{AnyFrozen, Case, check_all};
use crate::support::device;

#[test]
fn logits_and_every_gradient_agree_with_pytorch() {
    check_all("convpass_model", |case| {
        check::<FrozenViT>(case, Method::ConvBypass(case.fact("method")))
    });
}

#[test]
fn every_method_agrees_with_its_equations_in_pytorch() {
    check_all("methods", |case| check::<FrozenViT>(case, case.fact("method")));
}

#[test]
fn every_method_agrees_with_its_equations_on_swin() {
    check_all("methods_swin", |case| {
        check::<FrozenSwin>(case, case.fact("method"))?;
        let backbone: FrozenSwin = case.open(&case.shared_file("backbone"))?;
        check_beside(case, backbone.to_kind(Kind::Double)?, case.fact("method"))
    });
}

#[test]
fn lora_agrees_with_hugging_face_peft() {
    // In f64, as PEFT was run: in f32 it depends on the CPU which digits are left of these gradients.
    check_all("peft_lora", |case| {
        let backbone: FrozenViT = case.open(&case.shared_file("backbone"))?;
        check_beside(case, backbone.to_kind(Kind::Double)?, case.fact("method"))
    });
}

fn check<B: AnyFrozen>(case: &Case, method: Method) -> Result<(), Box<dyn Error>> {
    check_beside::<B>(case, case.open(&case.shared_file("backbone"))?, method)
}

fn check_beside<B: AnyFrozen>(
    case: &Case,
    backbone: B,
    method: Method,
) -> Result<(), Box<dyn Error>> {
    let config = PetlConfig::new(method, case.fact("num_classes"));
    let mut model = PetlModel::new(backbone, &config)?;
    let report = model.load_weights(case.file("adapter"))?;

    let variables = model.var_store().variables();
    let golden: HashSet<&str> =
        case.tensors.keys().filter_map(|name| name.strip_prefix("grad.")).collect();
    assert_eq!(variables.keys().map(String::as_str).collect::<HashSet<_>>(), golden);
    assert_eq!(report.applied.len(), golden.len());

    let logits = model.forward(case.tensor("images"), false)?;
    case.compare("logits", &logits)?;
    let labels = Tensor::from_slice(&case.fact::<Vec<i64>>("labels")).to_device(device());
    let loss = logits.cross_entropy_for_logits(&labels);
    case.compare("loss", &loss)?;
    loss.f_backward()?;
    for (name, variable) in &variables {
        case.compare(&format!("grad.{name}"), &variable.grad())?;
    }
    Ok(())
}
