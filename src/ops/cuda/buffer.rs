//! What lies on a GPU: elements, token ids, the numbers of an update.

use super::{Arg, memory::Memory};
use crate::ops::Element;

/// Elements on a GPU; the memory may have room for more.
pub struct CudaBuffer {
    pub(super) memory: Memory,
    pub(super) element: Element,
    pub(super) len: usize,
}

/// Token ids on a GPU, and on the host: the scatter-add wants them sorted.
pub struct CudaTokens {
    pub(super) memory: Memory,
    pub(super) host: Vec<u32>,
}

/// Four f64: loss, sum of squares, factor, signals.
pub struct CudaStepStats(pub(super) Memory);

/// Bytes of an element.
pub(super) fn width(element: Element) -> usize {
    match element {
        Element::F32 => 4,
        Element::Bf16 => 2,
    }
}

impl CudaBuffer {
    /// Of element `offset`, as the GPU counts.
    pub(super) fn address(&self, offset: usize) -> u64 {
        self.memory.address() + (width(self.element) * offset) as u64
    }

    /// From element `offset` on.
    pub(super) fn at(&self, offset: usize) -> Arg {
        self.address(offset).into()
    }
}

impl CudaStepStats {
    /// From this number on.
    pub(super) fn at(&self, index: u64) -> Arg {
        (self.0.address() + 8 * index).into()
    }
}

impl From<&CudaBuffer> for Arg {
    fn from(x: &CudaBuffer) -> Arg {
        x.at(0)
    }
}

impl From<&&mut CudaBuffer> for Arg {
    fn from(x: &&mut CudaBuffer) -> Arg {
        x.at(0)
    }
}
