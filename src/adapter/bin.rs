//! `adapter_model.bin` of older PEFT versions: a pickled state dict. It is read as data, nothing in it is executed.

use crate::{
    checkpoint::{TensorFile, TensorSpec, Writer, dtype},
    error::{Error, Result},
    pickle::PickledFile,
};
use rustix::fs::{MemfdFlags, memfd_create};
use std::{collections::BTreeMap, fs::File, os::fd::AsRawFd, path::Path};

/// The name older versions of PEFT gave the tensors.
pub const BIN_NAME: &str = "adapter_model.bin";

/// How many times as large as its file an adapter may become: tied modules share a tensor.
const MAX_SHARED: u64 = 4;

/// Rewrites the tensors of `path` as safetensors, in memory, and opens these under the name of `path`.
pub(super) fn open(path: &Path) -> Result<TensorFile> {
    let pickled = PickledFile::open(path)?;
    let mut specs = Vec::with_capacity(pickled.tensors().len());
    for t in pickled.tensors() {
        if !dtype::is_float(t.dtype) {
            return Err(Error::request(format!(
                "tensor '{}' in '{}' holds {:?}, expected floating point",
                t.name,
                path.display(),
                t.dtype
            )));
        }
        specs.push(TensorSpec { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() });
    }
    let (needed, stored) = (specs.iter().map(TensorSpec::bytes).sum::<u64>(), pickled.file_bytes());
    if needed > MAX_SHARED * stored {
        return Err(Error::request(format!(
            "the tensors of '{}' share their bytes: written out they take {needed} bytes, the file has {stored}",
            path.display()
        ))
        .help("no adapter does that: download or save it again"));
    }
    let memory = memfd_create("adapter", MemfdFlags::CLOEXEC).map_err(|e| Error::io("copy", path, e.into()))?;
    let place = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let writer = Writer::create_file(Path::new(&place), &specs, &BTreeMap::new())?;
    for t in pickled.tensors() {
        writer.write(&t.name, 0, &pickled.read(t, 0..t.elements())?)?;
    }
    writer.finish()?;
    TensorFile::from_file(File::from(memory), path)
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
