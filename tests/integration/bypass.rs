//! One bypass in f64 against a PyTorch statement of its equation.

use std::error::Error;

use convpass::{ConvBypass, ConvBypassConfig, TokenLayout};
use tch::{Device, nn};

use crate::golden::{Case, check_all};

#[test]
fn output_and_every_gradient_agree_with_pytorch() {
    check_all("convpass_bypass", check);
}

fn check(case: &Case) -> Result<(), Box<dyn Error>> {
    let config: ConvBypassConfig = case.fact("method");
    let layout: TokenLayout = case.fact("layout");
    let mut vs = nn::VarStore::new(Device::Cpu);
    let bypass = ConvBypass::new(&vs.root(), case.fact("embed_dim"), &config)?;
    vs.double();
    let variables = vs.variables();
    assert_eq!(variables.len(), 6);
    tch::no_grad(|| {
        for (name, variable) in &variables {
            variable.shallow_clone().copy_(case.tensor(name));
        }
    });

    let tokens = case.tensor("tokens").set_requires_grad(true);
    let output = bypass.forward(&tokens, &layout, false)?;
    case.compare("output", &output)?;
    (output * case.tensor("grad_output")).sum(None).f_backward()?;
    case.compare("grad.tokens", &tokens.grad())?;
    for (name, variable) in &variables {
        case.compare(&format!("grad.{name}"), &variable.grad())?;
    }
    Ok(())
}
