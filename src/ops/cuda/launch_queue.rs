//! Deferred kernel launches, captured into a CUDA graph and replayed. A sequence of operations that comes a second time becomes a
//! graph and is launched as a whole from then on; kernels whose arguments differ from the last replay get the new ones first. Any
//! other sequence is submitted operation by operation. What runs, and in which order, is the same in all cases.

use super::{
    Cuda,
    driver::Gpu,
    graph::Graph,
    libraries,
    stream_op::{KernelLaunch, StreamOp},
};
use crate::error::Result;
use std::sync::{Arc, MutexGuard, PoisonError};

/// The most sequences that are remembered: those of an update (its passes, their end, the optimiser), before and after a restart,
/// and some more.
const MOST_SEQUENCES: usize = 16;

/// A shorter sequence is submitted operation by operation.
const SHORTEST_SEQUENCE: usize = 4;

/// Deferred operations, and sequences that were submitted before.
#[derive(Default)]
pub(super) struct DeferredOps {
    /// The deferred operations; `None` while operations are submitted at once.
    list: Option<Vec<StreamOp>>,
    /// Sequences that were submitted before, the most recent last.
    known: Vec<Sequence>,
    /// Whether the driver supports graphs: not if it is too old, or has refused one. `None`: not known yet.
    able: Option<bool>,
}

/// A sequence that was submitted before, with the last arguments of its kernels.
struct Sequence {
    ops: Vec<StreamOp>,
    graph: Option<Graph>,
}

impl Sequence {
    fn is_like(&self, list: &[StreamOp]) -> bool {
        self.ops.len() == list.len() && self.ops.iter().zip(list).all(|(known, new)| known.is_like(new))
    }
}

impl Cuda {
    fn queue(&self) -> MutexGuard<'_, DeferredOps> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enqueues an operation: on the stream, or in the list of deferred operations.
    pub(super) fn enqueue(&self, op: StreamOp) {
        self.guarded(|_| {
            if let Some(list) = &mut self.queue().list {
                list.push(op);
                return Ok(());
            }
            self.submit(&op)
        });
    }

    /// Flushes the queue, then runs `work`, unless something failed before.
    pub(super) fn after_flush<T>(&self, work: impl FnOnce(&Arc<Gpu>) -> Result<T>) -> Option<T> {
        self.flush_queue();
        self.guarded(work)
    }

    /// Defers operations from now on; false if the driver does not support graphs, or something failed before.
    pub(super) fn begin_deferring(&self) -> bool {
        let begun = self.guarded(|gpu| {
            let mut queue = self.queue();
            let able = *queue.able.get_or_insert_with(|| libraries::check_graphs(&gpu.name).is_ok());
            if able && queue.list.is_none() {
                queue.list = Some(Vec::new());
                gpu.allocator().set_deferring(true);
            }
            Ok(queue.list.is_some())
        });
        begun.unwrap_or(false)
    }

    /// Submits the deferred operations, and goes on deferring.
    pub(super) fn flush_queue(&self) {
        self.guarded(|gpu| {
            let mut queue = self.queue();
            let Some(list) = queue.list.as_mut().map(std::mem::take) else { return Ok(()) };
            self.submit_sequence(&mut queue, list)?;
            // SAFETY: the whole list has been submitted.
            unsafe { gpu.release_deferred() }
        });
    }

    /// Submits the deferred operations, and defers no more. Both are one step: what another thread enqueues meanwhile comes before or
    /// after it.
    pub(super) fn end_deferring(&self) {
        self.guarded(|gpu| {
            let mut queue = self.queue();
            let sent = queue.list.take().map_or(Ok(()), |list| self.submit_sequence(&mut queue, list));
            gpu.allocator().set_deferring(false);
            sent?;
            // SAFETY: the whole list has been submitted.
            unsafe { gpu.release_deferred() }
        });
    }

    /// Forgets all sequences and their graphs. Nothing may be deferred.
    pub(super) fn forget(&self) {
        self.queue().known.clear();
    }

    /// The GPU is out of memory, while free lists may have some: submits the deferred operations, defers no more, and returns the
    /// free lists to the driver.
    pub(super) fn stop_deferring(&self) -> Result<()> {
        let gpu = &self.0.gpu;
        let mut queue = self.queue();
        let list = queue.list.take();
        list.iter().flatten().try_for_each(|op| self.submit(op))?;
        // Deferring again would run out of memory again.
        *queue = DeferredOps { able: if list.is_some() { Some(false) } else { queue.able }, ..DeferredOps::default() };
        // SAFETY: the whole list has been submitted.
        unsafe { gpu.release_deferred() }?;
        gpu.allocator().set_deferring(false);
        // SAFETY: the whole list has been submitted.
        unsafe { gpu.trim() }
    }

    fn submit_sequence(&self, queue: &mut DeferredOps, list: Vec<StreamOp>) -> Result<()> {
        let one_by_one = |list: &[StreamOp]| list.iter().try_for_each(|op| self.submit(op));
        if list.len() < SHORTEST_SEQUENCE || queue.able == Some(false) {
            return one_by_one(&list);
        }
        let Some(at) = queue.known.iter().rposition(|known| known.is_like(&list)) else {
            if queue.known.len() == MOST_SEQUENCES {
                queue.known.remove(0);
            }
            one_by_one(&list)?;
            queue.known.push(Sequence { ops: list, graph: None });
            return Ok(());
        };
        let known = queue.known.remove(at);
        let graph = match known.graph {
            Some(graph) => {
                for (at, launch) in changes(&known.ops, &list) {
                    graph.set_launch(self, at, launch)?;
                }
                graph
            }
            None => match Graph::new(self, &list) {
                Ok(graph) => graph,
                Err(_) => {
                    // The driver cannot capture some operation. If the GPU itself has failed, the next call says so.
                    queue.able = Some(false);
                    return one_by_one(&list);
                }
            },
        };
        graph.launch()?;
        queue.known.push(Sequence { ops: list, graph: Some(graph) });
        Ok(())
    }
}

/// The kernels whose launches differ from the last replay, with their indices.
fn changes<'a>(before: &'a [StreamOp], now: &'a [StreamOp]) -> impl Iterator<Item = (usize, &'a KernelLaunch)> {
    before.iter().zip(now).enumerate().filter_map(|(at, (before, now))| match now {
        StreamOp::Kernel(launch) if before != now => Some((at, launch)),
        _ => None,
    })
}
