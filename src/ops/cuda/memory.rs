//! Buffers on the GPU, from its [`CachingAllocator`](super::caching_allocator): allocated, filled, read and written.

use super::{
    caching_allocator::{Block, Origin, Staged},
    driver::Gpu,
};
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUmemPool_attribute as Attribute};
use std::{ffi::c_void, sync::Arc};

impl Gpu {
    /// Bytes that are free, those that the pool has in reserve included, and bytes in all.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are to variables of the type that the driver writes.
        self.check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        let reserved = self.pool_attribute(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = self.pool_attribute(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok((free as u64 + reserved.saturating_sub(used), total as u64))
    }

    /// The most bytes that were in use at a time.
    pub fn peak_memory(&self) -> Result<u64> {
        self.enter()?;
        self.pool_attribute(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    fn pool_attribute(&self, which: Attribute) -> Result<u64> {
        self.allocator().attribute(which).or_else(|error| self.check("cuMemPoolGetAttribute", error).map(|()| 0))
    }

    /// Makes the pool reserve so many bytes in one piece; false if the GPU has not enough memory.
    pub fn reserve(&self, bytes: u64) -> Result<bool> {
        self.enter()?;
        // SAFETY: the context is current, and the stream its own.
        let reserved = unsafe { self.allocator().reserve(self.stream(), bytes as usize) };
        reserved.or_else(|error| self.check("cuMemAllocFromPoolAsync", error).map(|()| false))
    }

    /// Frees the blocks that deferred launches used.
    ///
    /// # Safety
    ///
    /// All launches that were deferred must have been submitted to the stream.
    pub unsafe fn release_deferred(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the context is current, the stream its own; the rest is the caller's promise.
        let released = unsafe { self.allocator().release_deferred(self.stream()) };
        released.or_else(|error| self.check("cuMemFreeAsync", error))
    }

    /// Returns all free lists to the driver's pool.
    ///
    /// # Safety
    ///
    /// All launches that were deferred must have been submitted to the stream.
    pub unsafe fn trim(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the context is current, the stream its own; the rest is the caller's promise.
        unsafe { self.allocator().trim(self.stream()) }.or_else(|error| self.check("cuMemFreeAsync", error))
    }

    /// Sets each of `words` 32-bit words to `value`, on the stream.
    ///
    /// # Safety
    ///
    /// `words` 32-bit words at `address` must be allocated until the stream has come to this.
    pub unsafe fn fill(&self, address: u64, value: u32, words: usize) -> Result<()> {
        if words == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the memory is the caller's promise; the stream lives as long as `self`.
        self.check("cuMemsetD32", unsafe { sys::cuMemsetD32Async(address, value, words, self.stream()) })
    }

    /// Copies `bytes` bytes from one device address to another, on the stream.
    ///
    /// # Safety
    ///
    /// So many bytes must be allocated at both addresses until the stream has come to this, and may not overlap.
    pub unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the memory is the caller's promise; the stream lives as long as `self`.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream()) };
        self.check("copying on the GPU", result)
    }

    /// Stages an upload in pinned memory, after a wait if that is full.
    fn stage(&self, bytes: &[u8]) -> Result<Staged<'_>> {
        let stage = || {
            // SAFETY: the context is current (`Memory::write`); only `synchronize` declares the buffer idle, after its wait.
            let staged = unsafe { self.allocator().stage(bytes) };
            staged.or_else(|error| self.check("cuMemHostAlloc", error).map(|()| Staged::TooLarge))
        };
        match stage()? {
            Staged::Full => {
                self.synchronize()?;
                // Full again where other threads were faster: the driver copies it, then.
                stage()
            }
            staged => Ok(staged),
        }
    }
}

/// A block of device memory, freed when dropped.
pub struct Memory {
    gpu: Arc<Gpu>,
    block: Block,
}

impl Memory {
    /// A block of so many bytes with unspecified contents; no block for 0 bytes. Fails if the GPU has not enough memory.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Memory> {
        match Memory::find(gpu, bytes, false)? {
            Some(memory) => Ok(memory),
            None => Err(out_of_memory(gpu, bytes)?),
        }
    }

    /// As [`Memory::new`], but `None` if the GPU has not enough memory. `upload`: the host writes it at once.
    pub fn find(gpu: &Arc<Gpu>, bytes: usize, upload: bool) -> Result<Option<Memory>> {
        if bytes == 0 {
            return Ok(Some(Memory::none(gpu)));
        }
        gpu.enter()?;
        // SAFETY: the context is current, and the stream its own.
        let block = unsafe { gpu.allocator().allocate(gpu.stream(), bytes, upload) };
        let block = block.or_else(|error| gpu.check("cuMemAllocFromPoolAsync", error).map(|()| None))?;
        Ok(block.map(|block| Memory { gpu: gpu.clone(), block }))
    }

    /// No memory: 0 bytes at address 0, of which no operation may read or write any.
    pub fn none(gpu: &Arc<Gpu>) -> Memory {
        Memory { gpu: gpu.clone(), block: Block { address: 0, bytes: 0, origin: Origin::Driver } }
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.block.bytes
    }

    /// The device address of its first byte.
    pub fn address(&self) -> u64 {
        self.block.address
    }

    /// Sets every 32-bit word to `value`.
    pub fn fill(&mut self, value: u32) -> Result<()> {
        // SAFETY: so many words are allocated; freeing them is ordered after this on the stream.
        unsafe { self.gpu.fill(self.address(), value, self.bytes() / 4) }
    }

    /// Replaces its beginning. `values` have been read when this returns; small uploads are asynchronous.
    pub fn write<T: bytemuck::Pod>(&mut self, values: &[T]) -> Result<()> {
        let bytes = size_of_val(values);
        assert!(bytes <= self.bytes(), "cuda: {bytes} bytes written to a buffer of {}", self.bytes());
        if bytes == 0 {
            return Ok(());
        }
        self.gpu.enter()?;
        let staged = self.gpu.stage(bytemuck::cast_slice(values))?;
        let source = match &staged {
            Staged::Pinned { copy, .. } => copy.cast::<c_void>(),
            Staged::TooLarge | Staged::Full => values.as_ptr().cast(),
        };
        // SAFETY: both sides have this size. Pinned memory is not reused until the stream has been waited for; of
        // any other, the driver has taken a copy when the call returns.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(self.address(), source, bytes, self.gpu.stream()) };
        self.gpu.check("copying to the GPU", result)
    }

    /// Its first `values.len()` elements, once everything enqueued before is done.
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
            if self.gpu.enter().is_ok() {
                // SAFETY: the block came from `allocate` on this stream, and only its owner frees it; operations that use it are on
                // the stream or deferred, since they borrowed it.
                let _ = unsafe { self.gpu.allocator().free(self.gpu.stream(), self.block) };
            }
        }
    }
}

fn out_of_memory(gpu: &Gpu, bytes: usize) -> Result<Error> {
    let (free, total) = gpu.memory()?;
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    Ok(Error::environment(format!(
        "device '{}' ({}) is out of memory: {} were requested, {} of {} are free",
        gpu.name,
        gpu.model,
        mib(bytes as u64),
        mib(free),
        mib(total)
    ))
    .help("lower train.batch_size or data.max_length, set train.activation_checkpointing = true, or end other programs on the GPU; train --plan tells what a run needs"))
}
