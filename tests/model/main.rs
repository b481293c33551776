//! The model and its operations against PyTorch and candle.
#![allow(missing_docs)]

#[path = "../common/mod.rs"]
mod common;

mod candle;
mod golden;
mod ops;
mod oracle;
