//! Train ReLoRA models, merge low-rank deltas into checkpoints, and prove the rank of the summed update.
//!
//! The modules in the order of the data path:

pub mod error;
pub mod escape;
pub mod guard;
pub mod inputs;
pub mod interrupt;
pub mod progress;
pub mod shard;
pub mod staged;
pub mod threads;

pub mod adapter;
pub mod checkpoint;
pub mod convert;
pub mod delta;
pub mod diff;
pub mod extract;
pub mod inspect;
pub mod merge;
pub mod pickle;
pub mod run;
pub mod spectrum;
pub mod verify;

pub mod collective;
pub mod model;
pub mod ops;

pub mod generate;
pub mod tokenize;
pub mod train;

pub mod cli;
pub mod report;
