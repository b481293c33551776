//! Collectives by NCCL, for processes with a GPU each. Gradients are summed from GPU to GPU, on a stream beside that of the
//! kernels; small messages take the line to rank 0.
//!
//! The order of a sum is NCCL's: the same bits on every process, and in every run with the same processes on the same
//! machines and the same library.

use super::{Collective, InJob, Job, Pending, gpu::OnGpu};
use crate::{
    error::{Error, Result},
    ops::{Communicator, Cuda, NcclLibrary},
};
use std::{path::PathBuf, sync::Arc};

/// The GPUs of a job.
#[derive(Clone)]
pub struct Nccl {
    job: Arc<Job>,
    gpus: Arc<Communicator>,
}

impl Nccl {
    /// Lets the GPUs of all processes find each other. NCCL is looked for in `folders`, then where the system looks.
    pub fn start(job: Arc<Job>, device: &Cuda, folders: &[PathBuf]) -> Result<Nccl> {
        let library = NcclLibrary::load(device, folders)?;
        let own = if job.is_leader() { library.new_id(device)?.to_vec() } else { Vec::new() };
        let id = job.gather(&own)?.swap_remove(0);
        let id = id.try_into().map_err(|_| Error::environment("rank 0 sent no identity for NCCL"))?;
        let gpus = library.join(device, id, job.ranks().rank, job.ranks().world_size)?;
        Ok(Nccl { job, gpus: Arc::new(gpus) })
    }
}

impl InJob for Nccl {
    fn job(&self) -> &Job {
        &self.job
    }
}

impl<D: OnGpu> Collective<D> for Nccl {
    fn begin_all_reduce(&self, device: &D, mut buffers: Vec<D::Buffer>) -> Pending<D> {
        let sum = self.gpus.begin_sum(device.gpu(), &mut buffers);
        Box::new(move |device| {
            sum.wait(device.gpu());
            Ok(buffers)
        })
    }

    fn broadcast(&self, device: &D, root: usize, buffer: &mut D::Buffer) -> Result<()> {
        self.gpus.broadcast(device.gpu(), root, buffer);
        Ok(())
    }
}
