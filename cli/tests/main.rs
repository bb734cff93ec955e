//! The command `convpass` as users run it: each test starts the program as a process.

mod export;
mod few_shot;
mod few_shot_select;
mod finetune;
mod help;
mod mistakes;
mod others;
mod own_images;
mod predict;
mod process;
mod processes;
mod survey;
mod sweep;
mod sweep_shared;
