//! One memory-mapped safetensors file, or any other. The crate's only mmap.

use super::{
    dtype,
    header::{Header, TensorInfo},
};
use crate::{
    error::{Error, Result},
    inputs::{self, Watched},
};
use memmap2::Mmap;
use safetensors::Dtype;
use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A mapped file whose header has been checked.
pub struct TensorFile {
    path: PathBuf,
    header: Header,
    map: Map,
    file: Arc<File>,
}

/// A mapped file of any format.
pub struct MappedFile {
    path: PathBuf,
    map: Map,
}

impl MappedFile {
    /// Maps `path`.
    pub fn open(path: &Path) -> Result<MappedFile> {
        Ok(MappedFile { path: path.to_owned(), map: Map::new(Arc::new(inputs::open(path)?), path)? })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its content.
    pub fn bytes(&self) -> &[u8] {
        &self.map.bytes
    }
}

/// A read-only mapping of a file that is watched as long as it lives.
struct Map {
    bytes: Mmap,
    _watched: Watched,
}

impl Map {
    fn new(file: Arc<File>, path: &Path) -> Result<Map> {
        // Before the mapping: what changes from here on is noticed.
        let watched = Watched::new(file.clone(), path)?;
        // SAFETY: the map is read-only and private to its owner. Our own writers never write in place (see `staged`). A
        // file that others cut short raises SIGBUS, which ends the process (`interrupt`); one that they rewrite changes
        // the bytes under us: these are numbers of any value and checked offsets, read through no reference to a type
        // with invalid values, and the result is withheld (`inputs::check_unchanged`).
        let bytes = unsafe { Mmap::map(&*file) }.map_err(|e| Error::io("map", path, e))?;
        watched.mapped(&bytes);
        Ok(Map { bytes, _watched: watched })
    }
}

impl TensorFile {
    /// Maps `path` and checks its header.
    pub fn open(path: &Path) -> Result<TensorFile> {
        if path.is_dir() {
            return Err(Error::request(format!("'{}' is a folder, expected a safetensors file", path.display())));
        }
        Self::from_file(inputs::open(path)?, path)
    }

    /// Maps an open file and checks its header; errors call it `path`.
    pub fn from_file(file: File, path: &Path) -> Result<TensorFile> {
        let file = Arc::new(file);
        let map = Map::new(file.clone(), path)?;
        let header = Header::parse(path, &map.bytes)?;
        Ok(TensorFile { path: path.to_owned(), header, map, file })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, for copies inside the kernel.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// `__metadata__` of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Bytes of the file.
    pub fn len(&self) -> u64 {
        self.map.bytes.len() as u64
    }

    /// Whether the file holds no tensors.
    pub fn is_empty(&self) -> bool {
        self.header.tensors.is_empty()
    }

    /// Tensors in the order of their bytes.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.header.tensors.iter().map(|info| Tensor { file: self, info })
    }

    /// The tensor called `name`, searched for from the first; use [`super::Checkpoint`] for many.
    pub fn tensor_named(&self, name: &str) -> Result<Tensor<'_>> {
        self.tensors()
            .find(|t| t.name() == name)
            .ok_or_else(|| Error::request(format!("'{}' has no tensor '{name}'", self.path.display())))
    }

    /// The `index`-th tensor in the order of the bytes.
    pub fn tensor(&self, index: usize) -> Tensor<'_> {
        Tensor { file: self, info: &self.header.tensors[index] }
    }
}

/// A view of one stored tensor: nothing is read until its data are.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    file: &'a TensorFile,
    info: &'a TensorInfo,
}

impl<'a> Tensor<'a> {
    /// Name as stored.
    pub fn name(&self) -> &'a str {
        &self.info.name
    }

    /// Element type as stored.
    pub fn dtype(&self) -> Dtype {
        self.info.dtype
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &'a [usize] {
        &self.info.shape
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.info.shape.iter().product()
    }

    /// The file it is stored in.
    pub fn file(&self) -> &'a TensorFile {
        self.file
    }

    /// First byte, counted from the start of the file.
    pub fn offset(&self) -> u64 {
        self.info.begin
    }

    /// Stored bytes, little endian, row-major.
    pub fn bytes(&self) -> &'a [u8] {
        &self.file.map.bytes[self.info.begin as usize..self.info.end as usize]
    }

    /// `(rows, columns)`, or an error that names the tensor.
    pub fn matrix_shape(&self) -> Result<(usize, usize)> {
        match *self.shape() {
            [rows, columns] => Ok((rows, columns)),
            ref shape => Err(Error::request(format!(
                "tensor '{}' in '{}' has shape {shape:?}, expected a matrix",
                self.name(),
                self.file.path.display()
            ))),
        }
    }

    /// All values as f32: borrowed when stored as aligned F32, converted (F64 rounded to nearest) otherwise.
    pub fn to_f32(&self) -> Result<Cow<'a, [f32]>> {
        if self.dtype() == Dtype::F32
            && let Ok(values) = bytemuck::try_cast_slice(self.bytes())
        {
            return Ok(Cow::Borrowed(values));
        }
        let mut values = vec![0f32; self.elements()];
        self.read_f32(0, &mut values)?;
        Ok(Cow::Owned(values))
    }

    /// Values `first .. first + out.len()` of the flat tensor as f32.
    pub fn read_f32(&self, first: usize, out: &mut [f32]) -> Result<()> {
        dtype::decode_f32(self.dtype(), self.byte_range(first, out.len()), out).map_err(|e| self.locate(e))
    }

    /// Values `first .. first + out.len()` of the flat tensor as f64, exactly.
    pub fn read_f64(&self, first: usize, out: &mut [f64]) -> Result<()> {
        dtype::decode_f64(self.dtype(), self.byte_range(first, out.len()), out).map_err(|e| self.locate(e))
    }

    fn byte_range(&self, first: usize, count: usize) -> &'a [u8] {
        // Every opened tensor has a whole number of bytes per element (`Header::parse`).
        let size = self.dtype().bitsize() / 8;
        &self.bytes()[first * size..(first + count) * size]
    }

    fn locate(&self, error: Error) -> Error {
        let message = format!("tensor '{}' in '{}': {}", self.name(), self.file.path.display(), error.message);
        Error { message, ..error }
    }
}
