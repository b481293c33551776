//! Requests that are held back and asked for together. What comes a second time becomes a graph, and is started as a whole from
//! then on; kernels that are given something else than last time are told so before. Whatever is not recognised is asked for one by
//! one: what is done, and in which order, is the same in all cases.

use super::{
    Cuda,
    driver::Gpu,
    graph::Graph,
    libraries,
    request::{Launch, Request},
};
use crate::error::Result;
use std::sync::{Arc, MutexGuard, PoisonError};

/// Lists that are remembered: those of an update (its passes, their end, the optimiser), before and after a restart, and some more.
const REMEMBERED: usize = 16;

/// Fewer requests are asked for one by one.
const FEWEST: usize = 4;

/// What is held back, and what was before.
#[derive(Default)]
pub(super) struct Held {
    /// `None`: nothing is held back.
    list: Option<Vec<Request>>,
    /// The last one last.
    known: Vec<Known>,
    /// Whether graphs can be had here: not with a driver that is too old, or that refused one. `None`: nobody has asked yet.
    able: Option<bool>,
}

/// A list that came before, with what its kernels were given last.
struct Known {
    requests: Vec<Request>,
    graph: Option<Graph>,
}

impl Known {
    fn is_like(&self, list: &[Request]) -> bool {
        self.requests.len() == list.len() && self.requests.iter().zip(list).all(|(known, new)| known.is_like(new))
    }
}

impl Cuda {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for it, now or later.
    pub(super) fn ask(&self, request: Request) {
        self.attempt(|_| {
            if let Some(list) = &mut self.held().list {
                list.push(request);
                return Ok(());
            }
            self.issue(&request)
        });
    }

    /// Runs `work`, before which nothing is held back, unless something failed before.
    pub(super) fn settled<T>(&self, work: impl FnOnce(&Arc<Gpu>) -> Result<T>) -> Option<T> {
        self.send_held();
        self.attempt(work)
    }

    /// Holds back what is asked for from now on. Whether it does.
    pub(super) fn begin_holding(&self) -> bool {
        let begun = self.attempt(|gpu| {
            let mut held = self.held();
            let able = *held.able.get_or_insert_with(|| libraries::check_graphs(&gpu.name).is_ok());
            if able && held.list.is_none() {
                held.list = Some(Vec::new());
                gpu.keep_memory(true);
            }
            Ok(held.list.is_some())
        });
        begun.unwrap_or(false)
    }

    /// Asks for all that is held back.
    pub(super) fn send_held(&self) {
        self.attempt(|gpu| {
            let mut held = self.held();
            let Some(list) = held.list.as_mut().map(std::mem::take) else { return Ok(()) };
            self.send_list(&mut held, list)?;
            gpu.nothing_held()
        });
    }

    /// As [`Cuda::send_held`], and holds back no more. In one step: what another thread asks for meanwhile comes before or after.
    pub(super) fn end_holding(&self) {
        self.attempt(|gpu| {
            let mut held = self.held();
            let sent = held.list.take().map_or(Ok(()), |list| self.send_list(&mut held, list));
            gpu.keep_memory(false);
            sent?;
            gpu.nothing_held()
        });
    }

    /// Forgets what came before. Nothing is held back.
    pub(super) fn forget(&self) {
        self.held().known.clear();
    }

    /// Memory has run out, where some may lie on the shelf: it goes back to the driver, and nothing is held back any more.
    pub(super) fn stop_holding(&self) -> Result<()> {
        let gpu = &self.0.gpu;
        let mut held = self.held();
        let list = held.list.take();
        list.iter().flatten().try_for_each(|request| self.issue(request))?;
        // Whoever holds back again would run out again.
        *held = Held { able: if list.is_some() { Some(false) } else { held.able }, ..Held::default() };
        gpu.nothing_held()?;
        gpu.keep_memory(false);
        gpu.clear_shelf()
    }

    fn send_list(&self, held: &mut Held, list: Vec<Request>) -> Result<()> {
        let one_by_one = |list: &[Request]| list.iter().try_for_each(|request| self.issue(request));
        if list.len() < FEWEST || held.able == Some(false) {
            return one_by_one(&list);
        }
        let Some(at) = held.known.iter().rposition(|known| known.is_like(&list)) else {
            if held.known.len() == REMEMBERED {
                held.known.remove(0);
            }
            one_by_one(&list)?;
            held.known.push(Known { requests: list, graph: None });
            return Ok(());
        };
        let known = held.known.remove(at);
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
                    held.able = Some(false);
                    return one_by_one(&list);
                }
            },
        };
        graph.start()?;
        held.known.push(Known { requests: list, graph: Some(graph) });
        Ok(())
    }
}

/// Kernels that are given something else than before, and their places.
fn changes<'a>(before: &'a [Request], now: &'a [Request]) -> impl Iterator<Item = (usize, &'a Launch)> {
    before.iter().zip(now).enumerate().filter_map(|(at, (before, now))| match now {
        Request::Kernel(launch) if before != now => Some((at, launch)),
        _ => None,
    })
}
