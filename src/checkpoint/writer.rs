//! Streaming writer: the whole layout is fixed first, then bytes arrive in any order, from any thread.

use super::{INDEX_NAME, Index, MODEL_NAME, Tensor, dtype};
use crate::error::{Error, Result};
use safetensors::Dtype;
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// The one key of a header that names no tensor.
const METADATA: &str = "__metadata__";

/// What a tensor will look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name as stored.
    pub name: String,
    /// Element type as stored.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// The same name, dtype and shape as a stored tensor.
    pub fn like(tensor: &Tensor) -> Self {
        TensorSpec { name: tensor.name().to_owned(), dtype: tensor.dtype(), shape: tensor.shape().to_vec() }
    }

    /// Bytes of its data.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * (self.dtype.bitsize() as u64) / 8
    }
}

/// A file of a model: its name and its tensors.
pub type FileSpecs<'a> = (String, Vec<&'a TensorSpec>);

/// Writes `model.safetensors`, or shards and their index, into a folder. It holds no tensor: bytes go straight to the
/// files. Put it inside a [`crate::staged::StagedDir`]; [`Writer::finish`] checks that every byte has arrived.
pub struct Writer {
    shards: Vec<Shard>,
    places: HashMap<String, Place>,
}

struct Shard {
    path: PathBuf,
    file: File,
}

struct Place {
    shard: usize,
    begin: u64,
    bytes: u64,
    written: AtomicU64,
}

impl Writer {
    /// Creates the files of a model in `folder`. A shard is closed before it would exceed `max_shard_size` bytes of
    /// data (a larger tensor gets a shard of its own). With one shard there is no index, as in Hugging Face's folders.
    pub fn create(
        folder: &Path,
        specs: &[TensorSpec],
        max_shard_size: u64,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Writer> {
        let files = Self::files(specs, max_shard_size);
        let writer = Self::create_files(folder, &files, metadata)?;
        Self::write_index(folder, &files)?;
        Ok(writer)
    }

    /// Creates these files in `folder`, some or all of those of a model, without their index.
    pub fn create_files(folder: &Path, files: &[FileSpecs], metadata: &BTreeMap<String, String>) -> Result<Writer> {
        let mut writer = Writer { shards: Vec::new(), places: HashMap::new() };
        files.iter().try_for_each(|(name, group)| writer.add_file(folder.join(name), group, metadata))?;
        Ok(writer)
    }

    /// Writes the index of a model with these files, if there are several.
    pub fn write_index(folder: &Path, files: &[FileSpecs]) -> Result<()> {
        if files.len() <= 1 {
            return Ok(());
        }
        let mut index = Index::default();
        for (name, group) in files {
            index.weight_map.extend(group.iter().map(|s| (s.name.clone(), name.clone())));
        }
        let total: u64 = files.iter().flat_map(|(_, group)| group).map(|s| s.bytes()).sum();
        index.metadata.insert("total_size".into(), total.into());
        let path = folder.join(INDEX_NAME);
        let json = serde_json::to_vec_pretty(&index).map_err(|e| Error::environment(e.to_string()))?;
        std::fs::write(&path, json).map_err(|e| Error::io("write", &path, e))
    }

    /// The files that [`Writer::create`] makes: their names and tensors.
    pub fn files(specs: &[TensorSpec], max_shard_size: u64) -> Vec<FileSpecs<'_>> {
        let groups = group_by_size(specs, max_shard_size);
        let count = groups.len();
        let name_of = |i: usize| match count {
            1 => MODEL_NAME.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        groups.into_iter().enumerate().map(|(i, group)| (name_of(i), group)).collect()
    }

    /// Creates a single file with the given name.
    pub fn create_file(path: &Path, specs: &[TensorSpec], metadata: &BTreeMap<String, String>) -> Result<Writer> {
        let mut writer = Writer { shards: Vec::new(), places: HashMap::new() };
        writer.add_file(path.to_owned(), &specs.iter().collect::<Vec<_>>(), metadata)?;
        Ok(writer)
    }

    fn add_file(&mut self, path: PathBuf, specs: &[&TensorSpec], metadata: &BTreeMap<String, String>) -> Result<()> {
        if specs.iter().any(|s| s.name == METADATA) {
            return Err(Error::request(format!(
                "'{}' cannot hold a tensor called '{METADATA}': safetensors keeps that name for itself",
                path.display()
            ))
            .help("rename the tensor"));
        }
        let header = encode_header(specs, metadata);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(|e| Error::io("create", &path, e))?;
        file.write_all_at(&header, 0).map_err(|e| Error::io("write", &path, e))?;
        let mut begin = header.len() as u64;
        for spec in specs {
            let place = Place { shard: self.shards.len(), begin, bytes: spec.bytes(), written: AtomicU64::new(0) };
            begin += place.bytes;
            if self.places.insert(spec.name.clone(), place).is_some() {
                return Err(Error::request(format!("tensor '{}' would be written twice", spec.name)));
            }
        }
        // A disk that is too small is found out now, not after an hour. Not every file system can reserve.
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, begin) {
            Err(e @ rustix::io::Errno::NOSPC) => return Err(Error::io("reserve space for", &path, e.into())),
            _ => file.set_len(begin).map_err(|e| Error::io("write", &path, e))?,
        }
        self.shards.push(Shard { path, file });
        Ok(())
    }

    /// Writes `bytes` of tensor `name`, starting at byte `offset` of its data. Any order, any thread, each byte once.
    pub fn write(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let (file, path, at) = self.claim(name, offset, bytes.len() as u64)?;
        file.write_all_at(bytes, at).map_err(|e| Error::io("write", path, e))
    }

    /// Writes a whole tensor from f32 values, rounded to nearest in its own type.
    pub fn write_f32(&self, name: &str, dtype: Dtype, values: &[f32]) -> Result<()> {
        self.write(name, 0, &dtype::encode_f32(dtype, values)?)
    }

    /// Where bytes `offset .. offset + len` of a tensor go; counts them as written.
    /// For callers that move bytes themselves (copies inside the kernel).
    pub fn claim(&self, name: &str, offset: u64, len: u64) -> Result<(&File, &Path, u64)> {
        let place = self
            .places
            .get(name)
            .ok_or_else(|| Error::request(format!("tensor '{name}' is not in the planned output")))?;
        if offset.checked_add(len).is_none_or(|end| end > place.bytes) {
            return Err(Error::request(format!(
                "tensor '{name}': bytes {offset}..{} do not fit its {} bytes",
                offset.saturating_add(len),
                place.bytes
            )));
        }
        place.written.fetch_add(len, Ordering::Relaxed);
        let shard = &self.shards[place.shard];
        Ok((&shard.file, &shard.path, place.begin + offset))
    }

    /// The file that will hold tensor `name`.
    pub fn shard_of(&self, name: &str) -> Option<&Path> {
        self.places.get(name).map(|p| self.shards[p.shard].path.as_path())
    }

    /// Waits until the disk has what was written so far.
    pub fn sync(&self) -> Result<()> {
        self.shards.iter().try_for_each(|s| s.file.sync_data().map_err(|e| Error::io("sync", &s.path, e)))
    }

    /// Checks that every tensor is complete. The caller's staged folder syncs the files.
    pub fn finish(self) -> Result<()> {
        for (name, place) in &self.places {
            let written = place.written.load(Ordering::Relaxed);
            if written != place.bytes {
                return Err(Error::environment(format!(
                    "tensor '{name}' is incomplete: {written} of {} bytes written",
                    place.bytes
                )));
            }
        }
        Ok(())
    }
}

/// Splits tensors, in order, into groups of at most `limit` bytes.
fn group_by_size(specs: &[TensorSpec], limit: u64) -> Vec<Vec<&TensorSpec>> {
    let mut groups: Vec<Vec<&TensorSpec>> = vec![Vec::new()];
    let mut used = 0u64;
    for spec in specs {
        let last = groups.len() - 1;
        if !groups[last].is_empty() && used + spec.bytes() > limit {
            groups.push(Vec::new());
            used = 0;
        }
        used += spec.bytes();
        let last = groups.len() - 1;
        groups[last].push(spec);
    }
    groups
}

/// Length prefix and JSON, padded with spaces so that the data start at a multiple of 8.
fn encode_header(specs: &[&TensorSpec], metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let mut entries = serde_json::Map::new();
    if !metadata.is_empty() {
        entries.insert(METADATA.into(), serde_json::json!(metadata));
    }
    let mut begin = 0;
    for spec in specs {
        let end = begin + spec.bytes();
        entries.insert(
            spec.name.clone(),
            serde_json::json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [begin, end]}),
        );
        begin = end;
    }
    let mut json = serde_json::Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use proptest::prelude::*;

    fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.to_vec() }
    }

    #[test]
    fn an_incomplete_tensor_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let writer = Writer::create(dir.path(), &[spec("w", Dtype::F32, &[2])], 1 << 30, &BTreeMap::new()).unwrap();
        writer.write("w", 0, &[0; 4]).unwrap();
        assert!(writer.finish().unwrap_err().message.contains("4 of 8 bytes"));
    }

    #[test]
    fn the_name_of_the_metadata_is_refused_for_a_tensor() {
        let dir = tempfile::tempdir().unwrap();
        let specs = [spec("__metadata__", Dtype::F32, &[2])];
        let error = Writer::create(dir.path(), &specs, 1 << 30, &BTreeMap::new()).err().unwrap();
        assert!(error.message.contains("'__metadata__'"), "{}", error.message);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            tensors in prop::collection::vec((prop::sample::select(vec![Dtype::F32, Dtype::BF16, Dtype::I64, Dtype::U8]), prop::collection::vec(0usize..5, 0..4)), 1..12),
            limit in 1u64..300,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let specs: Vec<_> = tensors.iter().enumerate().map(|(i, (d, s))| spec(&format!("t{i}"), *d, s)).collect();
            let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
            let writer = Writer::create(dir.path(), &specs, limit, &metadata).unwrap();
            let data = |s: &TensorSpec| (0..s.bytes()).map(|i| (i * 7 + s.name.len() as u64) as u8).collect::<Vec<_>>();
            for s in specs.iter().rev() {
                writer.write(&s.name, 0, &data(s)).unwrap();
            }
            writer.finish().unwrap();
            let back = Checkpoint::open(dir.path()).unwrap();
            prop_assert_eq!(back.len(), specs.len());
            for s in &specs {
                let t = back.tensor(&s.name).unwrap();
                prop_assert_eq!(TensorSpec::like(&t), s.clone());
                prop_assert_eq!(t.bytes(), data(s));
            }
            // The reference implementation agrees.
            for f in back.files() {
                let bytes = std::fs::read(f.path()).unwrap();
                let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
                prop_assert_eq!(theirs.len(), f.tensors().len());
            }
        }
    }
}
