//! Training on the CUDA emulator, and the programs that check the GPU code.
#![allow(missing_docs)]

#[path = "../common/mod.rs"]
mod common;

mod cli;
mod gpu_check;
mod mutations;
mod nccl;
mod train;
