//! The calls that `lib.rs` exports: one per command, with options that have defaults.

use crate::{error::Result, progress::Progress};
use std::path::{Path, PathBuf};

/// Adds adapters to a checkpoint and writes the result as a new checkpoint.
///
/// Every changed weight is `round(W + sum of weight * scaling * B @ A)`, computed in f32 (in f64 where the weight is stored as
/// F64) and rounded once. The report says for each tensor how much of its delta survived the rounding.
///
/// # Errors
///
/// The call fails before it writes anything if an adapter's tensor has no target in the base, if shapes do not fit, or if the
/// output exists. On any error the output is absent.
///
/// # Example
///
/// ```
/// use relora_kit::{Checkpoint, MergeOptions, Progress, merge};
///
/// # fn main() -> relora_kit::Result<()> {
/// # let folder = tempfile::tempdir().unwrap();
/// # let output = folder.path().join("merged");
/// let options = MergeOptions::new("fixtures/tiny_llama_bf16", &output).adapter("fixtures/tiny_adapter", 1.0);
/// let report = merge(&options, &Progress::hidden())?;
/// assert_eq!(report.totals.merged, 14);
/// assert!(report.totals.retention.unwrap().retention > 0.9);
/// assert!(Checkpoint::open(&output)?.get("model.layers.0.self_attn.q_proj.weight").is_some());
/// # Ok(())
/// # }
/// ```
pub fn merge(options: &crate::merge::Options, progress: &Progress) -> Result<crate::merge::MergeReport> {
    crate::merge::run(options, progress)
}

impl crate::merge::Options {
    /// Merges nothing yet into `base`; the result goes to the folder `output`, which must not exist. Element types stay as they
    /// are, values are rounded to the nearest.
    pub fn new(base: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        crate::merge::Options {
            map: Vec::new(),
            base: base.into(),
            adapters: Vec::new(),
            output: output.into(),
            dtype: None,
            rounding: crate::merge::Rounding::Nearest,
            max_shard_size: crate::merge::MAX_SHARD_SIZE,
            force: false,
            dry_run: false,
            gpu: None,
        }
    }

    /// Adds the adapter in this folder, multiplied by `weight`: 1 as it was trained, a negative number to subtract it.
    pub fn adapter(mut self, path: impl Into<PathBuf>, weight: f64) -> Self {
        self.adapters.push((path.into(), weight));
        self
    }
}

/// Computes the singular values of weight updates, the measures of rank that follow from them, and gates.
///
/// # Errors
///
/// The call fails if a source cannot be read, if two checkpoints do not have the same tensors, if a matrix has values that are
/// not finite, or if a gate names no matrix. A gate that does not hold is no error: see
/// [`Spectrum::passed`](crate::Spectrum::passed).
///
/// # Example
///
/// ```
/// use relora_kit::{Progress, SpectrumOptions, spectrum};
///
/// # fn main() -> relora_kit::Result<()> {
/// let options = SpectrumOptions::default()
///     .checkpoints("fixtures/tiny_llama", "fixtures/relora")
///     .roundings(3)
///     .require("rank_above_noise >= 12 for all on *self_attn*")?;
/// let result = spectrum(&options, &Progress::hidden())?;
/// assert!(result.passed());
/// let q = result.matrices.iter().find(|m| m.name.ends_with("layers.0.self_attn.q_proj.weight")).unwrap();
/// assert_eq!(q.measures.rank_above_noise, 12);
/// # Ok(())
/// # }
/// ```
pub fn spectrum(options: &crate::spectrum::Options, progress: &Progress) -> Result<crate::spectrum::Spectrum> {
    crate::spectrum::run(options, progress)
}

impl crate::spectrum::Options {
    /// Measures `tuned - base`, weight by weight; both are checkpoints.
    pub fn checkpoints(mut self, base: impl Into<PathBuf>, tuned: impl AsRef<Path>) -> Self {
        let tuned = crate::spectrum::Labelled::parse(tuned.as_ref());
        self.sources.push(crate::spectrum::SourceSpec::Checkpoints { base: base.into(), tuned });
        self
    }

    /// Measures the deltas `scaling * B @ A` of an adapter.
    pub fn adapter(mut self, path: impl AsRef<Path>) -> Self {
        self.sources.push(crate::spectrum::SourceSpec::Adapter(crate::spectrum::Labelled::parse(path.as_ref())));
        self
    }

    /// Measures every cycle of a run, and their sums.
    pub fn run_directory(mut self, path: impl AsRef<Path>) -> Self {
        self.sources.push(crate::spectrum::SourceSpec::Run(crate::spectrum::Labelled::parse(path.as_ref())));
        self
    }

    /// How often the weights of checkpoints were rounded between base and tuned, which gates on the noise edge need to know
    /// where the files do not say it; 0 for exact storage.
    pub fn roundings(mut self, count: u64) -> Self {
        self.roundings = Some(count);
        self
    }

    /// Adds a gate, such as `rank_above_noise > 2*r for 90%`.
    ///
    /// # Errors
    ///
    /// The text is not a gate; the message shows where.
    pub fn require(mut self, gate: &str) -> Result<Self> {
        self.gates.push(crate::spectrum::gates::Gate::parse(gate)?);
        Ok(self)
    }
}

/// Lists the tensors of a checkpoint or an adapter: names, shapes, element types, bytes.
///
/// # Example
///
/// ```
/// use relora_kit::{InspectOptions, Progress, inspect};
///
/// # fn main() -> relora_kit::Result<()> {
/// let options = InspectOptions { stats: true, ..InspectOptions::new("fixtures/tiny_llama") };
/// let found = inspect(&options, &Progress::hidden())?;
/// assert_eq!(found.tensors.len(), 21);
/// assert_eq!(found.dtypes["F32"], found.parameters);
/// # Ok(())
/// # }
/// ```
pub fn inspect(options: &crate::inspect::Options, progress: &Progress) -> Result<crate::inspect::Inspection> {
    crate::inspect::run(options, progress)
}

impl crate::inspect::Options {
    /// All tensors of the checkpoint or adapter at `path`, without their values.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        crate::inspect::Options { path: path.into(), filter: Default::default(), stats: false, tree: false }
    }
}

/// Compares two checkpoints, or two adapters, tensor by tensor.
///
/// # Example
///
/// ```
/// use relora_kit::{DiffOptions, Progress, diff};
///
/// # fn main() -> relora_kit::Result<()> {
/// let same = diff(&DiffOptions::new("fixtures/tiny_llama", "fixtures/tiny_llama"), &Progress::hidden())?;
/// assert!(same.equal);
/// let options = DiffOptions { rtol: 1e-2, ..DiffOptions::new("fixtures/tiny_llama", "fixtures/tiny_llama_bf16") };
/// let rounded = diff(&options, &Progress::hidden())?;
/// assert!(rounded.equal);
/// # Ok(())
/// # }
/// ```
pub fn diff(options: &crate::diff::Options, progress: &Progress) -> Result<crate::diff::Diff> {
    crate::diff::run(options, progress)
}

impl crate::diff::Options {
    /// Every tensor of `a` and `b`, whose values must be equal.
    pub fn new(a: impl Into<PathBuf>, b: impl Into<PathBuf>) -> Self {
        crate::diff::Options { a: a.into(), b: b.into(), filter: Default::default(), atol: 0.0, rtol: 0.0 }
    }
}

/// Recomputes what a run directory claims: the hashes of its files, the rank of every cycle, and that the base plus the sum of
/// all cycles is the final checkpoint.
///
/// # Errors
///
/// The call fails if the folder is no run directory or a file cannot be read. A claim that is false is no error: see
/// [`Verification::verified`](crate::Verification::verified). [`train`](crate::train()) has an example.
pub fn verify(run: impl AsRef<Path>, progress: &Progress) -> Result<crate::verify::Verification> {
    crate::verify::run(run.as_ref(), progress)
}

/// Trains on the CPU as a configuration says, into a new run directory, and returns the summary.
///
/// `set` replaces keys of the configuration, as `--set` does: `"train.lr=1e-3"`. When the call is cancelled, it saves a
/// checkpoint, from which [`resume`] continues.
///
/// # Errors
///
/// The call fails if the configuration is wrong, if the data or the model cannot be read, or if `output` exists.
///
/// # Example
///
/// ```
/// use relora_kit::{Progress, train, verify};
///
/// # fn main() -> relora_kit::Result<()> {
/// # let folder = tempfile::tempdir().unwrap();
/// # let (tokens, run) = (folder.path().join("tokens.bin"), folder.path().join("run"));
/// // nanoGPT's layout: token ids as u16. Here every byte of a text is a token.
/// let text = std::fs::read("LICENSE").unwrap();
/// std::fs::write(&tokens, text.iter().flat_map(|&byte| u16::from(byte).to_le_bytes()).collect::<Vec<u8>>()).unwrap();
///
/// let data = format!("data.train={:?}", tokens.display().to_string());
/// let summary = train("examples/tiny.toml", &[&data], &run, &Progress::hidden())?;
/// assert_eq!((summary.steps, summary.cycles), (40, 3));
/// assert!(verify(&run, &Progress::hidden())?.verified);
/// # Ok(())
/// # }
/// ```
#[cfg(feature = "train")]
pub fn train(
    config: impl AsRef<Path>,
    set: &[&str],
    output: impl AsRef<Path>,
    progress: &Progress,
) -> Result<crate::train::summary::Summary> {
    use crate::{collective::Alone, ops::Cpu, train::config::Config, train::session::Session};
    let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
    let config = Config::read(config.as_ref(), &set)?;
    Session::create(Cpu, config, output.as_ref(), &(std::sync::Arc::new(Alone) as _), progress)?.run()
}

/// Continues a run from its newest checkpoint, on the CPU.
///
/// # Errors
///
/// The call fails if the folder is no run directory, or if the data or a file of the run changed since.
#[cfg(feature = "train")]
pub fn resume(run: impl AsRef<Path>, progress: &Progress) -> Result<crate::train::summary::Summary> {
    use crate::{collective::Alone, ops::Cpu, train::session::Session};
    Session::resume(Cpu, run.as_ref(), &(std::sync::Arc::new(Alone) as _), progress)?.run()
}
