//! How long a merge will take: some of its blocks are computed and some bytes written to memory, and timed.

use super::{
    apply::{self, Scratch},
    device::Gpu,
    plan::{Output, Plan},
    prepared::{Element, Prepared},
    rounding::Rounding,
    stream,
};
use crate::{
    error::{Error, Result},
    threads,
};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::Serialize;
use std::{fs::File, io::Write, path::Path, time::Instant};

/// Changed tensors that are tried, spread over the plan.
const TRIED: usize = 8;

/// Bytes that are written to memory to see how fast that is.
const WRITTEN: usize = 64 << 20;

/// What a merge would move and how long it would take, once the base is in memory and if the disk keeps up.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Estimate {
    /// Bytes of the base and the adapters' tensors.
    pub bytes_read: u64,
    /// Bytes of the output's tensors.
    pub bytes_written: u64,
    /// Seconds of all threads together, measured on blocks of some changed tensors.
    pub compute_seconds: f64,
    /// Seconds of all threads together, measured by writing to memory.
    pub write_seconds: f64,
    /// Threads that share the work.
    pub threads: usize,
    /// Seconds from start to end.
    pub seconds: f64,
}

impl Estimate {
    pub(super) fn new(plan: &Plan, rounding: Rounding, gpu: Option<&Gpu>) -> Result<Estimate> {
        let changed: Vec<&Output> = plan.outputs.iter().filter(|o| !o.is_copy()).collect();
        let (mut seconds, mut elements) = (0.0, 0);
        for output in changed.iter().step_by(changed.len().div_ceil(TRIED).max(1)) {
            seconds += threads::with_serial_blas(|| match output.in_double() {
                true => time::<f64>(output, rounding, None),
                false => time::<f32>(output, rounding, gpu),
            })?;
            elements += output.source.elements();
        }
        let all: usize = changed.iter().map(|o| o.source.elements()).sum();
        let compute_seconds = if elements == 0 { 0.0 } else { seconds * all as f64 / elements as f64 };
        let bytes_written: u64 = plan.outputs.iter().map(|o| o.spec.bytes()).sum();
        let write_seconds = bytes_written as f64 / bytes_per_second()?;
        let threads = threads::count();
        Ok(Estimate {
            bytes_read: plan.outputs.iter().map(Output::bytes_read).sum(),
            bytes_written,
            compute_seconds,
            write_seconds,
            threads,
            seconds: (compute_seconds + write_seconds) / threads as f64,
        })
    }
}

/// Seconds for the whole of `output`, from those of its first block. The block is computed twice: the first time may have
/// to wait for the disk.
fn time<T: Element>(output: &Output, rounding: Rounding, gpu: Option<&Gpu>) -> Result<f64> {
    let start = Instant::now();
    let prepared = Prepared::<T>::new(output, rounding, gpu)?;
    let preparing = start.elapsed().as_secs_f64();
    let Some(block) = stream::row_blocks(output).next() else { return Ok(preparing) };
    let mut scratch = Scratch::new();
    let mut seconds = 0.0;
    for _ in 0..2 {
        let start = Instant::now();
        apply::rows(output, output.spec.dtype, &prepared, block.clone(), &mut scratch)?;
        seconds = start.elapsed().as_secs_f64();
    }
    Ok(preparing + seconds * output.matrix_shape().0 as f64 / block.len() as f64)
}

/// What one thread can write into the memory that the kernel keeps for files.
fn bytes_per_second() -> Result<f64> {
    let failed = |e| Error::io("write", Path::new("a file in memory"), e);
    let mut file = File::from(memfd_create("speed", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?);
    let block = vec![1u8; 1 << 20];
    let start = Instant::now();
    for _ in 0..WRITTEN / block.len() {
        file.write_all(&block).map_err(failed)?;
    }
    Ok(WRITTEN as f64 / start.elapsed().as_secs_f64())
}
