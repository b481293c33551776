//! CUDA graphs: a sequence of operations that the driver captures and instantiates once, and launches as a whole.

use super::{
    Cuda, THREADS,
    driver::Gpu,
    stream_op::{KernelLaunch, StreamOp},
};
use crate::error::Result;
use cudarc::driver::sys::{self, CUgraph, CUgraphExec, CUgraphNode, CUstreamCaptureMode, CUstreamCaptureStatus};
use std::{
    ptr::{self, null_mut},
    sync::Arc,
};

/// An instantiated graph.
pub(super) struct Graph {
    gpu: Arc<Gpu>,
    graph: CUgraph,
    ready: CUgraphExec,
    /// The node of each operation; `None` unless it is a kernel.
    nodes: Vec<Option<CUgraphNode>>,
}

// SAFETY: the handles may be used from any thread, by one at a time: they are behind the launch queue's mutex.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures these operations, one after the other; none of them runs. cuBLAS has its own workspace (`Blas::own_workspace`),
    /// since it may not allocate while the stream captures.
    pub fn new(cuda: &Cuda, ops: &[StreamOp]) -> Result<Graph> {
        let gpu = &cuda.0.gpu;
        gpu.enter()?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        gpu.check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(gpu.stream(), mode) })?;
        let nodes: Result<Vec<Option<CUgraphNode>>> = ops.iter().map(|op| capture(cuda, op)).collect();
        let (mut graph, mut ready) = (null_mut(), null_mut());
        // SAFETY: the pointer is to a variable of the type that the driver writes. Capture must end even if recording failed.
        let ended = unsafe { sys::cuStreamEndCapture(gpu.stream(), &mut graph) };
        let result = nodes.and_then(|nodes| {
            gpu.check("cuStreamEndCapture", ended)?;
            // SAFETY: the graph is whole; the pointer is to a variable of the type that the driver writes.
            gpu.check("cuGraphInstantiate", unsafe { sys::cuGraphInstantiateWithFlags(&mut ready, graph, 0) })?;
            Ok(nodes)
        });
        match result {
            Ok(nodes) => Ok(Graph { gpu: gpu.clone(), graph, ready, nodes }),
            Err(error) => {
                if !graph.is_null() {
                    // SAFETY: this is its only owner.
                    unsafe { sys::cuGraphDestroy(graph) };
                }
                Err(error)
            }
        }
    }

    /// Sets arguments and grid of the kernel with index `at`, from the next launch of the graph on.
    pub fn set_launch(&self, cuda: &Cuda, at: usize, launch: &KernelLaunch) -> Result<()> {
        let node = self.nodes[at].expect("a kernel has a node");
        let (mut pointers, [x, y, z]) = (launch.pointers(), launch.grid);
        let parameters = sys::CUDA_KERNEL_NODE_PARAMS {
            func: cuda.0.kernels.get(launch.kernel),
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: THREADS,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            kernelParams: pointers.as_mut_ptr(),
            extra: null_mut(),
            kern: null_mut(),
            ctx: null_mut(),
        };
        self.gpu.enter()?;
        // SAFETY: the node is this graph's and of the same kernel; the driver copies the arguments.
        let result = unsafe { sys::cuGraphExecKernelNodeSetParams_v2(self.ready, node, &parameters) };
        self.gpu.check(&format!("new arguments for kernel {}", launch.kernel), result)
    }

    /// Enqueues the whole graph on the stream.
    pub fn launch(&self) -> Result<()> {
        self.gpu.enter()?;
        // SAFETY: both live; the caching allocator keeps the addresses that the operations use.
        self.gpu.check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.ready, self.gpu.stream()) })
    }
}

/// Captures an operation, and returns its node if it is a kernel.
fn capture(cuda: &Cuda, op: &StreamOp) -> Result<Option<CUgraphNode>> {
    cuda.submit(op)?;
    if !matches!(op, StreamOp::Kernel(_)) {
        return Ok(None);
    }
    let (mut status, mut last, mut count) = (CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE, ptr::null(), 0);
    let mut edges = ptr::null();
    let gpu = &cuda.0.gpu;
    // SAFETY: the pointers are to variables of the types that the driver writes; what it points them to is read before
    // anything else is enqueued.
    unsafe {
        let (number, graph) = (null_mut(), null_mut());
        let stream = gpu.stream();
        let result =
            sys::cuStreamGetCaptureInfo_v3(stream, &mut status, number, graph, &mut last, &mut edges, &mut count);
        gpu.check("cuStreamGetCaptureInfo", result)?;
        let active = status == CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE;
        if !active || count != 1 {
            return Err(gpu.failed("stream capture recorded unexpected dependencies"));
        }
        Ok(Some(*last))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // The GPU may still run it.
        if self.gpu.synchronize().is_ok() {
            // SAFETY: this is their only owner, and the stream is idle.
            unsafe {
                sys::cuGraphExecDestroy(self.ready);
                sys::cuGraphDestroy(self.graph);
            }
        }
    }
}
