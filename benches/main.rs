//! Every part that is measured against PyTorch, on its own; `cargo bench -- train_step` runs one.
//!
//! One binary, as each further one links libtorch again. The ratios themselves: `make bench-peer`.

mod bypass;
mod data_path;
mod load;
mod train_step;

use criterion::{Criterion, criterion_group, criterion_main};

criterion_group! {
    name = parts;
    config = Criterion::default().sample_size(20);
    targets = bypass::bypass, bypass::block, load::load, data_path::data_path
}
criterion_group! {
    name = models;
    config = Criterion::default().sample_size(10);
    targets = train_step::train_step, train_step::variants, train_step::evaluation
}
criterion_main!(parts, models);
