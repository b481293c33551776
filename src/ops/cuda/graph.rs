//! Many requests as one: a graph of CUDA's, which the driver prepares once and starts as a whole.

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

/// A graph that can be started.
pub(super) struct Graph {
    gpu: Arc<Gpu>,
    graph: CUgraph,
    ready: CUgraphExec,
    /// Of every request that is a kernel.
    nodes: Vec<Option<CUgraphNode>>,
}

// SAFETY: the handles are the driver's, which may be used from any thread, by one at a time: they are behind a mutex.
unsafe impl Send for Graph {}

impl Graph {
    /// Of these requests, one after the other. Nothing is done yet. The stream notes what it is asked for instead of doing it;
    /// cuBLAS has memory of its own for that (`Blas::own_workspace`), since it must not ask the driver for some.
    pub fn new(cuda: &Cuda, requests: &[StreamOp]) -> Result<Graph> {
        let gpu = &cuda.0.gpu;
        gpu.enter()?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        gpu.check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(gpu.stream(), mode) })?;
        let nodes: Result<Vec<Option<CUgraphNode>>> = requests.iter().map(|request| note(cuda, request)).collect();
        let (mut graph, mut ready) = (null_mut(), null_mut());
        // SAFETY: the pointer is to a variable of the type that the driver writes. Notes end whether they were good or not.
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
                    // SAFETY: nobody else has it.
                    unsafe { sys::cuGraphDestroy(graph) };
                }
                Err(error)
            }
        }
    }

    /// Gives the kernel of request number `at` these arguments and this grid, from the next start on.
    pub fn change(&self, cuda: &Cuda, at: usize, launch: &KernelLaunch) -> Result<()> {
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
        self.gpu.check(&format!("other arguments for kernel {}", launch.kernel), result)
    }

    /// Asks the stream for all of it.
    pub fn start(&self) -> Result<()> {
        self.gpu.enter()?;
        // SAFETY: both live; what lies at the addresses is what the requests expect.
        self.gpu.check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.ready, self.gpu.stream()) })
    }
}

/// Lets the stream note a request; the node, if it is a kernel.
fn note(cuda: &Cuda, request: &StreamOp) -> Result<Option<CUgraphNode>> {
    cuda.submit(request)?;
    if !matches!(request, StreamOp::Kernel(_)) {
        return Ok(None);
    }
    let (mut status, mut last, mut count) = (CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE, ptr::null(), 0);
    let mut edges = ptr::null();
    let gpu = &cuda.0.gpu;
    // SAFETY: the pointers are to variables of the types that the driver writes; what it points them to is read before
    // anything else is asked of the stream.
    unsafe {
        let (number, graph) = (null_mut(), null_mut());
        let stream = gpu.stream();
        let result =
            sys::cuStreamGetCaptureInfo_v3(stream, &mut status, number, graph, &mut last, &mut edges, &mut count);
        gpu.check("cuStreamGetCaptureInfo", result)?;
        let active = status == CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE;
        if !active || count != 1 {
            return Err(gpu.failed("a stream that takes notes does not end with the kernel it was asked for"));
        }
        Ok(Some(*last))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // It may be at work still.
        if self.gpu.synchronize().is_ok() {
            // SAFETY: nobody else has them.
            unsafe {
                sys::cuGraphExecDestroy(self.ready);
                sys::cuGraphDestroy(self.graph);
            }
        }
    }
}
