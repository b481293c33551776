//! `merge` and `extract`: the commands, reference values, properties.
#![allow(missing_docs)]

#[path = "../common/mod.rs"]
mod common;

mod adapter_types;
mod cli;
mod cuda;
mod delta;
mod extract;
mod golden;
mod memory;
mod names_and_ties;
mod oracle;
mod parts;
mod prop;
mod report;
mod stop;
