//! Additional streams, and events that order work between streams.

use super::driver::Gpu;
use crate::error::Result;
use cudarc::driver::sys::{self, CUevent, CUstream};
use std::{ptr::null_mut, sync::Arc};

/// A stream beside that of the kernels.
pub(super) struct Stream {
    gpu: Arc<Gpu>,
    handle: CUstream,
}

// SAFETY: the stream is the driver's, which may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: the driver synchronises calls on one stream from several threads.
unsafe impl Sync for Stream {}

impl Stream {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Stream> {
        gpu.enter()?;
        let mut handle = null_mut();
        // SAFETY: the pointer is to a variable of the type that the driver writes.
        gpu.check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut handle, 1) })?;
        Ok(Stream { gpu: gpu.clone(), handle })
    }

    pub fn handle(&self) -> CUstream {
        self.handle
    }

    /// Waits on the host for everything enqueued on the stream.
    pub fn synchronize(&self) -> Result<()> {
        self.gpu.enter()?;
        // SAFETY: the stream lives.
        self.gpu.check("waiting for the GPU", unsafe { sys::cuStreamSynchronize(self.handle) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: this is its only owner.
            unsafe { sys::cuStreamDestroy_v2(self.handle) };
        }
    }
}

/// A point in a stream's work that another stream or the host can wait for.
pub(super) struct Event {
    gpu: Arc<Gpu>,
    handle: CUevent,
}

// SAFETY: the event is the driver's, which may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// Records an event that occurs once everything enqueued on `stream` is done.
    pub fn record(gpu: &Arc<Gpu>, stream: CUstream) -> Result<Event> {
        gpu.enter()?;
        let mut handle = null_mut();
        // SAFETY: the pointer is to a variable of the type that the driver writes; 2: the event keeps no time.
        gpu.check("cuEventCreate", unsafe { sys::cuEventCreate(&mut handle, 2) })?;
        let event = Event { gpu: gpu.clone(), handle };
        // SAFETY: both live.
        gpu.check("cuEventRecord", unsafe { sys::cuEventRecord(handle, stream) })?;
        Ok(event)
    }

    /// Makes later work on `stream` wait for the event.
    pub fn make_wait(&self, stream: CUstream) -> Result<()> {
        self.gpu.enter()?;
        // SAFETY: both live.
        self.gpu.check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream, self.handle, 0) })
    }

    /// Waits on the host for the event.
    pub fn wait(&self) -> Result<()> {
        self.gpu.enter()?;
        // SAFETY: it lives.
        self.gpu.check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.handle) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: this is its only owner; streams that wait for it go on waiting.
            unsafe { sys::cuEventDestroy_v2(self.handle) };
        }
    }
}
