//! NCCL: sums over the GPUs of several processes. It works on a stream of its own, so that a sum is on its way while the
//! kernels go on; events say what waits for what.
//!
//! Its functions are looked up here: the library is called `libnccl.so.2` everywhere, a name that cudarc does not try.

use super::{
    Cuda,
    buffer::CudaBuffer,
    driver::Gpu,
    libraries,
    stream::{Event, Stream},
};
use crate::{
    error::{Error, Result},
    ops::Device,
};
use cudarc::driver::sys::CUstream;
use libloading::Library;
use std::{
    ffi::{CStr, c_char, c_int, c_void},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

/// What the first process makes and all others are told: how they find each other.
pub type NcclId = [u8; 128];

/// By value, as C passes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Id(NcclId);

type Comm = *mut c_void;

/// ncclFloat32 and ncclSum of nccl.h.
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

/// The functions that are called. They stay valid as long as the library is loaded.
struct Functions {
    get_unique_id: unsafe extern "C" fn(*mut Id) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Comm, c_int, Id, c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
    broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    _library: Library,
}

impl Functions {
    fn load(device: &str, folders: &[PathBuf]) -> Result<Functions> {
        let library = libraries::load_nccl(device, folders)?;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the type is that of nccl.h; the pointer lives beside the library.
                *unsafe { library.get($name.as_bytes()) }.map_err(|_| {
                    Error::environment(format!(
                        "device '{device}' is unavailable: {} has no function {}",
                        libraries::NCCL,
                        $name
                    ))
                    .help("it is too old, or not what its name says; update NCCL")
                })?
            };
        }
        Ok(Functions {
            get_unique_id: function!("ncclGetUniqueId"),
            comm_init_rank: function!("ncclCommInitRank"),
            comm_abort: function!("ncclCommAbort"),
            all_reduce: function!("ncclAllReduce"),
            broadcast: function!("ncclBroadcast"),
            group_start: function!("ncclGroupStart"),
            group_end: function!("ncclGroupEnd"),
            get_error_string: function!("ncclGetErrorString"),
            _library: library,
        })
    }

    fn check(&self, gpu: &Gpu, what: &str, result: c_int) -> Result<()> {
        if result == 0 {
            return Ok(());
        }
        // SAFETY: NCCL answers with a string of its own for any number.
        let text = unsafe { CStr::from_ptr((self.get_error_string)(result)) }.to_string_lossy();
        Err(Error::environment(format!("device '{}' ({}): {what} failed: {text}", gpu.name, gpu.model))
            .help("NCCL_DEBUG=WARN in the environment says more; a run goes on from its last checkpoint with --resume"))
    }
}

/// NCCL, found and loaded.
pub struct Nccl(Arc<Functions>);

/// The GPUs of all processes of a job, one each.
pub struct Communicator {
    functions: Arc<Functions>,
    gpu: Arc<Gpu>,
    stream: Stream,
    /// NCCL wants its calls one after the other.
    comm: Mutex<Handle>,
}

struct Handle(Comm);

// SAFETY: a communicator may be used from any thread, by one at a time: it is behind a mutex.
unsafe impl Send for Handle {}
impl Nccl {
    /// Looks for the library in `folders`, then where the system looks.
    pub fn load(cuda: &Cuda, folders: &[PathBuf]) -> Result<Nccl> {
        Ok(Nccl(Arc::new(Functions::load(&cuda.0.gpu.name, folders)?)))
    }

    /// A new identity of a job: rank 0 makes it.
    pub fn new_id(&self, cuda: &Cuda) -> Result<NcclId> {
        let gpu = &cuda.0.gpu;
        gpu.enter()?;
        let mut id = Id([0; 128]);
        // SAFETY: the pointer is to a variable of the type that NCCL writes.
        self.0.check(gpu, "ncclGetUniqueId", unsafe { (self.0.get_unique_id)(&mut id) })?;
        Ok(id.0)
    }

    /// Joins the processes of the job `id`; returns when all have come.
    pub fn join(&self, cuda: &Cuda, id: NcclId, rank: usize, world_size: usize) -> Result<Communicator> {
        let gpu = &cuda.0.gpu;
        gpu.enter()?;
        let (stream, mut comm) = (Stream::new(gpu)?, std::ptr::null_mut());
        // SAFETY: the pointer is to a variable of the type that is written; the context is current.
        let joined = unsafe { (self.0.comm_init_rank)(&mut comm, world_size as c_int, Id(id), rank as c_int) };
        self.0.check(gpu, "ncclCommInitRank", joined)?;
        Ok(Communicator { functions: self.0.clone(), gpu: gpu.clone(), stream, comm: Mutex::new(Handle(comm)) })
    }
}

impl Communicator {
    /// Begins to sum each of these f32 buffers over all processes, in place. Until [`Sum::wait`] nothing may use them.
    pub fn begin_sum(&self, cuda: &Cuda, buffers: &mut [CudaBuffer]) -> Sum {
        let places: Vec<(u64, usize)> = buffers.iter().map(|b| (b.address(0), cuda.len(b))).collect();
        let done = cuda.after_flush(|_| {
            self.on_own_stream(|comm| {
                let f = &self.functions;
                // SAFETY: every buffer has so many f32 elements, and its owner leaves it alone until the event is waited for.
                unsafe {
                    f.check(&self.gpu, "ncclGroupStart", (f.group_start)())?;
                    for (address, len) in places.into_iter().filter(|(_, len)| *len > 0) {
                        let place = address as *mut c_void;
                        let result = (f.all_reduce)(place, place, len, FLOAT32, SUM, comm, self.stream.handle());
                        f.check(&self.gpu, "ncclAllReduce", result)?;
                    }
                    f.check(&self.gpu, "ncclGroupEnd", (f.group_end)())
                }
            })
        });
        Sum(done)
    }

    /// Gives every process what `root` holds in this f32 buffer.
    pub fn broadcast(&self, cuda: &Cuda, root: usize, buffer: &mut CudaBuffer) {
        let (place, len) = (buffer.address(0) as *mut c_void, cuda.len(buffer));
        let done = cuda.after_flush(|_| {
            self.on_own_stream(|comm| {
                let f = &self.functions;
                let stream = self.stream.handle();
                // SAFETY: the buffer has so many f32 elements, and the kernels' stream waits below.
                let result = unsafe { (f.broadcast)(place, place, len, FLOAT32, root as c_int, comm, stream) };
                f.check(&self.gpu, "ncclBroadcast", result)
            })
        });
        Sum(done).wait(cuda);
    }

    /// Does `work` on the own stream, after all that the kernels' stream has been asked for. The event comes when it is done.
    fn on_own_stream(&self, work: impl FnOnce(Comm) -> Result<()>) -> Result<Event> {
        self.gpu.enter()?;
        let comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        Event::record(&self.gpu, self.gpu.stream())?.make_wait(self.stream.handle())?;
        work(comm.0)?;
        Event::record(&self.gpu, self.stream.handle())
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let comm = self.comm.get_mut().unwrap_or_else(PoisonError::into_inner);
        if self.gpu.enter().is_ok() {
            // SAFETY: nobody else has it. All sums were waited for, or the job has failed: aborting waits for no one.
            unsafe { (self.functions.comm_abort)(comm.0) };
        }
    }
}

/// A sum that is on its way; nothing, if something failed before.
pub struct Sum(Option<Event>);

impl Sum {
    /// What the GPU is asked for from now on waits for the sum; the host does not.
    pub fn wait(self, cuda: &Cuda) {
        if let Some(done) = self.0 {
            cuda.guarded(|gpu| done.make_wait(gpu.stream()));
        }
    }
}
