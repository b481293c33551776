//! What a GPU does for sums whose values another library carries from process to process, by their addresses on the GPU:
//! room for what goes out and comes in, and adding up. On a stream beside that of the kernels, which go on.

use super::{
    Cuda, blocks,
    buffer::CudaBuffer,
    libraries,
    memory::Memory,
    stream::{Event, Stream},
    stream_op::KernelLaunch,
};
use crate::error::Result;
use cudarc::driver::sys;

/// f32 elements on a GPU.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSpan {
    /// Of the first, as the GPU counts.
    pub address: u64,
    /// How many.
    pub len: usize,
}

impl DeviceSpan {
    /// `len` elements from element `first` on.
    pub fn part(self, first: usize, len: usize) -> DeviceSpan {
        assert!(first + len <= self.len, "elements {first} to {} of {}", first + len, self.len);
        DeviceSpan { address: self.address + 4 * first as u64, len }
    }
}

/// Two pieces of memory, and a stream.
pub struct ReductionStaging {
    cuda: Cuda,
    stream: Stream,
    send: Memory,
    receive: Memory,
}

/// All that the kernels' stream was asked for until it was made.
pub struct KernelsDone(Event);

impl ReductionStaging {
    /// With room for so many elements in each direction.
    pub fn new(cuda: &Cuda, elements: usize) -> Result<ReductionStaging> {
        let gpu = &cuda.0.gpu;
        libraries::check_events(&gpu.name)?;
        let memory = || Memory::new(gpu, 4 * elements);
        Ok(ReductionStaging { cuda: cuda.clone(), stream: Stream::new(gpu)?, send: memory()?, receive: memory()? })
    }

    /// What goes out.
    pub fn send_buffer(&self) -> DeviceSpan {
        DeviceSpan { address: self.send.address(), len: self.send.bytes() / 4 }
    }

    /// What comes back.
    pub fn receive_buffer(&self) -> DeviceSpan {
        DeviceSpan { address: self.receive.address(), len: self.receive.bytes() / 4 }
    }

    /// Where a buffer of f32 lies.
    pub fn span(&self, buffer: &CudaBuffer) -> DeviceSpan {
        DeviceSpan { address: buffer.address(0), len: buffer.len }
    }

    /// What has to be done before buffers can be read.
    pub fn record_kernels(&self) -> Result<KernelsDone> {
        let event = self.cuda.after_flush(|gpu| Event::record(gpu, gpu.stream()));
        event.map(KernelsDone).ok_or_else(|| self.cuda.first_failure().expect("what failed is remembered"))
    }

    /// The host waits for the kernels.
    pub fn wait_for_kernels(&self, kernels: &KernelsDone) -> Result<()> {
        kernels.0.wait()
    }

    /// The host waits for all that [`ReductionStaging::copy`] and [`ReductionStaging::add`] do.
    pub fn synchronize(&self) -> Result<()> {
        self.cuda.first_failure().map_or(Ok(()), Err)?;
        self.stream.synchronize()
    }

    /// `to = from`, of one length.
    pub fn copy(&self, from: DeviceSpan, to: DeviceSpan) -> Result<()> {
        assert_eq!(from.len, to.len, "copy: lengths");
        if from.len == 0 {
            return Ok(());
        }
        let gpu = &self.cuda.0.gpu;
        gpu.enter()?;
        // SAFETY: spans lie in memory that lives as long as the sum; what else uses it has been waited for.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to.address, from.address, 4 * from.len, self.stream.handle()) };
        gpu.check("copying on the GPU", result)
    }

    /// `to += from`, of one length.
    pub fn add(&self, from: DeviceSpan, to: DeviceSpan) {
        assert_eq!(from.len, to.len, "add: lengths");
        let args = [1f32.into(), from.address.into(), to.address.into(), from.len.into()];
        if from.len > 0 {
            let launch =
                KernelLaunch { kernel: "axpy", grid: [blocks(from.len), 1, 1], shared: 0, args: args.to_vec() };
            self.cuda.guarded(|_| self.cuda.start(self.stream.handle(), &launch));
        }
    }
}
