//! `adapter_model.bin` of older PEFT versions: a pickled state dict. It is read as data, nothing in it is executed.

use crate::{
    checkpoint::{Dtype, TensorFile, TensorSpec, Writer},
    error::{Error, Result},
};
use candle_core::{DType, Tensor, pickle};
use rustix::fs::{MemfdFlags, memfd_create};
use std::{collections::BTreeMap, fs::File, os::fd::AsRawFd, path::Path};

/// The name older versions of PEFT gave the tensors.
pub const BIN_NAME: &str = "adapter_model.bin";

/// Rewrites the tensors of `path` as safetensors, in memory, and opens these under the name of `path`.
pub(super) fn open(path: &Path) -> Result<TensorFile> {
    let bad = |what: String| {
        Error::request(format!("'{}' cannot be read as a PyTorch file: {what}", path.display()))
            .help("save the adapter again with PEFT's save_pretrained, as safetensors")
    };
    let tensors = pickle::read_all(path).map_err(|e| bad(e.to_string()))?;
    let mut specs = Vec::with_capacity(tensors.len());
    for (name, tensor) in &tensors {
        let dtype = match tensor.dtype() {
            DType::F64 => Dtype::F64,
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            other => return Err(bad(format!("tensor '{name}' holds {}, expected floating point", other.as_str()))),
        };
        specs.push(TensorSpec { name: name.clone(), dtype, shape: tensor.dims().to_vec() });
    }
    let memory = memfd_create("adapter", MemfdFlags::CLOEXEC).map_err(|e| Error::io("copy", path, e.into()))?;
    let place = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let writer = Writer::create_file(Path::new(&place), &specs, &BTreeMap::new())?;
    for (name, tensor) in &tensors {
        writer.write(name, 0, &bytes(tensor).map_err(|e| bad(format!("tensor '{name}': {e}")))?)?;
    }
    writer.finish()?;
    TensorFile::from_file(File::from(memory), path)
}

fn bytes(tensor: &Tensor) -> candle_core::Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F64 => bytemuck::cast_slice(&flat.to_vec1::<f64>()?).to_vec(),
        DType::F16 => bytemuck::cast_slice(&flat.to_vec1::<half::f16>()?).to_vec(),
        DType::BF16 => bytemuck::cast_slice(&flat.to_vec1::<half::bf16>()?).to_vec(),
        _ => bytemuck::cast_slice(&flat.to_vec1::<f32>()?).to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Adapter;
    use std::path::PathBuf;

    #[test]
    fn a_pickled_adapter_is_the_one_in_safetensors() {
        let fixture = |name: &str| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
        let pickled = Adapter::open(&fixture("tiny_adapter_bin")).unwrap();
        let plain = Adapter::open(&fixture("tiny_adapter")).unwrap();
        assert_eq!(pickled.file().tensors().len(), plain.file().tensors().len());
        for tensor in plain.file().tensors() {
            let other = pickled.file().tensor_named(tensor.name()).unwrap();
            assert_eq!((other.dtype(), other.shape()), (tensor.dtype(), tensor.shape()));
            assert_eq!(other.bytes(), tensor.bytes(), "{}", tensor.name());
        }
    }

    #[test]
    fn a_file_that_is_no_pickle_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(BIN_NAME);
        std::fs::write(&path, "no pickle").unwrap();
        let error = open(&path).err().unwrap();
        assert!(error.message.contains("adapter_model.bin' cannot be read"), "{}", error.message);
    }
}
