//! Shows results as tables, as charts in SVG, and as the page of a folder of runs.

mod accuracy_chart;
mod bar_chart;
mod bypass_view;
mod command;
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

use accuracy_chart::{AccuracyChart, AccuracyPoint};
use bypass_view::BypassView;
pub use command::{ReportArgs, run};
use folder_report::Report;
use predictions::Predictions;
use runs::FoundRun;
pub use task_table::{Average, Figure, SeedRun, Spread, TaskTable};
