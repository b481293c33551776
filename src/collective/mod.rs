//! Several processes that compute one thing: who they are, how they meet, and what they exchange.
//!
//! Buffers are summed by NCCL from GPU to GPU, or by MPI (cargo feature `mpi`). A line of TCP to rank 0 carries small messages
//! only, and notices a process that dies.

mod alone;
mod control_channel;
#[cfg(feature = "cuda")]
mod gpu;
mod job;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "cuda")]
mod nccl;
mod ranks;
mod rendezvous;
mod wire;

pub use alone::Alone;
pub use control_channel::{ControlChannel, Ending, OnEnding};
pub use job::Job;
#[cfg(all(feature = "mpi", feature = "cuda"))]
pub use mpi::MpiOnGpus;
#[cfg(feature = "mpi")]
pub use mpi::{Mpi, MpiCollective};
#[cfg(feature = "cuda")]
pub use nccl::Nccl;
pub use ranks::{Master, Ranks};
pub use rendezvous::{JOIN_VARIABLE, join_limit};

use crate::{error::Result, ops::Device};

/// Buffers that are on their way: calling it waits, and gives them back in the order they were handed over.
pub type Pending<D> = Box<dyn FnOnce(&D) -> Result<Vec<<D as Device>::Buffer>>>;

/// The processes that compute together.
pub trait Members: Send + Sync {
    /// This process, from 0.
    fn rank(&self) -> usize;
    /// Processes in all.
    fn world_size(&self) -> usize;
    /// A process in words: `rank 2 (node1)`.
    fn name(&self, rank: usize) -> String;
    /// Gives every process the few bytes of each, in the order of the ranks.
    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>>;
    /// Returns when all processes have come here.
    fn barrier(&self) -> Result<()> {
        self.gather(&[]).map(|_| ())
    }
    /// Whether this is the process that writes files and reports.
    fn is_leader(&self) -> bool {
        self.rank() == 0
    }
}

/// What they do with buffers. Every process calls the same methods in the same order; a call ends when all have made it. A
/// process that is gone ends the job through its [`ControlChannel`], whatever the others wait in.
pub trait Collective<D: Device>: Members {
    /// Begins to sum each buffer over all processes, element by element in f32: the same bits on every process, and in every
    /// run with as many. The caller computes on; it waits by calling what this returns.
    fn begin_all_reduce(&self, device: &D, buffers: Vec<D::Buffer>) -> Pending<D>;
    /// Gives every process what `root` holds in `buffer`; all have one of the same length.
    fn broadcast(&self, device: &D, root: usize, buffer: &mut D::Buffer) -> Result<()>;
}

/// Belongs to a job, whose processes are the members.
trait InJob: Send + Sync {
    fn job(&self) -> &Job;
}

impl<T: InJob> Members for T {
    fn rank(&self) -> usize {
        self.job().ranks().rank
    }

    fn world_size(&self) -> usize {
        self.job().ranks().world_size
    }

    fn name(&self, rank: usize) -> String {
        self.job().name(rank)
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.job().gather(own)
    }
}
