//! How a frozen backbone is kept and computed with.
#![allow(dead_code, reason = "each example that shares this file uses a part of it")]

use std::fmt;

use anyhow::{Result, anyhow};
use clap::ValueEnum;
use convpass::{Autocast, Backbone, RunRecord};
use tch::{Device, Kind};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    #[default]
    F32,
    /// Frozen weights and activations in bf16.
    Bf16,
    /// Frozen weights in f16; activations too, but in f32 on a CPU.
    F16,
    /// The weights of frozen linear layers in int8, everything else in f32.
    Int8,
    /// Weights in f32, products in bf16.
    AutocastBf16,
}

impl Precision {
    /// The backbone with its weights in these numbers.
    pub fn convert<B: Backbone>(self, backbone: B) -> Result<B> {
        Ok(match self {
            Precision::F32 | Precision::AutocastBf16 => backbone,
            Precision::Bf16 => backbone.to_kind(Kind::BFloat16)?,
            Precision::F16 => backbone.to_kind(Kind::Half)?,
            Precision::Int8 => backbone.to_int8()?,
        })
    }

    /// What a run's record says of it.
    pub fn recorded(self) -> Option<String> {
        (self != Precision::F32).then(|| self.to_string())
    }

    /// That of a run.
    pub fn of(record: &RunRecord) -> Result<Self> {
        let Some(name) = &record.precision else { return Ok(Precision::F32) };
        Precision::from_str(name, false).map_err(|_| anyhow!("no precision is called {name}"))
    }

    /// The guard under which a pass is in these numbers, where there is one.
    pub fn guard(self, device: Device) -> Result<Option<Autocast>> {
        Ok(match self {
            Precision::AutocastBf16 => Some(Autocast::enter(device, Kind::BFloat16)?),
            _ => None,
        })
    }
}

impl fmt::Display for Precision {
    /// The name on the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
            Precision::Int8 => "int8",
            Precision::AutocastBf16 => "autocast-bf16",
        })
    }
}
