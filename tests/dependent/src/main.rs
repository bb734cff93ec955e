//! Runs tokens through a fresh bypass. `cargo run` and `cargo test` work with nothing but LIBTORCH set.

use convpass::{ConvBypass, ConvBypassConfig, Result, TokenLayout};
use tch::{Device, Kind, Tensor, nn};

/// [B,1+rows*cols,C] through a bypass: zeros of the same shape, because the up convolution starts at zero.
fn bypass() -> Result<Tensor> {
    let vs = nn::VarStore::new(Device::Cpu);
    let bypass = ConvBypass::new(&vs.root(), 32, &ConvBypassConfig::default())?;
    let layout = TokenLayout { prefix: 1, grid: (4, 6) };
    bypass.forward(&Tensor::ones([2, 25, 32], (Kind::Float, Device::Cpu)), &layout, false)
}

fn main() -> Result<()> {
    println!("a bypass over {:?} tokens works", bypass()?.size());
    println!("CUDA: {}", convpass::cuda_load_error().unwrap_or("libraries loaded"));
    Ok(())
}

#[test]
fn a_fresh_bypass_adds_nothing() {
    let out = bypass().expect("a bypass");
    assert_eq!(out.size(), [2, 25, 32]);
    assert_eq!(out.abs().max().double_value(&[]), 0.0);
}
