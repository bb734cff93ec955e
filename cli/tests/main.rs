//! The command `convpass` as users run it.

mod help;
mod programs;
