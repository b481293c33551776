//! Other formats into a Hugging Face checkpoint: plan (open, name, check every tensor), then stream piece by piece.

mod gguf;
mod pytorch;

use crate::{
    checkpoint::{Dtype, TensorSpec, Writer},
    error::{Error, Result},
    inputs::Inputs,
    progress::Progress,
    staged::{Holds, StagedDir, Target},
};
use rayon::prelude::*;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    io::Read,
    ops::Range,
    path::{Path, PathBuf},
};

/// Elements that are converted at a time.
const PIECE: usize = 1 << 20;

/// What to convert, and into what.
#[derive(Clone, Debug)]
pub struct Options {
    /// A GGUF file, a pickled PyTorch file, or a Hugging Face folder with `pytorch_model.bin`.
    pub input: PathBuf,
    /// The folder to create.
    pub output: PathBuf,
    /// Element type of every floating point tensor of the output; `None` keeps each one's own (F32 for quantised ones).
    pub dtype: Option<Dtype>,
    /// Bytes of data after which a new shard begins.
    pub max_shard_size: u64,
    /// Replace the output if it exists.
    pub force: bool,
    /// Metadata keys of a GGUF file that the output may lack although they change what the model computes.
    pub leave_out: Vec<String>,
}

/// A tensor of the output, and what it comes from.
#[derive(Clone, Debug)]
struct Planned {
    spec: TensorSpec,
    source: String,
    stored_as: String,
    stored_bytes: u64,
}

/// A checked input. Pieces are read from any thread.
trait Source: Sync {
    /// `gguf` or `pytorch`.
    fn format(&self) -> &'static str;
    /// What will be written, in this order.
    fn tensors(&self) -> &[Planned];
    /// Pieces of this tensor begin and end at multiples of so many elements.
    fn granule(&self, tensor: usize) -> usize;
    /// Elements of a tensor, in the bytes of the output.
    fn read(&self, tensor: usize, elements: Range<usize>) -> Result<Vec<u8>>;
    /// Writes configuration and tokenizer beside the weights; returns sentences about what was left out, and warns of what a
    /// user may miss.
    fn sidecar_files(&self, folder: &Path, progress: &Progress) -> Result<Vec<String>>;
}

/// The result of a conversion.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertReport {
    /// Version of this layout.
    pub schema: u32,
    /// What was converted.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub input: PathBuf,
    /// `gguf` or `pytorch`.
    pub format: String,
    /// The folder that was created.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub output: PathBuf,
    /// Every tensor, in the order of the output.
    pub tensors: Vec<ConvertedTensor>,
    /// Bytes of all tensors in the output.
    pub bytes: u64,
    /// Names of the files of the output, sorted.
    pub files: Vec<String>,
    /// What the output lacks, and why.
    pub left_out: Vec<String>,
}

/// One tensor of the output.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertedTensor {
    /// Name in the output.
    pub name: String,
    /// Name in the input.
    pub source: String,
    /// Type in the input, as its format calls it: `Q4_1`.
    pub stored_as: String,
    /// Bytes in the input.
    pub stored_bytes: u64,
    /// Element type in the output.
    pub dtype: Dtype,
    /// Extents.
    pub shape: Vec<usize>,
    /// The file that holds it.
    pub file: String,
}

/// Converts. On success the output folder is complete; on an error, or when interrupted, nothing is left behind.
pub fn run(options: &Options, progress: &Progress) -> Result<ConvertReport> {
    let inputs = Inputs::of([&options.input]);
    let target = Target::folder(&options.output, Holds::Checkpoint, options.force, &inputs)?;
    let source = open(options)?;
    let specs: Vec<_> = source.tensors().iter().map(|t| t.spec.clone()).collect();
    let staged = StagedDir::create(target)?;
    let left_out = source.sidecar_files(staged.path(), progress)?;
    let metadata = BTreeMap::from([
        // What `transformers` insists on.
        ("format".to_owned(), "pt".to_owned()),
        ("converted_by".to_owned(), concat!("relora-kit ", env!("CARGO_PKG_VERSION")).to_owned()),
        ("converted_from".to_owned(), name_of(&options.input)),
    ]);
    let writer = Writer::create(staged.path(), &specs, options.max_shard_size, &metadata)?;
    stream(&*source, &writer, progress)?;
    let report = report(options, &*source, &writer, staged.path(), left_out)?;
    writer.finish()?;
    staged.commit()?;
    Ok(report)
}

/// The last part of a path: the output must not tell where on this machine its input lay.
fn name_of(path: &Path) -> String {
    // `.` and `..` have none.
    let whole = path.file_name().is_none().then(|| path.canonicalize().ok()).flatten();
    let name = whole.as_deref().unwrap_or(path).file_name();
    name.unwrap_or_default().to_string_lossy().into_owned()
}

fn open(options: &Options) -> Result<Box<dyn Source>> {
    let path = &options.input;
    let mut magic = [0; 4];
    let meta = path.metadata().map_err(|e| Error::io("open", path, e))?;
    if meta.is_file() {
        let mut file = crate::inputs::open(path)?.take(4);
        let mut found = Vec::new();
        file.read_to_end(&mut found).map_err(|e| Error::io("read", path, e))?;
        magic[..found.len()].copy_from_slice(&found);
    }
    if &magic == gguf::MAGIC {
        return Ok(Box::new(gguf::GgufSource::open(path, options.dtype, &options.leave_out)?));
    }
    if let Some(key) = options.leave_out.first() {
        return Err(Error::request(format!("--leave-out {key}: '{}' is no GGUF file", path.display()))
            .help("only settings of GGUF files can be left out"));
    }
    Ok(Box::new(pytorch::PytorchSource::open(path, options.dtype)?))
}

fn stream(source: &dyn Source, writer: &Writer, progress: &Progress) -> Result<()> {
    let total = source.tensors().iter().map(|t| t.spec.bytes()).sum();
    let bar = progress.bytes("converting", total);
    let mut pieces = Vec::new();
    for (i, tensor) in source.tensors().iter().enumerate() {
        let count: usize = tensor.spec.shape.iter().product();
        let granule = source.granule(i).max(1);
        let step = (PIECE / granule).max(1) * granule;
        pieces.extend((0..count).step_by(step).map(|at| (i, at..count.min(at + step))));
    }
    pieces.par_iter().with_max_len(1).try_for_each(|(i, elements)| {
        progress.check()?;
        let spec = &source.tensors()[*i].spec;
        let bytes = source.read(*i, elements.clone())?;
        writer.write(&spec.name, (elements.start * spec.dtype.bitsize() / 8) as u64, &bytes)?;
        bar.inc(bytes.len() as u64);
        Ok(())
    })?;
    bar.finish_and_clear();
    Ok(())
}

fn report(
    options: &Options,
    source: &dyn Source,
    writer: &Writer,
    folder: &Path,
    left_out: Vec<String>,
) -> Result<ConvertReport> {
    let file_of = |name: &str| {
        let name = writer.shard_of(name).and_then(Path::file_name).unwrap_or_default();
        name.to_string_lossy().into_owned()
    };
    let tensors = source.tensors().iter().map(|t| ConvertedTensor {
        name: t.spec.name.clone(),
        source: t.source.clone(),
        stored_as: t.stored_as.clone(),
        stored_bytes: t.stored_bytes,
        dtype: t.spec.dtype,
        shape: t.spec.shape.clone(),
        file: file_of(&t.spec.name),
    });
    let entries = folder.read_dir().map_err(|e| Error::io("read", folder, e))?;
    let mut files: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    files.sort();
    Ok(ConvertReport {
        schema: 1,
        input: options.input.clone(),
        format: source.format().to_owned(),
        output: options.output.clone(),
        tensors: tensors.collect(),
        bytes: source.tensors().iter().map(|t| t.spec.bytes()).sum(),
        files,
        left_out,
    })
}

/// The floating point type of most elements, for `config.json`.
fn commonest_dtype(planned: &[Planned]) -> Dtype {
    let mut counts: Vec<(Dtype, usize)> = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64].map(|d| (d, 0)).to_vec();
    for t in planned {
        if let Some(entry) = counts.iter_mut().find(|(d, _)| *d == t.spec.dtype) {
            entry.1 += t.spec.shape.iter().product::<usize>();
        }
    }
    // The first of equals.
    counts.iter().rev().max_by_key(|(_, n)| *n).map_or(Dtype::F32, |(d, _)| *d)
}
