//! Caching allocator: size-keyed free lists with stable addresses, as graph replay requires, over one memory pool of the driver,
//! and a pinned staging buffer for asynchronous host-to-device copies.
//!
//! Allocating and freeing are ordered by the stream, so the host never waits for them, and a block that one operation frees can
//! serve the next one. While launches are deferred ([`super::launch_queue`]), a freed block may still be read by launches that the
//! GPU has not seen: the driver does not get it back. It goes to a free list, from which the next allocation of its size takes the
//! lowest address. Equal sequences of launches therefore use equal addresses, by which they are recognised.
//!
//! This file calls the driver directly and reports its error codes; [`super::memory`] turns them into errors.

use cudarc::driver::sys::{self, CUmemPool_attribute as Attribute, CUresult, CUstream};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::c_void,
    mem::{take, zeroed},
    ptr,
    sync::{Mutex, MutexGuard, PoisonError},
};

type Result<T> = std::result::Result<T, CUresult>;

/// Where a block goes when it is freed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// It was allocated while nothing was deferred, and returns to the driver's pool.
    Driver,
    /// It was allocated while launches were deferred, and returns to a free list at once: they run in order.
    FreeList,
    /// As `FreeList`, for a block that the host writes at once, before all deferred launches. None of these may use it for
    /// something else, so it returns to the uploads' own free list, and only once they have been submitted.
    UploadFreeList,
}

/// A block of device memory.
#[derive(Clone, Copy)]
pub struct Block {
    /// Device address of the first byte.
    pub address: u64,
    /// Size in bytes.
    pub bytes: usize,
    /// Where it goes when it is freed.
    pub origin: Origin,
}

/// Blocks that the allocator keeps instead of the driver.
#[derive(Default)]
struct FreeLists {
    deferring: bool,
    /// Addresses by origin and size.
    free: BTreeMap<(Origin, usize), BTreeSet<u64>>,
    /// Freed, and still used by deferred launches.
    in_use: Vec<Block>,
}

impl FreeLists {
    fn put(&mut self, block: Block) {
        self.free.entry((block.origin, block.bytes)).or_default().insert(block.address);
    }
}

/// A pinned buffer of the host, from which the GPU fetches small uploads while the host continues.
#[derive(Default)]
pub struct Staging {
    address: usize,
    used: usize,
}

/// Capacity of the staging buffer in bytes.
const STAGING_BYTES: usize = 4 << 20;
/// The largest upload in bytes that is staged. A larger one would fill the buffer too soon, and is worth a wait.
const LARGEST_STAGED: usize = 1 << 20;

/// What [`CachingAllocator::stage`] found.
pub enum Staged<'a> {
    /// The copy in pinned memory. While the guard lives, nothing else is staged and no wait declares the buffer idle.
    Pinned { copy: *const u8, _guard: MutexGuard<'a, Staging> },
    /// The bytes are too many to stage.
    TooLarge,
    /// The buffer is full: wait for the stream, call [`CachingAllocator::staging`]`().idle()`, and stage again.
    Full,
}

impl Staging {
    /// Declares that no copy out of the buffer is pending: the stream has been waited for.
    pub fn idle(&mut self) {
        self.used = 0;
    }
}

/// The memory of one GPU: the driver's pool, free lists and the staging buffer.
pub struct CachingAllocator {
    pool: sys::CUmemoryPool,
    lists: Mutex<FreeLists>,
    staging: Mutex<Staging>,
}

// SAFETY: the pool is the driver's handle, which may be used from any thread; all else is behind mutexes.
unsafe impl Send for CachingAllocator {}
// SAFETY: the driver synchronises calls on one pool; all else is behind mutexes.
unsafe impl Sync for CachingAllocator {}

fn ok(result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(result) }
}

impl CachingAllocator {
    /// An empty pool on the GPU with this ordinal, which keeps what it gets from the driver.
    ///
    /// # Safety
    ///
    /// The GPU's context must be current on this thread.
    pub unsafe fn create(ordinal: usize) -> Result<CachingAllocator> {
        let (mut pool, mut keep) = (ptr::null_mut(), u64::MAX);
        // SAFETY: the properties are plain numbers, for which 0 is the default, and so is the union of the location; the
        // other pointers are to variables of the types that the driver reads and writes.
        unsafe {
            let mut properties: sys::CUmemPoolProps = zeroed();
            properties.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
            properties.handleTypes = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE;
            properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
            properties.location.__bindgen_anon_1.id = ordinal as i32;
            ok(sys::cuMemPoolCreate(&mut pool, &properties))?;
            let threshold = Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            ok(sys::cuMemPoolSetAttribute(pool, threshold, ptr::from_mut(&mut keep).cast()))?;
        }
        Ok(CachingAllocator { pool, lists: Mutex::default(), staging: Mutex::default() })
    }

    fn lists(&self) -> MutexGuard<'_, FreeLists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The staging buffer.
    pub fn staging(&self) -> MutexGuard<'_, Staging> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One of the pool's 64-bit attributes, in bytes.
    pub fn attribute(&self, which: Attribute) -> Result<u64> {
        let mut number = 0u64;
        // SAFETY: the pool lives as long as `self`; the attributes that this program reads are 64-bit numbers.
        ok(unsafe { sys::cuMemPoolGetAttribute(self.pool, which, ptr::from_mut(&mut number).cast()) })?;
        Ok(number)
    }

    /// A block of so many bytes (more than 0) with unspecified contents, from a free list where launches are deferred. `upload`:
    /// the host writes it at once. `None` if the GPU has not enough memory.
    ///
    /// # Safety
    ///
    /// The GPU's context must be current, and `stream` one of its streams.
    pub unsafe fn allocate(&self, stream: CUstream, bytes: usize, upload: bool) -> Result<Option<Block>> {
        let origin = {
            let mut lists = self.lists();
            let origin = match (lists.deferring, upload) {
                (false, _) => Origin::Driver,
                (true, false) => Origin::FreeList,
                (true, true) => Origin::UploadFreeList,
            };
            if let Some(address) = lists.free.get_mut(&(origin, bytes)).and_then(BTreeSet::pop_first) {
                return Ok(Some(Block { address, bytes, origin }));
            }
            origin
        };
        // SAFETY: the caller keeps the contract of this function, which is that of `allocate_from_pool`.
        let address = unsafe { self.allocate_from_pool(stream, bytes) }?;
        Ok(address.map(|address| Block { address, bytes, origin }))
    }

    /// Makes the pool reserve so many bytes in one piece; false if the GPU has not enough memory.
    ///
    /// # Safety
    ///
    /// The GPU's context must be current, and `stream` one of its streams.
    pub unsafe fn reserve(&self, stream: CUstream, bytes: usize) -> Result<bool> {
        // SAFETY: the caller keeps the contract; nothing has seen the address that is freed.
        unsafe {
            match self.allocate_from_pool(stream, bytes)? {
                Some(address) => self.free_to_pool(stream, address).map(|()| true),
                None => Ok(false),
            }
        }
    }

    /// Frees a block.
    ///
    /// # Safety
    ///
    /// The GPU's context must be current. The block must come from [`CachingAllocator::allocate`] on the same `stream` and not
    /// have been freed; whatever uses it has been enqueued on that stream, or deferred for it.
    pub unsafe fn free(&self, stream: CUstream, block: Block) -> Result<()> {
        let mut lists = self.lists();
        match block.origin {
            Origin::FreeList => lists.put(block),
            Origin::UploadFreeList if !lists.deferring => lists.put(block),
            // SAFETY: nothing is deferred, so all that uses the block is on the stream.
            Origin::Driver if !lists.deferring => return unsafe { self.free_to_pool(stream, block.address) },
            Origin::Driver | Origin::UploadFreeList => lists.in_use.push(block),
        }
        Ok(())
    }

    /// Says whether launches are deferred from now on.
    pub fn set_deferring(&self, deferring: bool) {
        self.lists().deferring = deferring;
    }

    /// Frees the blocks that deferred launches used.
    ///
    /// # Safety
    ///
    /// The GPU's context must be current, and all launches that were deferred must have been submitted to `stream`.
    pub unsafe fn release_deferred(&self, stream: CUstream) -> Result<()> {
        let mut lists = self.lists();
        for block in take(&mut lists.in_use) {
            match block.origin {
                // SAFETY: the block was freed, and all that uses it is on the stream.
                Origin::Driver => unsafe { self.free_to_pool(stream, block.address) }?,
                _ => lists.put(block),
            }
        }
        Ok(())
    }

    /// Returns all free lists to the driver's pool.
    ///
    /// # Safety
    ///
    /// The GPU's context must be current, and all launches that were deferred must have been submitted to `stream`.
    pub unsafe fn trim(&self, stream: CUstream) -> Result<()> {
        let free = take(&mut self.lists().free);
        // SAFETY: free lists hold blocks that nobody owns, and all that used them is on the stream.
        free.into_values().flatten().try_for_each(|address| unsafe { self.free_to_pool(stream, address) })
    }

    unsafe fn allocate_from_pool(&self, stream: CUstream, bytes: usize) -> Result<Option<u64>> {
        let mut address = 0;
        // SAFETY: the pointer is to a variable of the type that the driver writes; context and stream are the caller's promise.
        match unsafe { sys::cuMemAllocFromPoolAsync(&mut address, bytes, self.pool, stream) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Ok(None),
            result => ok(result).map(|()| Some(address)),
        }
    }

    unsafe fn free_to_pool(&self, stream: CUstream, address: u64) -> Result<()> {
        // SAFETY: the caller promises that nobody owns the block, and that all that uses it is on the stream.
        ok(unsafe { sys::cuMemFreeAsync(address, stream) })
    }

    /// Copies `bytes` into the staging buffer, if they fit.
    ///
    /// # Safety
    ///
    /// The GPU's context must be current. [`Staging::idle`] must only ever be called when no copy from the buffer is pending.
    pub unsafe fn stage(&self, bytes: &[u8]) -> Result<Staged<'_>> {
        if bytes.len() > LARGEST_STAGED {
            return Ok(Staged::TooLarge);
        }
        let needed = bytes.len().next_multiple_of(16);
        let mut staging = self.staging();
        if staging.used + needed > STAGING_BYTES {
            return Ok(Staged::Full);
        }
        if staging.address == 0 {
            let mut address = ptr::null_mut();
            // SAFETY: the pointer is to a variable of the type that the driver writes.
            ok(unsafe { sys::cuMemHostAlloc(&mut address, STAGING_BYTES, 0) })?;
            staging.address = address as usize;
        }
        let target = (staging.address + staging.used) as *mut u8;
        staging.used += needed;
        // SAFETY: the buffer has capacity for them there, and nothing else uses this part until the stream has been waited for.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
        Ok(Staged::Pinned { copy: target.cast_const(), _guard: staging })
    }

    /// Returns everything to the driver.
    ///
    /// # Safety
    ///
    /// The GPU's context must be current. Nothing may use the allocator or its memory afterwards, and `stream` must be idle.
    pub unsafe fn destroy(&self, stream: CUstream) {
        // Where the GPU has failed, its memory is lost with it: errors change nothing.
        // SAFETY: the caller promises that nothing uses the memory any more.
        unsafe {
            let staging = self.staging().address;
            if staging != 0 {
                sys::cuMemFreeHost(staging as *mut c_void);
            }
            let _ = self.trim(stream);
            sys::cuMemPoolDestroy(self.pool);
        }
    }
}
