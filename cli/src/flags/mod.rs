//! Groups of flags that several subcommands share: each flag is declared here once.
//!
//! A subcommand changes the default of a flag, or makes it required, with `mut_arg`.

mod backbone;
mod data;
mod method;
mod preparation;
mod size;
mod training;

pub use backbone::{
    BackboneFlags, OF_RUN_BACKBONE, OF_RUN_SIZE, Opened, Processor, bundled_backbone,
};
pub use data::{
    BatchFlag, ClassFlag, DataFlag, ForceFlag, FormatFlag, ImagesFlags, InputFlags,
    NormalizationFlag, OrientationFlag, OutFlag, OutputFormat, SurveyFlags, TargetFlags,
    ThreadFlags, data_name,
};
pub use method::{BypassFlags, MethodArg, MethodFlags, parse_method};
pub use preparation::{Preparation, PreparationFlags, ResizeFlags};
pub use size::Size;
pub use training::{
    EpochFlags, HeadFlag, LogFlags, LooksFlag, SeedFlag, SeedsFlag, TrainingFlags, default_warmup,
};
