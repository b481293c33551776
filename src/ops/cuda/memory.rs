//! Memory on the GPU, from one pool that keeps what it has got: taking and giving back happen in the order of the stream, so
//! that nobody waits, and what one operation gives back the next one may have.

use super::{
    driver::Gpu,
    shelf::{Owner, Piece},
};
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUmemPool_attribute as Attribute, CUresult};
use std::{
    ffi::c_void,
    mem::zeroed,
    ptr,
    sync::{Arc, MutexGuard, PoisonError},
};

/// The driver's pool of one GPU.
pub struct Pool(sys::CUmemoryPool);

impl Pool {
    /// Of the GPU with this number, in the current context. Empty.
    pub fn create(ordinal: usize) -> std::result::Result<Pool, CUresult> {
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
        Ok(Pool(pool))
    }

    /// Gives everything back to the driver. Nothing uses it any more.
    pub fn destroy(&self) {
        // SAFETY: the caller's promise.
        unsafe { sys::cuMemPoolDestroy(self.0) };
    }
}

fn ok(result: CUresult) -> std::result::Result<(), CUresult> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(result) }
}

impl Gpu {
    /// Bytes that are free, those that the pool has in reserve included, and bytes in all.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are to variables of the type that the driver writes.
        self.check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        let reserved = self.pool_number(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = self.pool_number(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok((free as u64 + reserved.saturating_sub(used), total as u64))
    }

    /// The most bytes that were in use at a time.
    pub fn peak_memory(&self) -> Result<u64> {
        self.enter()?;
        self.pool_number(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    fn pool_number(&self, which: Attribute) -> Result<u64> {
        let mut number = 0u64;
        // SAFETY: these attributes are 64-bit numbers.
        let result = unsafe { sys::cuMemPoolGetAttribute(self.pool().0, which, ptr::from_mut(&mut number).cast()) };
        self.check("cuMemPoolGetAttribute", result)?;
        Ok(number)
    }

    /// Lets the pool have so many bytes, in one piece. Whether it got them.
    pub fn reserve(&self, bytes: u64) -> Result<bool> {
        match self.allocate(bytes as usize)? {
            Some(address) => self.free(address).map(|()| true),
            None => Ok(false),
        }
    }

    /// `None`: there is not enough.
    fn allocate(&self, bytes: usize) -> Result<Option<u64>> {
        self.enter()?;
        let mut address = 0;
        // SAFETY: the pointer is to a variable of the type that the driver writes.
        let result = unsafe { sys::cuMemAllocFromPoolAsync(&mut address, bytes, self.pool().0, self.stream()) };
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Ok(None);
        }
        self.check("cuMemAllocFromPoolAsync", result)?;
        Ok(Some(address))
    }

    /// Every one of so many times 4 bytes to `value`.
    pub fn fill(&self, address: u64, value: u32, words: usize) -> Result<()> {
        if words == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the caller has this much memory there.
        self.check("cuMemsetD32", unsafe { sys::cuMemsetD32Async(address, value, words, self.stream()) })
    }

    /// Copies bytes from one place on the GPU to another; both have room for them.
    pub fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the caller's promise.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream()) };
        self.check("copying on the GPU", result)
    }

    pub(super) fn free(&self, address: u64) -> Result<()> {
        self.enter()?;
        // SAFETY: whoever held it is gone, and all that uses it was asked of the same stream before.
        self.check("cuMemFreeAsync", unsafe { sys::cuMemFreeAsync(address, self.stream()) })
    }
}

/// Some bytes of the pool, given back when dropped.
pub struct Memory {
    gpu: Arc<Gpu>,
    piece: Piece,
}

impl Memory {
    /// Memory with anything in it; none at all for 0 bytes.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Memory> {
        match Memory::find(gpu, bytes, false)? {
            Some(memory) => Ok(memory),
            None => Err(out_of_memory(gpu, bytes)?),
        }
    }

    /// As [`Memory::new`], from the shelf where that is in use; for an upload, or not. `None`: there is not enough.
    pub fn find(gpu: &Arc<Gpu>, bytes: usize, upload: bool) -> Result<Option<Memory>> {
        if bytes == 0 {
            return Ok(Some(Memory::none(gpu)));
        }
        let (owner, kept) = {
            let mut shelf = gpu.shelf();
            let owner = shelf.owner(upload);
            (owner, shelf.take(owner, bytes))
        };
        let piece = match kept {
            Some(piece) => Some(piece),
            None => gpu.allocate(bytes)?.map(|address| Piece { address, bytes, owner }),
        };
        Ok(piece.map(|piece| Memory { gpu: gpu.clone(), piece }))
    }

    /// Where nothing could be had. No operation may be given it.
    pub fn none(gpu: &Arc<Gpu>) -> Memory {
        Memory { gpu: gpu.clone(), piece: Piece { address: 0, bytes: 0, owner: Owner::Driver } }
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.piece.bytes
    }

    /// Of its first byte, as the GPU counts.
    pub fn address(&self) -> u64 {
        self.piece.address
    }

    /// Every 4 bytes to `value`.
    pub fn fill(&mut self, value: u32) -> Result<()> {
        self.gpu.fill(self.address(), value, self.bytes() / 4)
    }

    /// Replaces its beginning. `values` have been read when this returns; what is small travels while the host goes on.
    pub fn write<T: bytemuck::Pod>(&mut self, values: &[T]) -> Result<()> {
        let bytes = size_of_val(values);
        assert!(bytes <= self.bytes(), "cuda: {bytes} bytes written to a buffer of {}", self.bytes());
        if bytes == 0 {
            return Ok(());
        }
        self.gpu.enter()?;
        let stage = self.gpu.stage(bytemuck::cast_slice(values))?;
        let source = stage.as_ref().map_or(values.as_ptr().cast(), |(staged, _)| staged.cast::<c_void>());
        // SAFETY: both sides have this size. Page-locked memory is left alone until the stream has been waited for; of
        // any other, the driver has taken a copy when the call returns.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(self.address(), source, bytes, self.gpu.stream()) };
        self.gpu.check("copying to the GPU", result)
    }

    /// Its first `values.len()` elements, after all that was asked for before.
    pub fn read<T: bytemuck::Pod>(&self, values: &mut [T]) -> Result<()> {
        let bytes = size_of_val(values);
        assert!(bytes <= self.bytes(), "cuda: {bytes} bytes read from a buffer of {}", self.bytes());
        if bytes == 0 {
            return Ok(());
        }
        self.gpu.enter()?;
        let target = values.as_mut_ptr().cast::<c_void>();
        // SAFETY: both sides have this size, and `values` is there until the stream is done.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(target, self.address(), bytes, self.gpu.stream()) };
        self.gpu.check("copying from the GPU", result)?;
        self.gpu.synchronize()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.address() != 0 {
            // Where the GPU has failed, its memory is lost with it.
            let _ = self.gpu.give_back(self.piece);
        }
    }
}

fn out_of_memory(gpu: &Gpu, bytes: usize) -> Result<Error> {
    let (free, total) = gpu.memory()?;
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    Ok(Error::environment(format!(
        "device '{}' ({}) is out of memory: {} were asked for, {} of {} are free",
        gpu.name,
        gpu.model,
        mib(bytes as u64),
        mib(free),
        mib(total)
    ))
    .help("lower train.batch_size or data.max_length, set train.activation_checkpointing = true, or end other programs on the GPU; train --plan tells what a run needs"))
}

/// Page-locked memory of the host, from which the GPU fetches what is small while the host goes on.
#[derive(Default)]
pub struct Staging {
    address: usize,
    used: usize,
}

impl Staging {
    const BYTES: usize = 4 << 20;
    /// What is larger would fill it too soon, and is worth a wait.
    const LARGEST: usize = 1 << 20;

    /// The stream has been waited for: nothing is on its way any more.
    pub fn arrived(&mut self) {
        self.used = 0;
    }

    /// Nothing is on its way, and nothing will be staged again.
    pub fn free(&mut self) {
        if self.address != 0 {
            // SAFETY: it was allocated by `stage`.
            unsafe { sys::cuMemFreeHost(self.address as *mut c_void) };
        }
    }
}

impl Gpu {
    /// Copies `bytes` to page-locked memory; `None`, if they are too many for that. Nothing else is staged, and no wait
    /// declares it arrived, while the guard lives: until the copy has been asked for.
    fn stage(&self, bytes: &[u8]) -> Result<Option<(*const u8, MutexGuard<'_, Staging>)>> {
        if bytes.len() > Staging::LARGEST {
            return Ok(None);
        }
        let needed = bytes.len().next_multiple_of(16);
        let full = self.staging().used + needed > Staging::BYTES;
        if full {
            self.synchronize()?;
        }
        let mut staging = self.staging();
        if staging.address == 0 {
            let mut address = ptr::null_mut();
            // SAFETY: the pointer is to a variable of the type that the driver writes.
            self.check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&mut address, Staging::BYTES, 0) })?;
            staging.address = address as usize;
        }
        if staging.used + needed > Staging::BYTES {
            // Another thread was faster.
            return Ok(None);
        }
        let place = (staging.address + staging.used) as *mut u8;
        staging.used += needed;
        // SAFETY: the place has room for them, and nobody else uses it until the stream has been waited for.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) };
        Ok(Some((place.cast_const(), staging)))
    }

    /// The page-locked memory.
    pub fn staging(&self) -> MutexGuard<'_, Staging> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
