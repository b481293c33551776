//! The processes of one job, met: what they need of each other besides the sums of buffers.

use super::{ControlChannel, OnEnding, Ranks, rendezvous};
use crate::error::{Error, Result};
use std::time::Duration;

#[cfg(feature = "mpi")]
use super::mpi::Mpi;
#[cfg(feature = "mpi")]
use std::sync::{Arc, OnceLock};

/// This process among the others of its job, with an open line to them.
pub struct Job {
    ranks: Ranks,
    line: ControlChannel,
    #[cfg(feature = "mpi")]
    mpi: OnceLock<Arc<Mpi>>,
}

impl Job {
    /// Meets the other processes within `limit`: at `MASTER_ADDR`, or where that is not set, at an address that MPI tells
    /// them. `on_ending` is called when one is lost later.
    pub fn join(ranks: Ranks, limit: Duration, on_ending: OnEnding) -> Result<Job> {
        let by_mpi = ranks.master.is_none() && ranks.launcher == "mpirun";
        #[cfg(feature = "mpi")]
        if by_mpi {
            let mpi = Mpi::start(&ranks)?;
            let line = mpi.meet(&ranks, limit, on_ending)?;
            return Ok(Job { ranks, line, mpi: OnceLock::from(Arc::new(mpi)) });
        }
        if by_mpi {
            return Err(Error::request(format!(
                "mpirun started {} processes, but this relora-kit was built without MPI and MASTER_ADDR is not set",
                ranks.world_size
            ))
            .help("build it with `cargo install --path . --features mpi`, or say where rank 0 is: mpirun -x MASTER_ADDR=HOST"));
        }
        let line = rendezvous::meet(&ranks, limit, on_ending)?;
        Ok(Job {
            ranks,
            line,
            #[cfg(feature = "mpi")]
            mpi: OnceLock::new(),
        })
    }

    /// MPI, which starts with the first call of this.
    #[cfg(feature = "mpi")]
    pub fn mpi(&self) -> Result<Arc<Mpi>> {
        if let Some(mpi) = self.mpi.get() {
            return Ok(mpi.clone());
        }
        let mpi = Arc::new(Mpi::start(&self.ranks)?);
        Ok(self.mpi.get_or_init(|| mpi).clone())
    }

    /// Which process this is.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Whether this is the process that writes files and reports.
    pub fn is_leader(&self) -> bool {
        self.ranks.is_leader()
    }

    /// A process in words: `rank 2 (node1)`.
    pub fn name(&self, rank: usize) -> String {
        self.line.name(rank)
    }

    /// The machine of a process.
    pub fn host(&self, rank: usize) -> String {
        self.line.host(rank).to_owned()
    }

    /// Gives every process the bytes of each, in the order of the ranks.
    pub fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.line.gather(own)
    }

    /// Gives rank 0 the bytes of each process, in the order of the ranks, and the others nothing.
    pub fn collect(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.line.collect(own)
    }

    /// Gives every process what rank 0 says.
    pub fn agree(&self, own: &str) -> Result<String> {
        let all = self.gather(if self.is_leader() { own.as_bytes() } else { &[] })?;
        Ok(all.first().map_or(String::new(), |said| String::from_utf8_lossy(said).into_owned()))
    }

    /// Tells the others that this process ends with `error`; see [`ControlChannel::fail`].
    pub fn fail(&self, error: &Error) -> bool {
        self.line.fail(error)
    }

    /// Ends the line when all processes have come here: from now on they may go.
    pub fn finish(&self) -> Result<()> {
        self.line.finish()
    }
}
