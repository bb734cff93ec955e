//! What is shown of results: tables, and charts as SVG.

mod accuracy_chart;
mod comparison;
mod labels;

pub use accuracy_chart::{AccuracyChart, AccuracyPoint};
pub use comparison::{ComparedRun, Comparison};
