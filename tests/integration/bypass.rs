//! One bypass in f64 against a PyTorch statement of its equation.

use std::error::Error;

use convpass::{ConvBypass, ConvBypassConfig, TokenLayout};
use tch::{Device, Kind, Tensor, nn};

use crate::child;
use crate::golden::{Case, check_all};
use crate::support::{device, waves};

#[test]
fn output_and_every_gradient_agree_with_pytorch() {
    check_all("convpass_bypass", check);
}

fn check(case: &Case) -> Result<(), Box<dyn Error>> {
    let config: ConvBypassConfig = case.fact("method");
    let layout: TokenLayout = case.fact("layout");
    let mut vs = nn::VarStore::new(device());
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

/// On the CPU: a thread takes whole samples, so that neither outputs nor gradients depend on their number.
#[test]
fn one_thread_and_many_give_the_same_bits() {
    if !child::is_alone("bypass::one_thread_and_many_give_the_same_bits") {
        return;
    }
    let config = ConvBypassConfig { dropout: 0.0, ..Default::default() };
    for (batch, c, layout) in [
        (7, 24, TokenLayout { prefix: 1, grid: (5, 3) }),
        (2, 24, TokenLayout { prefix: 0, grid: (1, 1) }),
        (3, 24, TokenLayout { prefix: 2, grid: (0, 4) }),
        // So many weights that libtorch divides their sum over the samples among its threads.
        (7, 768, TokenLayout { prefix: 5, grid: (1, 3) }),
    ] {
        let run = |threads: i32| {
            tch::set_num_threads(threads);
            let vs = nn::VarStore::new(Device::Cpu);
            let bypass = ConvBypass::new(&vs.root(), c, &config).unwrap();
            let mut variables: Vec<_> = vs.variables().into_iter().collect();
            variables.sort_by(|a, b| a.0.cmp(&b.0));
            tch::no_grad(|| {
                for (_, variable) in &mut variables {
                    variable.copy_(&(waves(&variable.size()) * 0.5));
                }
            });
            let tokens = waves(&[batch, layout.num_tokens(), c]).to_device(Device::Cpu);
            let tokens = tokens.set_requires_grad(true);
            let output = bypass.forward(&tokens, &layout, true).unwrap();
            (&output * &output).sum(Kind::Float).backward();
            let leaves = variables.iter().map(|(_, variable)| variable).chain([&tokens]);
            leaves.map(Tensor::grad).chain([output.detach()]).collect::<Vec<_>>()
        };
        let alone = run(1);
        assert!(alone.iter().all(|part| part.abs().max().double_value(&[]) > 0.0));
        for threads in [2, 5] {
            assert_eq!(
                run(threads),
                alone,
                "{threads} threads, {batch} samples of width {c}, {layout:?}"
            );
        }
    }
}
