//! Reading the bytes of large tensors once, from front to back, at the speed of the memory.
//!
//! A mapping is fastest where the kernel keeps the file in huge pages: one page fault for 2 MiB. Where it keeps it in small
//! ones, the faults take longer than the reading, and copying into a buffer that stays in the second-level cache is
//! faster. Which it is may change within a file, so the faults are counted as the reading goes on.

use super::Tensor;
use crate::error::{Error, Result};
use std::{ops::Range, os::unix::fs::FileExt};

/// Bytes to ask for at once: larger than what one page fault maps of small pages, small enough for the cache.
pub const READ: usize = 1 << 18;

/// More faults than this during one [`READ`] mean small pages: huge ones take one for eight reads, but a thread may read
/// two files in turns.
const FEW: u64 = 2;

/// Reads that are copied before the mapping is tried again.
const COPIED: u32 = 31;

/// Reads for one thread.
#[derive(Default)]
pub struct Reader {
    buffer: Vec<u8>,
    /// Page faults of the thread when the last mapped read was handed out.
    mapped_at: Option<u64>,
    /// Reads that remain to be copied.
    copies: u32,
}

impl Reader {
    /// Bytes `range` of the tensor's data, good until the next call. Ranges should be about [`READ`] long.
    pub fn read<'a>(&'a mut self, tensor: &Tensor<'a>, range: Range<usize>) -> Result<&'a [u8]> {
        if self.mapped_at.take().is_some_and(|before| page_faults() - before > FEW) {
            self.copies = COPIED;
        }
        if self.copies == 0 {
            self.mapped_at = Some(page_faults());
            return Ok(&tensor.bytes()[range]);
        }
        self.copies -= 1;
        self.buffer.resize(range.len().max(self.buffer.len()), 0);
        let (file, out) = (tensor.file(), &mut self.buffer[..range.len()]);
        let read = file.file().read_exact_at(out, tensor.offset() + range.start as u64);
        read.map_err(|e| Error::io("read", file.path(), e))?;
        Ok(out)
    }
}

/// Page faults of this thread so far that no disk was read for; 0 where the system does not count them by thread.
fn page_faults() -> u64 {
    #[cfg(target_os = "linux")]
    {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: the call fills the structure it is given; all zeros are a valid one, too.
        let usage = unsafe {
            libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
            usage.assume_init()
        };
        usage.ru_minflt as u64
    }
    #[cfg(not(target_os = "linux"))]
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Checkpoint, Dtype, TensorSpec, Writer};
    use std::collections::BTreeMap;

    #[test]
    fn mapped_and_copied_reads_give_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let spec = TensorSpec { name: "w".into(), dtype: Dtype::U8, shape: vec![3 * READ + 5] };
        let data: Vec<u8> = (0..3 * READ + 5).map(|i| (i / 7 + i / 1000) as u8).collect();
        let writer = Writer::create(dir.path(), std::slice::from_ref(&spec), 1 << 30, &BTreeMap::new()).unwrap();
        writer.write("w", 0, &data).unwrap();
        writer.finish().unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let tensor = checkpoint.tensor("w").unwrap();
        for copies in [0, 2, 100] {
            let mut reader = Reader { copies, ..Reader::default() };
            for first in (0..data.len()).step_by(READ) {
                let range = first..data.len().min(first + READ);
                assert_eq!(reader.read(&tensor, range.clone()).unwrap(), &data[range], "{copies}");
            }
        }
    }

    #[test]
    fn faults_of_this_thread_are_counted() {
        let before = page_faults();
        let pages = vec![1u8; 1 << 20];
        std::hint::black_box(&pages);
        assert!(page_faults() > before);
    }
}
