//! Requests that are held back and asked for together. What comes a second time becomes a graph, and is started as a whole from
//! then on; kernels that are given something else than last time are told so before. Whatever is not recognised is asked for one by
//! one: what is done, and in which order, is the same in all cases.

use super::{
    Cuda,
    driver::Gpu,
    graph::Graph,
    libraries,
    stream_op::{KernelLaunch, StreamOp},
};
use crate::error::Result;
use std::sync::{Arc, MutexGuard, PoisonError};

/// Lists that are remembered: those of an update (its passes, their end, the optimiser), before and after a restart, and some more.
const MOST_SEQUENCES: usize = 16;

/// Fewer requests are asked for one by one.
const SHORTEST_SEQUENCE: usize = 4;

/// What is held back, and what was before.
#[derive(Default)]
pub(super) struct LaunchQueue {
    /// `None`: nothing is held back.
    list: Option<Vec<StreamOp>>,
    /// The last one last.
    known: Vec<Sequence>,
    /// Whether graphs can be had here: not with a driver that is too old, or that refused one. `None`: nobody has asked yet.
    able: Option<bool>,
}

/// A list that came before, with what its kernels were given last.
struct Sequence {
    requests: Vec<StreamOp>,
    graph: Option<Graph>,
}

impl Sequence {
    fn is_like(&self, list: &[StreamOp]) -> bool {
        self.requests.len() == list.len() && self.requests.iter().zip(list).all(|(known, new)| known.is_like(new))
    }
}

impl Cuda {
    fn queue(&self) -> MutexGuard<'_, LaunchQueue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for it, now or later.
    pub(super) fn enqueue(&self, request: StreamOp) {
        self.guarded(|_| {
            if let Some(list) = &mut self.queue().list {
                list.push(request);
                return Ok(());
            }
            self.submit(&request)
        });
    }

    /// Runs `work`, before which nothing is held back, unless something failed before.
    pub(super) fn after_flush<T>(&self, work: impl FnOnce(&Arc<Gpu>) -> Result<T>) -> Option<T> {
        self.flush_queue();
        self.guarded(work)
    }

    /// Holds back what is asked for from now on. Whether it does.
    pub(super) fn begin_deferring(&self) -> bool {
        let begun = self.guarded(|gpu| {
            let mut queue = self.queue();
            let able = *queue.able.get_or_insert_with(|| libraries::check_graphs(&gpu.name).is_ok());
            if able && queue.list.is_none() {
                queue.list = Some(Vec::new());
                gpu.keep_memory(true);
            }
            Ok(queue.list.is_some())
        });
        begun.unwrap_or(false)
    }

    /// Asks for all that is held back.
    pub(super) fn flush_queue(&self) {
        self.guarded(|gpu| {
            let mut queue = self.queue();
            let Some(list) = queue.list.as_mut().map(std::mem::take) else { return Ok(()) };
            self.submit_sequence(&mut queue, list)?;
            gpu.deferred_memory_is_idle()
        });
    }

    /// As [`Cuda::flush_queue`], and holds back no more. In one step: what another thread asks for meanwhile comes before or after.
    pub(super) fn end_deferring(&self) {
        self.guarded(|gpu| {
            let mut queue = self.queue();
            let sent = queue.list.take().map_or(Ok(()), |list| self.submit_sequence(&mut queue, list));
            gpu.keep_memory(false);
            sent?;
            gpu.deferred_memory_is_idle()
        });
    }

    /// Forgets what came before. Nothing is held back.
    pub(super) fn forget(&self) {
        self.queue().known.clear();
    }

    /// Memory has run out, where some may lie on the shelf: it goes back to the driver, and nothing is held back any more.
    pub(super) fn stop_deferring(&self) -> Result<()> {
        let gpu = &self.0.gpu;
        let mut queue = self.queue();
        let list = queue.list.take();
        list.iter().flatten().try_for_each(|request| self.submit(request))?;
        // Whoever holds back again would run out again.
        *queue = LaunchQueue { able: if list.is_some() { Some(false) } else { queue.able }, ..LaunchQueue::default() };
        gpu.deferred_memory_is_idle()?;
        gpu.keep_memory(false);
        gpu.clear_shelf()
    }

    fn submit_sequence(&self, queue: &mut LaunchQueue, list: Vec<StreamOp>) -> Result<()> {
        let one_by_one = |list: &[StreamOp]| list.iter().try_for_each(|request| self.submit(request));
        if list.len() < SHORTEST_SEQUENCE || queue.able == Some(false) {
            return one_by_one(&list);
        }
        let Some(at) = queue.known.iter().rposition(|known| known.is_like(&list)) else {
            if queue.known.len() == MOST_SEQUENCES {
                queue.known.remove(0);
            }
            one_by_one(&list)?;
            queue.known.push(Sequence { requests: list, graph: None });
            return Ok(());
        };
        let known = queue.known.remove(at);
        let graph = match known.graph {
            Some(graph) => {
                for (at, launch) in changes(&known.requests, &list) {
                    graph.change(self, at, launch)?;
                }
                graph
            }
            None => match Graph::new(self, &list) {
                Ok(graph) => graph,
                Err(_) => {
                    // A driver that takes no notes of something. If the GPU itself has failed, the next call says so.
                    queue.able = Some(false);
                    return one_by_one(&list);
                }
            },
        };
        graph.start()?;
        queue.known.push(Sequence { requests: list, graph: Some(graph) });
        Ok(())
    }
}

/// Kernels that are given something else than before, and their places.
fn changes<'a>(before: &'a [StreamOp], now: &'a [StreamOp]) -> impl Iterator<Item = (usize, &'a KernelLaunch)> {
    before.iter().zip(now).enumerate().filter_map(|(at, (before, now))| match now {
        StreamOp::Kernel(launch) if before != now => Some((at, launch)),
        _ => None,
    })
}
