//! What is shown of results: tables, charts as SVG, and the page of a folder of runs.

mod accuracy_chart;
mod bar_chart;
mod bypass_view;
mod comparison;
mod curves;
mod folder_report;
mod labels;
mod methods;
mod page;
mod palette;
mod picture;
mod predictions;
mod published;
mod results;
mod runs;
mod sheet;
mod summary;
mod task_table;
#[cfg(test)]
mod testing;

pub use accuracy_chart::{AccuracyChart, AccuracyPoint};
pub use bypass_view::{BypassView, ConvMaps, GridMap};
pub use comparison::{ComparedRun, Comparison};
pub use folder_report::{NamedChart, Report};
pub use picture::Thumbnail;
pub use predictions::{Prediction, Predictions};
pub use runs::{BrokenFile, FoundRun};
pub use task_table::{Average, Figure, SeedRun, Spread, TaskTable};
