//! Collectives by MPI, cargo feature `mpi`: from the host's memory, on CPUs or GPUs, or from GPU to GPU where MPI can ([`MpiOnGpus`]).
//!
//! One thread makes all calls of MPI, as its level `MPI_THREAD_FUNNELED` asks, so that sums go on while the others compute.
//! It looks now and then whether a call has ended instead of waiting in it: MPI's own waiting takes a whole core.

#[cfg(feature = "cuda")]
mod gpus;

#[cfg(feature = "cuda")]
pub use gpus::MpiOnGpus;

use super::{Collective, ControlChannel, InJob, Job, OnEnding, Pending, Ranks, rendezvous};
use crate::{
    error::{Error, Result},
    ops::Device,
};
use mpi::{
    Threading,
    request::{Request, Scope},
    topology::SimpleCommunicator,
    traits::*,
};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// f32 elements of a sum that travel at a time, per process: 4 MiB.
const PIECE: usize = 1 << 20;

/// f32 elements of a broadcast that travel at a time; MPI counts in i32.
const BROADCAST: usize = 1 << 26;

/// How long the thread sleeps where nobody waits for a call that has not ended.
const NAP: Duration = Duration::from_micros(100);

type Work = Box<dyn FnOnce(&SimpleCommunicator) + Send>;

/// The thread that calls MPI.
pub struct Mpi {
    work: Mutex<Option<Sender<Work>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// How many wait for something that the thread does.
    waiting: Arc<AtomicUsize>,
}

impl Mpi {
    /// Starts MPI, and compares what it says about the processes with what the environment says.
    pub fn start(ranks: &Ranks) -> Result<Mpi> {
        let (work, jobs) = channel::<Work>();
        let (tell, told) = channel();
        let run = move || {
            let Some((universe, level)) = mpi::initialize_with_threading(Threading::Funneled) else {
                let _ = tell.send(None);
                return;
            };
            let world = universe.world();
            let _ = tell.send((level >= Threading::Funneled).then(|| (world.rank() as usize, world.size() as usize)));
            jobs.into_iter().for_each(|job| job(&world));
        };
        let failed = |why: String| Error::environment(format!("cannot start MPI: {why}"));
        let thread = thread::Builder::new().name("mpi".into()).spawn(run).map_err(|e| failed(e.to_string()))?;
        let found = told.recv().ok().flatten();
        let (rank, size) = found.ok_or_else(|| failed("it does not work with threads".into()))?;
        if (rank, size) != (ranks.rank, ranks.world_size) {
            return Err(Error::request(format!(
                "the environment of {} calls this process rank {} of {}, MPI calls it rank {rank} of {size}",
                ranks.launcher, ranks.rank, ranks.world_size
            ))
            .help(
                "start all processes with the mpirun (or srun --mpi=pmix) of the MPI that relora-kit was built with",
            ));
        }
        Ok(Mpi { work: Mutex::new(Some(work)), thread: Mutex::new(Some(thread)), waiting: Arc::default() })
    }

    /// Opens a line to rank 0, whose address MPI carries.
    pub(super) fn meet(&self, ranks: &Ranks, limit: Duration, on_ending: OnEnding) -> Result<ControlChannel> {
        const LONGEST: usize = 4096;
        let (mut said, mut listener) = (vec![0u8; LONGEST], None);
        if ranks.is_leader() {
            let own = rendezvous::listen("::", 0)?;
            let port = own.local_addr().map_err(|e| Error::environment(format!("rank 0 has no address: {e}")))?.port();
            let mut hosts = vec![rendezvous::host_name()];
            hosts.extend(rendezvous::addresses().iter().map(ToString::to_string));
            let text = format!("{port} {}", hosts.join(" "));
            let text = &text.as_bytes()[..text.len().min(LONGEST)];
            said[..text.len()].copy_from_slice(text);
            listener = Some(own);
        }
        let said = self.ask(move |world, waiting| {
            mpi::request::scope(|scope| {
                let request = world.process_at_rank(0).immediate_broadcast_into(scope, &mut said[..]);
                complete(request, waiting);
            });
            said
        })?;
        if let Some(listener) = listener {
            return rendezvous::lead(listener, ranks, "", limit, on_ending);
        }
        let text = String::from_utf8_lossy(&said);
        let mut words = text.trim_end_matches('\0').split(' ').map(str::to_owned);
        let port = words.next().and_then(|port| port.parse().ok()).unwrap_or_default();
        let mut hosts: Vec<String> = words.collect();
        if hosts.first() == Some(&rendezvous::host_name()) {
            hosts.insert(0, "localhost".into());
        }
        rendezvous::join(&hosts, port, ranks, "", limit, on_ending)
    }

    /// Has the thread do something, and returns at once.
    fn begin<T: Send + 'static>(
        &self,
        work: impl FnOnce(&SimpleCommunicator, &AtomicUsize) -> T + Send + 'static,
    ) -> Receiver<T> {
        let ((answer, answered), waiting) = (channel(), self.waiting.clone());
        if let Some(queue) = &*self.work.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = queue.send(Box::new(move |world| drop(answer.send(work(world, &waiting)))));
        }
        answered
    }

    /// Has the thread do something, and waits for it.
    fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&SimpleCommunicator, &AtomicUsize) -> T + Send + 'static,
    ) -> Result<T> {
        wait_for(&self.begin(work), &self.waiting)
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // The thread ends with its queue, and MPI with the thread.
        self.work.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
    }
}

fn wait_for<T>(answer: &Receiver<T>, waiting: &AtomicUsize) -> Result<T> {
    waiting.fetch_add(1, Ordering::Relaxed);
    let result = answer.recv().map_err(|_| Error::environment("the thread that calls MPI has ended"));
    waiting.fetch_sub(1, Ordering::Relaxed);
    result
}

/// Waits until a call of MPI has ended.
fn complete<'a, T: ?Sized, S: Scope<'a>>(mut request: Request<'a, T, S>, waiting: &AtomicUsize) {
    loop {
        match request.test() {
            Ok(_) => return,
            Err(unfinished) => request = unfinished,
        }
        match waiting.load(Ordering::Relaxed) {
            0 => thread::sleep(NAP),
            _ => thread::yield_now(),
        }
    }
}

/// Sums `values` over all processes, element by element in the order of the ranks: every process adds up its part of each
/// piece, and gives it to the others.
fn sum(world: &SimpleCommunicator, values: &mut [f32], waiting: &AtomicUsize) {
    let processes = world.size() as usize;
    let [mut mine, mut theirs, mut own] = [const { Vec::<f32>::new() }; 3];
    for piece in values.chunks_mut(PIECE * processes) {
        let part = piece.len().div_ceil(processes);
        mine.clear();
        mine.extend_from_slice(piece);
        mine.resize(part * processes, 0.0);
        theirs.resize(part * processes, 0.0);
        mpi::request::scope(|scope| {
            complete(world.immediate_all_to_all_into(scope, &mine[..], &mut theirs[..]), waiting);
        });
        own.clear();
        own.extend_from_slice(&theirs[..part]);
        for other in theirs[part..].chunks_exact(part) {
            own.iter_mut().zip(other).for_each(|(sum, x)| *sum += x);
        }
        mpi::request::scope(|scope| {
            complete(world.immediate_all_gather_into(scope, &own[..], &mut mine[..]), waiting);
        });
        piece.copy_from_slice(&mine[..piece.len()]);
    }
}

/// [`Collective`] by MPI, from the host's memory.
#[derive(Clone)]
pub struct MpiCollective {
    job: Arc<Job>,
    mpi: Arc<Mpi>,
}

impl MpiCollective {
    /// Of this job, whose MPI is `mpi`.
    pub fn new(job: Arc<Job>, mpi: Arc<Mpi>) -> MpiCollective {
        MpiCollective { job, mpi }
    }
}

impl InJob for MpiCollective {
    fn job(&self) -> &Job {
        &self.job
    }
}

impl<D: Device> Collective<D> for MpiCollective {
    fn begin_all_reduce(&self, device: &D, mut buffers: Vec<D::Buffer>) -> Pending<D> {
        let mut values = Vec::with_capacity(buffers.iter().map(|b| device.len(b)).sum());
        buffers.iter().for_each(|buffer| values.extend_from_slice(&device.view(buffer)));
        let sums = self.mpi.begin(move |world, waiting| {
            sum(world, &mut values, waiting);
            values
        });
        let waiting = self.mpi.waiting.clone();
        Box::new(move |device| {
            let sums = wait_for(&sums, &waiting)?;
            let mut rest = &sums[..];
            for buffer in &mut buffers {
                let (own, others) = rest.split_at(device.len(buffer));
                device.write(buffer, own);
                rest = others;
            }
            Ok(buffers)
        })
    }

    fn broadcast(&self, device: &D, root: usize, buffer: &mut D::Buffer) -> Result<()> {
        let sends = self.job.ranks().rank == root;
        let mut values = if sends { device.read(buffer) } else { vec![0.0; device.len(buffer)] };
        let values = self.mpi.ask(move |world, waiting| {
            for piece in values.chunks_mut(BROADCAST) {
                mpi::request::scope(|scope| {
                    let root = world.process_at_rank(root as i32);
                    complete(root.immediate_broadcast_into(scope, piece), waiting);
                });
            }
            values
        })?;
        if !sends {
            device.write(buffer, &values);
        }
        Ok(())
    }
}
