//! ReLoRA training (arXiv 2307.05695) on the operations of [`crate::ops`].
//!
//! `config` -> `phase`s with their `schedule` -> `trainer` (the algorithm) inside a `session` (the run directory).

mod alike;
mod bin_layout;
mod buckets;
mod companions;
pub mod config;
pub mod evaluate;
mod inputs;
pub use inputs::architecture;
pub mod metrics;
pub mod optim;
mod pace;
pub mod phase;
pub mod plan;
pub mod prune;
mod quantised;
mod run_lock;
pub mod schedule;
pub mod session;
mod share;
pub mod state;
pub mod tensorboard;
pub mod tokens;
pub mod trainer;
