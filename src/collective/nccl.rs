//! Collectives by NCCL, for processes with a GPU each. Gradients are summed from GPU to GPU, on a stream beside that of the
//! kernels; small messages take the line to rank 0.
//!
//! The order of a sum is NCCL's: the same bits on every process, and in every run with the same processes on the same
//! machines and the same library.

use super::{Collective, OnEnding, Pending, Ranks, Rendezvous};
use crate::{
    error::{Error, Result},
    ops::{Communicator, Cuda, NcclLibrary},
};
use std::{path::PathBuf, sync::Arc, time::Duration};

/// The processes of a job, as the launcher's environment names them.
pub struct Nccl {
    rank: usize,
    world_size: usize,
    line: Arc<Rendezvous>,
    gpus: Communicator,
}

impl Nccl {
    /// Meets the other processes within `limit`, and lets their GPUs find each other. NCCL is looked for in `folders`, then
    /// where the system looks. `on_ending` is called when a process is lost.
    pub fn start(
        ranks: &Ranks,
        limit: Duration,
        on_ending: OnEnding,
        device: &Cuda,
        folders: &[PathBuf],
    ) -> Result<Nccl> {
        let library = NcclLibrary::load(device, folders)?;
        let line = Rendezvous::meet(ranks, limit, on_ending)?;
        let own = if ranks.is_leader() { library.new_id(device)?.to_vec() } else { Vec::new() };
        let id = line.gather(&own)?.swap_remove(0);
        let id = id.try_into().map_err(|_| Error::world("rank 0 sent no identity for NCCL"))?;
        let gpus = library.join(device, id, ranks.rank, ranks.world_size)?;
        Ok(Nccl { rank: ranks.rank, world_size: ranks.world_size, line: Arc::new(line), gpus })
    }

    /// The line to rank 0.
    pub fn line(&self) -> &Arc<Rendezvous> {
        &self.line
    }

    /// Ends the line when all processes have come here.
    pub fn finish(&self) -> Result<()> {
        self.line.finish()
    }
}

impl Collective<Cuda> for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn name(&self, rank: usize) -> String {
        self.line.name(rank)
    }

    fn begin_all_reduce(&self, device: &Cuda, mut buffers: Vec<<Cuda as crate::ops::Device>::Buffer>) -> Pending<Cuda> {
        let sum = self.gpus.begin_sum(device, &mut buffers);
        let device = device.clone();
        Box::new(move || {
            sum.wait(&device);
            Ok(buffers)
        })
    }

    fn broadcast(&self, device: &Cuda, root: usize, buffer: &mut <Cuda as crate::ops::Device>::Buffer) -> Result<()> {
        self.gpus.broadcast(device, root, buffer);
        Ok(())
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.line.gather(own)
    }
}
