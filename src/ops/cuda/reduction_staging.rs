//! Staging and on-device reduction for CUDA-aware MPI: a send and a receive buffer on the GPU, whose addresses MPI takes, and the
//! additions. They run on a stream of their own, beside that of the kernels.

use super::{
    Cuda, blocks,
    buffer::CudaBuffer,
    libraries,
    memory::Memory,
    stream::{Event, Stream},
    stream_op::KernelLaunch,
};
use crate::{error::Result, ops::Element};
use cudarc::driver::sys;

/// f32 elements on a GPU: an address and a length. It does not keep the memory allocated.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSpan {
    address: u64,
    len: usize,
}

impl DeviceSpan {
    /// The device address of the first element.
    pub fn address(self) -> u64 {
        self.address
    }

    /// The number of elements.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// `len` elements from element `first` on.
    pub fn part(self, first: usize, len: usize) -> DeviceSpan {
        assert!(first + len <= self.len, "elements {first} to {} of {}", first + len, self.len);
        DeviceSpan { address: self.address + 4 * first as u64, len }
    }
}

/// A send and a receive buffer on the GPU, and a stream.
pub struct ReductionStaging {
    cuda: Cuda,
    stream: Stream,
    send: Memory,
    receive: Memory,
}

/// Everything that was enqueued on the kernels' stream until [`ReductionStaging::record_kernels`].
pub struct KernelsDone(Event);

impl ReductionStaging {
    /// Buffers of so many f32 elements in each direction. Fails if the GPU has not enough memory.
    pub fn new(cuda: &Cuda, elements: usize) -> Result<ReductionStaging> {
        let gpu = &cuda.0.gpu;
        libraries::check_events(&gpu.name)?;
        let memory = || Memory::new(gpu, 4 * elements);
        Ok(ReductionStaging { cuda: cuda.clone(), stream: Stream::new(gpu)?, send: memory()?, receive: memory()? })
    }

    /// The buffer that MPI sends from.
    pub fn send_buffer(&self) -> DeviceSpan {
        DeviceSpan { address: self.send.address(), len: self.send.bytes() / 4 }
    }

    /// The buffer that MPI receives into.
    pub fn receive_buffer(&self) -> DeviceSpan {
        DeviceSpan { address: self.receive.address(), len: self.receive.bytes() / 4 }
    }

    /// The elements of an f32 buffer.
    pub fn span(&self, buffer: &CudaBuffer) -> DeviceSpan {
        assert_eq!(buffer.element, Element::F32, "span: elements");
        DeviceSpan { address: buffer.address(0), len: buffer.len }
    }

    /// Flushes the launch queue, and records what has to be done before buffers can be read.
    pub fn record_kernels(&self) -> Result<KernelsDone> {
        let event = self.cuda.after_flush(|gpu| Event::record(gpu, gpu.stream()));
        event.map(KernelsDone).ok_or_else(|| self.cuda.first_failure().expect("what failed is remembered"))
    }

    /// Waits on the host for the kernels.
    pub fn wait_for_kernels(&self, kernels: &KernelsDone) -> Result<()> {
        kernels.0.wait()
    }

    /// Waits on the host for every [`ReductionStaging::copy`] and [`ReductionStaging::add`].
    pub fn synchronize(&self) -> Result<()> {
        self.cuda.first_failure().map_or(Ok(()), Err)?;
        self.stream.synchronize()
    }

    /// Enqueues `to = from`; both have the same length.
    ///
    /// # Safety
    ///
    /// Both spans must be allocated, without overlap, and used by nothing else until [`ReductionStaging::synchronize`] returns.
    pub unsafe fn copy(&self, from: DeviceSpan, to: DeviceSpan) -> Result<()> {
        assert_eq!(from.len, to.len, "copy: lengths");
        if from.len == 0 {
            return Ok(());
        }
        let gpu = &self.cuda.0.gpu;
        gpu.enter()?;
        // SAFETY: the memory is the caller's promise; the stream lives.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to.address, from.address, 4 * from.len, self.stream.handle()) };
        gpu.check("copying on the GPU", result)
    }

    /// Enqueues `to += from`; both have the same length.
    ///
    /// # Safety
    ///
    /// Both spans must be allocated, without overlap, and used by nothing else until [`ReductionStaging::synchronize`] returns.
    pub unsafe fn add(&self, from: DeviceSpan, to: DeviceSpan) {
        assert_eq!(from.len, to.len, "add: lengths");
        let args = [1f32.into(), from.address.into(), to.address.into(), from.len.into()];
        if from.len > 0 {
            let launch =
                KernelLaunch { kernel: "axpy", grid: [blocks(from.len), 1, 1], shared: 0, args: args.to_vec() };
            self.cuda.guarded(|_| self.cuda.launch_on(self.stream.handle(), &launch));
        }
    }
}
