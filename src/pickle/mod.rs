//! State dicts that `torch.save` pickled, read as data: where each tensor's bytes lie. Nothing in a file is executed, and
//! what is neither a tensor nor one of the containers around it is refused by name.
//!
//! Two layouts: a zip with `data.pkl` and one entry per storage (PyTorch 1.6 and later), and the one before, a sequence of
//! pickles followed by the storages.

mod layout;
mod machine;
mod state_dict;

use crate::{
    checkpoint::{Dtype, dtype},
    error::{Error, Result},
};
use machine::{StorageRef, TensorRef};
use std::{
    collections::HashSet,
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// A pickled tensor: a strided view of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PickledTensor {
    /// Key in the state dict.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Elements from one index to the next, per extent.
    strides: Vec<usize>,
    /// The first element's first byte, counted from the start of the file. Equal views of one storage are equal here.
    begin: u64,
}

impl PickledTensor {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the elements lie one after the other in row-major order.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(&extent, &stride)| {
            let fits = extent <= 1 || stride == expected;
            expected = usize::saturating_mul(expected, extent.max(1));
            fits
        })
    }

    /// Whether `other`, of the same file, is another name for the same elements.
    pub fn is_same_view(&self, other: &PickledTensor) -> bool {
        self.elements() > 0
            && (self.begin, self.dtype, &self.shape, &self.strides)
                == (other.begin, other.dtype, &other.shape, &other.strides)
    }

    /// Position of the last element, counted from the first.
    fn last(&self) -> Option<usize> {
        let steps = self.shape.iter().zip(&self.strides).map(|(&n, &stride)| (n - 1).checked_mul(stride));
        steps.into_iter().try_fold(0usize, |sum, step| sum.checked_add(step?))
    }

    fn size(&self) -> usize {
        self.dtype.bitsize() / 8
    }
}

/// An opened file whose tensors all lie inside it.
pub struct PickledFile {
    path: PathBuf,
    file: File,
    len: u64,
    tensors: Vec<PickledTensor>,
    beside: Vec<String>,
}

impl PickledFile {
    /// Reads the structure of a file and checks it; no tensor is read.
    pub fn open(path: &Path) -> Result<PickledFile> {
        let file = crate::inputs::open(path)?;
        let found = layout::read(&file, path).map_err(|what| bad(path, what))?;
        let len = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
        let mut names = HashSet::new();
        let mut tensors = Vec::with_capacity(found.tensors.len());
        for (name, tensor) in found.tensors {
            if !names.insert(name.clone()) {
                return Err(bad(path, format!("it holds two tensors called '{name}'")));
            }
            let tensor = place(&name, tensor, &found.storages, &found.places);
            tensors.push(tensor.map_err(|what| bad(path, format!("tensor '{name}' {what}")))?);
        }
        Ok(PickledFile { path: path.to_owned(), file, len, tensors, beside: found.beside })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.len
    }

    /// In the order of the state dict.
    pub fn tensors(&self) -> &[PickledTensor] {
        &self.tensors
    }

    /// Names of what stands beside the state dict: an optimiser's state, a number of updates.
    pub fn beside(&self) -> &[String] {
        &self.beside
    }

    /// Elements of a tensor, row-major, in their own type. Of a tensor that is not contiguous the whole is read.
    pub fn read(&self, tensor: &PickledTensor, elements: Range<usize>) -> Result<Vec<u8>> {
        let size = tensor.size();
        if elements.is_empty() {
            return Ok(Vec::new());
        }
        if tensor.is_contiguous() {
            return self.bytes(tensor.begin + (elements.start * size) as u64, elements.len() * size);
        }
        let span = tensor.last().map_or(0, |last| (last + 1) * size);
        let span = self.bytes(tensor.begin, span)?;
        let mut out = Vec::with_capacity(elements.len() * size);
        let (mut index, mut at) = (vec![0; tensor.shape.len()], 0);
        for i in 0..elements.end {
            if i >= elements.start {
                out.extend_from_slice(&span[at * size..(at + 1) * size]);
            }
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                at += tensor.strides[axis];
                if index[axis] < tensor.shape[axis] {
                    break;
                }
                at -= index[axis] * tensor.strides[axis];
                index[axis] = 0;
            }
        }
        Ok(out)
    }

    fn bytes(&self, begin: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, begin).map_err(|e| Error::io("read", &self.path, e))?;
        Ok(bytes)
    }
}

fn bad(path: &Path, what: String) -> Error {
    Error::request(format!("'{}' cannot be read as a PyTorch file: {what}", path.display())).help(
        "save the state dict again: as safetensors with save_pretrained, or with torch.save(model.state_dict(), ...)",
    )
}

/// Finds the bytes of a tensor and checks that all of them are there.
fn place(
    name: &str,
    tensor: TensorRef,
    storages: &[StorageRef],
    places: &[(u64, u64)],
) -> std::result::Result<PickledTensor, String> {
    let (storage, &(begin, bytes)) = (&storages[tensor.storage], &places[tensor.storage]);
    let (dtype, size) =
        storage_dtype(&storage.class).ok_or_else(|| format!("lies in a {}, which is not supported", storage.class))?;
    if storage.elements.checked_mul(size).is_none_or(|needed| needed > bytes) {
        return Err(format!("needs a storage of {} elements, the file holds {bytes} bytes of it", storage.elements));
    }
    if tensor.shape.len() != tensor.strides.len() {
        return Err(format!("has shape {:?} but strides {:?}", tensor.shape, tensor.strides));
    }
    let count = tensor.shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
    let placed = PickledTensor {
        name: name.to_owned(),
        dtype,
        strides: tensor.strides,
        begin: begin + tensor.offset.checked_mul(size).filter(|&at| at <= bytes).unwrap_or(bytes),
        shape: tensor.shape,
    };
    let inside = match count {
        Some(0) => true,
        // More elements than the storage has: a view that repeats some.
        Some(n) if n as u64 <= storage.elements => {
            let end = placed.last().and_then(|last| tensor.offset.checked_add(last as u64));
            end.is_some_and(|end| end < storage.elements)
        }
        _ => false,
    };
    if !inside {
        return Err(format!("with shape {:?} does not fit its storage of {} elements", placed.shape, storage.elements));
    }
    Ok(placed)
}

/// `torch.FloatStorage` -> F32 and its size.
fn storage_dtype(class: &str) -> Option<(Dtype, u64)> {
    let dtype = match class {
        "torch.DoubleStorage" => Dtype::F64,
        "torch.FloatStorage" => Dtype::F32,
        "torch.HalfStorage" => Dtype::F16,
        "torch.BFloat16Storage" => Dtype::BF16,
        "torch.LongStorage" => Dtype::I64,
        "torch.IntStorage" => Dtype::I32,
        "torch.ShortStorage" => Dtype::I16,
        "torch.CharStorage" => Dtype::I8,
        "torch.ByteStorage" => Dtype::U8,
        "torch.BoolStorage" => Dtype::BOOL,
        _ => return None,
    };
    Some((dtype, dtype::size_of(dtype)? as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use proptest::prelude::*;
    use std::{fs, io::Write};

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/pickles").join(name)
    }

    #[track_caller]
    fn refused(bytes: &[u8], expected: &str) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let message = PickledFile::open(file.path()).err().unwrap().message;
        assert!(message.contains(expected), "{message}");
    }

    #[test]
    fn both_layouts_hold_the_tensors_that_pytorch_sees() {
        let expected = Checkpoint::open(&fixture("odd.safetensors")).unwrap();
        for name in ["odd.bin", "odd_legacy.bin"] {
            let file = PickledFile::open(&fixture(name)).unwrap();
            assert_eq!(file.tensors().len(), expected.len(), "{name}");
            for t in file.tensors() {
                let e = expected.tensor(&t.name).unwrap();
                assert_eq!((t.dtype, &t.shape[..]), (e.dtype(), e.shape()), "{name}: {}", t.name);
                assert_eq!(file.read(t, 0..t.elements()).unwrap(), e.bytes(), "{name}: {}", t.name);
                let half = t.elements() / 2;
                assert_eq!(file.read(t, half..t.elements()).unwrap(), &e.bytes()[half * t.size()..], "{}", t.name);
            }
            let named = |name: &str| file.tensors().iter().find(|t| t.name == name).unwrap();
            assert!(named("plain.weight").is_same_view(named("tied.weight")));
            assert!(!named("plain.weight").is_same_view(named("transposed.weight")));
        }
    }

    #[test]
    fn what_is_no_state_dict_is_refused() {
        refused(b"no pickle", "neither a zip nor a pickle");
        refused(b"\x80\x02}q\0.", "");
        let legacy = fs::read(fixture("odd_legacy.bin")).unwrap();
        refused(&legacy[..1300], "");
        refused(&legacy[..legacy.len() - 20], "");
        let at = legacy.windows(11).position(|w| w == b"_utils\n_reb").unwrap();
        let mut other = legacy.clone();
        other[at + 7] = b'x';
        refused(&other, "'torch._utils.xrebuild_tensor_v2'");
    }

    proptest! {
        #[test]
        fn a_damaged_pickle_is_no_panic(legacy: bool, at in 0usize..1300, byte: u8) {
            let mut bytes = fs::read(fixture(if legacy { "odd_legacy.bin" } else { "odd.bin" })).unwrap();
            bytes[at] = byte;
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&bytes).unwrap();
            if let Ok(file) = PickledFile::open(file.path()) {
                for t in file.tensors() {
                    let _ = file.read(t, 0..t.elements());
                }
            }
        }
    }
}
