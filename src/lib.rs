//! Train ReLoRA models, merge low-rank updates into checkpoints, and measure the rank of the summed update.
//!
//! relora-kit reads and writes what the Hugging Face ecosystem uses: safetensors checkpoints and PEFT adapters. Each command
//! of the program is one call here:
//!
//! | call | what it does |
//! | --- | --- |
//! | [`Checkpoint::open`], [`Adapter::open`] | map the tensors of a file or folder |
//! | [`merge()`] | add adapters to a checkpoint, and measure how much of each delta survives rounding |
//! | [`spectrum()`] | compute the singular values of an update, its rank above the rounding noise, and gates |
//! | [`inspect()`], [`diff()`] | list the tensors of a checkpoint; compare two |
//! | [`train()`], [`resume`], [`verify()`] | train from a configuration; continue; recompute what a run claims |
//!
//! A first program opens an adapter and looks at the shapes of its factors:
//!
//! ```
//! use relora_kit::{Adapter, Checkpoint};
//! use std::path::Path;
//!
//! # fn main() -> relora_kit::Result<()> {
//! let adapter = Adapter::open(Path::new("fixtures/tiny_adapter"))?;
//! let module = adapter.lora_modules().next().unwrap()?;
//! assert_eq!(module.r, 4);
//!
//! let base = Checkpoint::open(Path::new("fixtures/tiny_llama"))?;
//! let weight = base.tensor("model.layers.0.self_attn.q_proj.weight")?;
//! assert_eq!(weight.shape(), [64, 64]);
//! # Ok(())
//! # }
//! ```
//!
//! # Errors
//!
//! Every call returns [`Result`]. An [`Error`] has a [`kind`](Error::kind) to match, a sentence, and often a hint:
//!
//! ```
//! use relora_kit::{Checkpoint, ErrorKind};
//! use std::path::Path;
//!
//! let error = Checkpoint::open(Path::new("no/such/model")).err().unwrap();
//! match error.kind {
//!     ErrorKind::Request => eprintln!("the request is wrong: {error}"),
//!     ErrorKind::Interrupted => eprintln!("cancelled"),
//!     _ => eprintln!("the environment failed: {error}"),
//! }
//! assert_eq!(error.kind, ErrorKind::Request);
//! assert_eq!(error.help.as_deref(), Some("check the path"));
//! ```
//!
//! # Progress and cancellation
//!
//! Calls that may take long have a [`Progress`]: [`Progress::hidden`] shows nothing, [`Progress::stderr`] draws bars. It also
//! carries a [`Cancellation`], which another thread may use to stop the call:
//!
//! ```
//! use relora_kit::{Cancellation, DiffOptions, ErrorKind, Progress, diff};
//!
//! let cancellation = Cancellation::new();
//! let progress = Progress::hidden().with_cancellation(&cancellation);
//! cancellation.cancel();
//! let stopped = diff(&DiffOptions::new("fixtures/tiny_llama", "fixtures/tiny_llama"), &progress);
//! assert_eq!(stopped.err().unwrap().kind, ErrorKind::Interrupted);
//! ```
//!
//! # Features
//!
//! | feature | what it adds | default |
//! | --- | --- | --- |
//! | `cli` | the program: arguments, tables, pages | yes |
//! | `train` | [`train()`], text into tokens, sample text | yes |
//! | `convert` | GGUF and pickled checkpoints into safetensors | yes |
//! | `cuda` | NVIDIA GPUs; CUDA's libraries are loaded at run time | yes |
//! | `mpi` | several processes over MPI | no |
//!
//! The modules that this page does not show are internal: they may change in any release.

// What only the commands call is not called in a smaller build.
#![cfg_attr(
    not(all(feature = "cli", feature = "convert", feature = "cuda", feature = "train")),
    allow(dead_code, unused_imports)
)]

// The modules in the order of the data path; tests/house/layering.rs says which may import which.
#[doc(hidden)]
pub mod error;
#[doc(hidden)]
pub mod escape;
#[doc(hidden)]
pub mod guard;
#[doc(hidden)]
pub mod inputs;
#[doc(hidden)]
pub mod interrupt;
#[doc(hidden)]
pub mod job_array;
#[doc(hidden)]
pub mod progress;
#[doc(hidden)]
pub mod staged;
#[doc(hidden)]
pub mod threads;
#[doc(hidden)]
pub mod work_queue;

#[doc(hidden)]
pub mod adapter;
#[doc(hidden)]
pub mod architecture;
#[doc(hidden)]
pub mod checkpoint;
#[cfg(feature = "convert")]
#[doc(hidden)]
pub mod convert;
#[doc(hidden)]
pub mod delta;
#[doc(hidden)]
pub mod diff;
#[doc(hidden)]
pub mod extract;
#[doc(hidden)]
pub mod inspect;
#[doc(hidden)]
pub mod merge;
#[doc(hidden)]
pub mod pickle;
#[doc(hidden)]
pub mod run;
#[doc(hidden)]
pub mod spectrum;
#[doc(hidden)]
pub mod verify;

#[doc(hidden)]
pub mod collective;
#[cfg(feature = "train")]
#[doc(hidden)]
pub mod model;
#[doc(hidden)]
pub mod ops;

#[cfg(feature = "train")]
#[doc(hidden)]
pub mod generate;
#[cfg(feature = "train")]
#[doc(hidden)]
pub mod tokenize;
#[cfg(feature = "train")]
#[doc(hidden)]
pub mod train;

#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod report;

mod api;

pub use adapter::Adapter;
pub use api::{diff, inspect, merge, spectrum, verify};
#[cfg(feature = "train")]
pub use api::{resume, train};
pub use checkpoint::{Checkpoint, Dtype, Filter, Tensor};
pub use diff::{Diff, Options as DiffOptions};
pub use error::{Error, Kind as ErrorKind, Result};
pub use inspect::{Inspection, Options as InspectOptions};
pub use merge::{MergeReport, Options as MergeOptions};
pub use progress::{Cancellation, Progress};
pub use spectrum::{Options as SpectrumOptions, Spectrum};
#[cfg(feature = "train")]
pub use train::summary::Summary as TrainSummary;
pub use verify::Verification;
