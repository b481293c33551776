//! `tokenize`, `train`, `generate` and `verify`: the commands, reference trajectories.
#![allow(missing_docs)]

#[path = "../common/mod.rs"]
mod common;

mod cli;
mod cuda;
mod documents;
mod forgeries;
mod generate;
mod golden;
mod hostile_text;
mod locks;
mod old_run;
mod options;
mod oracle;
mod quickstart_gate;
mod ranks;
mod resume;
mod tokenize;
mod verify;
