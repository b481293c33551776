//! Collectives by an MPI that is CUDA-aware: it takes addresses on the GPU. Values go from GPU to GPU, and are added up there.

use super::{BROADCAST, Mpi, complete, wait_for};
use crate::{
    collective::{Collective, InJob, Job, Pending, gpu::OnGpu},
    error::{Error, Result},
    ops::{Cuda, DeviceSpan, ReductionStaging},
};
use mpi::{
    datatype::{AsDatatype, Buffer, BufferMut, Collection, Equivalence, Pointer, PointerMut},
    topology::SimpleCommunicator,
    traits::*,
};
use std::{
    ffi::{c_int, c_void},
    sync::{Arc, atomic::AtomicUsize},
};

/// Says whether MPI takes addresses on GPUs (1) or not (0), where MPI cannot be asked itself.
const AWARE_VARIABLE: &str = "RELORA_KIT_CUDA_AWARE_MPI";

/// f32 elements of a sum that travel at a time, of all processes together: 8 MiB, so that the room for them does not grow with
/// the number of processes.
const PIECE: usize = 2 << 20;

/// [`Collective`] by MPI, between GPUs.
#[derive(Clone)]
pub struct MpiOnGpus {
    job: Arc<Job>,
    mpi: Arc<Mpi>,
    staging: Arc<ReductionStaging>,
}

impl MpiOnGpus {
    /// Of this job, whose MPI is `mpi`; `None` where some process has an MPI that is not CUDA-aware.
    pub fn start(job: Arc<Job>, mpi: Arc<Mpi>, cuda: &Cuda) -> Result<Option<MpiOnGpus>> {
        let all = job.gather(&[is_aware()?.into()])?;
        if all.iter().any(|aware| aware != &[1]) {
            return Ok(None);
        }
        // A part for every process, all of one length.
        let staging = ReductionStaging::new(cuda, PIECE.next_multiple_of(job.ranks().world_size))?;
        Ok(Some(MpiOnGpus { job, mpi, staging: Arc::new(staging) }))
    }
}

/// What the environment says about MPI, or what Open MPI says about itself.
fn is_aware() -> Result<bool> {
    match std::env::var(AWARE_VARIABLE).unwrap_or_default().as_str() {
        "1" => return Ok(true),
        "0" => return Ok(false),
        "" => {}
        other => {
            return Err(Error::request(format!("{AWARE_VARIABLE} is '{other}', expected 1 or 0"))
                .help("1 where MPI takes addresses on GPUs, as MPICH does with MPICH_GPU_SUPPORT_ENABLED=1"));
        }
    }
    // SAFETY: the name is a string of C; a function of this name is that of Open MPI's mpi-ext.h.
    unsafe {
        let function = libc::dlsym(libc::RTLD_DEFAULT, c"MPIX_Query_cuda_support".as_ptr());
        if function.is_null() {
            return Ok(false);
        }
        Ok(std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(function)() == 1)
    }
}

/// What MPI is given.
struct Place(DeviceSpan);

// SAFETY: so many f32 lie there; whoever makes a place keeps them until MPI is done.
unsafe impl Pointer for Place {
    fn pointer(&self) -> *const c_void {
        self.0.address() as *const c_void
    }
}

// SAFETY: the f32 at this address are allocated until MPI is done, and nothing else uses them.
unsafe impl PointerMut for Place {
    fn pointer_mut(&mut self) -> *mut c_void {
        self.0.address() as *mut c_void
    }
}

// SAFETY: so many f32 are allocated at the address.
unsafe impl Collection for Place {
    fn count(&self) -> i32 {
        self.0.len() as i32
    }
}

// SAFETY: the elements are f32.
unsafe impl AsDatatype for Place {
    type Out = <f32 as Equivalence>::Out;

    fn as_datatype(&self) -> Self::Out {
        f32::equivalent_datatype()
    }
}

// SAFETY: pointer, count and data type belong together.
unsafe impl Buffer for Place {}
// SAFETY: pointer, count and data type belong together.
unsafe impl BufferMut for Place {}

/// [`super::sum`], on the GPU.
///
/// # Safety
///
/// `values` must be allocated, and used by nothing else until this returns.
unsafe fn sum(
    world: &SimpleCommunicator,
    values: DeviceSpan,
    staging: &ReductionStaging,
    waiting: &AtomicUsize,
) -> Result<()> {
    let (processes, room) = (world.size() as usize, staging.send_buffer().len());
    for first in (0..values.len()).step_by(room) {
        let piece = values.part(first, (values.len() - first).min(room));
        let part = piece.len().div_ceil(processes);
        // What is beyond the piece's end in the last part is carried along, and never copied back.
        let [out, back] = [staging.send_buffer(), staging.receive_buffer()].map(|all| all.part(0, part * processes));
        // SAFETY: the caller keeps `values` allocated and lets nothing else use it; the staging buffers live in `staging`.
        unsafe { staging.copy(piece, out.part(0, piece.len())) }?;
        staging.synchronize()?;
        let (sent, mut arrived) = (Place(out), Place(back));
        mpi::request::scope(|scope| {
            complete(world.immediate_all_to_all_into(scope, &sent, &mut arrived), waiting);
        });
        let own = back.part(0, part);
        // SAFETY: the parts are disjoint, of the receive buffer, which MPI is done with; `synchronize` follows.
        (1..processes).for_each(|rank| unsafe { staging.add(back.part(rank * part, part), own) });
        staging.synchronize()?;
        let (sent, mut arrived) = (Place(own), Place(out));
        mpi::request::scope(|scope| {
            complete(world.immediate_all_gather_into(scope, &sent, &mut arrived), waiting);
        });
        // SAFETY: the caller keeps `values` allocated and lets nothing else use it; the staging buffers live in `staging`.
        unsafe { staging.copy(out.part(0, piece.len()), piece) }?;
    }
    staging.synchronize()
}

impl InJob for MpiOnGpus {
    fn job(&self) -> &Job {
        &self.job
    }
}

impl<D: OnGpu> Collective<D> for MpiOnGpus {
    fn begin_all_reduce(&self, _device: &D, buffers: Vec<D::Buffer>) -> Pending<D> {
        let (kernels, staging) = (self.staging.record_kernels(), self.staging.clone());
        // The buffers go along: they must be there until MPI is done, whoever waits for it.
        let sums = self.mpi.begin(move |world, waiting| {
            staging.wait_for_kernels(&kernels?)?;
            let mut spans = buffers.iter().map(|buffer| staging.span(buffer));
            // SAFETY: `buffers` owns the elements, and the kernels are done with them.
            let sums = spans.try_for_each(|span| unsafe { sum(world, span, &staging, waiting) });
            sums.map(|()| buffers)
        });
        let waiting = self.mpi.waiting.clone();
        Box::new(move |_| wait_for(&sums, &waiting)?)
    }

    fn broadcast(&self, _device: &D, root: usize, buffer: &mut D::Buffer) -> Result<()> {
        let (kernels, staging, span) =
            (self.staging.record_kernels()?, self.staging.clone(), self.staging.span(buffer));
        self.mpi.ask(move |world, waiting| {
            staging.wait_for_kernels(&kernels)?;
            for first in (0..span.len()).step_by(BROADCAST) {
                let mut piece = Place(span.part(first, (span.len() - first).min(BROADCAST)));
                mpi::request::scope(|scope| {
                    let root = world.process_at_rank(root as i32);
                    complete(root.immediate_broadcast_into(scope, &mut piece), waiting);
                });
            }
            Ok(())
        })?
    }
}
