//! Devices that are an NVIDIA GPU, profiled or not.

use crate::ops::{Cuda, Device, Profiled};

pub(super) trait OnGpu: Device<Buffer = <Cuda as Device>::Buffer> {
    fn gpu(&self) -> &Cuda;
}

impl OnGpu for Cuda {
    fn gpu(&self) -> &Cuda {
        self
    }
}

impl OnGpu for Profiled<Cuda> {
    fn gpu(&self) -> &Cuda {
        self.inner()
    }
}
