//! What a finished run says at its end.

use super::{config::Mode, evaluate::Evaluation};
use crate::ops::OperationTime;
use serde::Serialize;
use std::{fs, path::PathBuf};

/// What a finished run has to say.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// The run directory.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub run: PathBuf,
    /// `full`, `lora` or `relora`.
    pub mode: Mode,
    /// Updates made.
    pub steps: u64,
    /// Cycles merged.
    pub cycles: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Mean training loss of the last tenth of the updates of this process; none where it made none.
    pub loss: Option<f64>,
    /// On the held-out windows, if there are any.
    pub evaluation: Option<Evaluation>,
    /// Seconds of this process.
    pub seconds: f64,
    /// Training tokens per second of all processes together since they began, evaluations and saving left out.
    pub tokens_per_s: Option<f64>,
    /// Processes that trained together.
    pub world_size: usize,
    /// Updates skipped because loss or gradient were not finite.
    pub skipped: u64,
    /// The final checkpoint.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub checkpoint: PathBuf,
    /// Bytes of memory at the peak of this process (Linux).
    pub peak_memory: Option<u64>,
    /// Bytes of the device's memory in use at the peak, where that is not the process's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_peak_memory: Option<u64>,
    /// On a GPU: the share of the training's time in which the host waited for it. Near 0, the GPU waits for the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_wait: Option<f64>,
    /// Whether passes were asked for as CUDA graphs in the end.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub cuda_graphs: bool,
    /// Where the time went, if that was asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub operations: Vec<OperationTime>,
}

/// The most memory that this process has occupied, in bytes: `VmHWM` of Linux.
pub(super) fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(1024 * line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?)
}
