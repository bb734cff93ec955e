//! What is shown of results: tables, and charts as SVG.

mod accuracy_chart;
mod comparison;
mod labels;
#[cfg(feature = "data")]
mod task_table;

pub use accuracy_chart::{AccuracyChart, AccuracyPoint};
pub use comparison::{ComparedRun, Comparison};
#[cfg(feature = "data")]
pub use task_table::{Average, Figure, SeedRun, Spread, TaskTable};
