//! ReLoRA training (arXiv 2307.05695) on the operations of [`crate::ops`].
//!
//! `config` -> `phase`s with their `schedule` -> `trainer` (the algorithm) inside a `session` (the run directory).

mod bin_layout;
mod buckets;
mod checkpoints;
pub mod config;
pub mod evaluate;
mod inputs;
mod replica_consistency;
mod sidecar_files;
pub use inputs::architecture;
mod launch_bound;
pub mod metrics;
mod micro_batches;
pub mod optim;
pub mod phase;
pub mod plan;
pub mod prune;
mod quantised;
mod run_lock;
pub mod schedule;
pub mod session;
pub mod state;
pub mod summary;
pub mod tensorboard;
pub mod tokens;
pub mod trainer;
