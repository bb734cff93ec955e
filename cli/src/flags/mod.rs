//! Groups of flags that several subcommands share: each flag is declared here once.
//!
//! A subcommand changes the default of a flag, or makes it required, with `mut_arg`.

mod backbone;
mod data;
mod method;
mod size;
mod training;

pub use backbone::{BackboneFlags, Opened, Processor, bundled_backbone};
pub use data::{
    BatchFlag, ClassFlag, DataFlag, FormatFlag, InputFlags, OutFlag, OutputFormat, TargetFlags,
    ThreadFlags,
};
pub use method::{BypassFlags, MethodArg, MethodFlags, parse_method};
pub use size::Size;
pub use training::{
    EpochFlags, HeadFlag, LogFlags, LooksFlag, SeedFlag, SeedsFlag, TrainingFlags, default_warmup,
};
