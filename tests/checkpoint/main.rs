//! Files of others: `inspect`, `diff`, `convert`, and input that is malformed.
#![allow(missing_docs)]

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod convert;
mod diff;
mod encodings;
mod hostile_cases;
mod hostile_input;
mod inspect;
