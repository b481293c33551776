//! `spectrum`: the command, reference values.
#![allow(missing_docs)]

#[path = "../common/mod.rs"]
mod common;

mod cli;
mod cuda;
mod golden;
mod noise;
mod oracle;
mod parts;
