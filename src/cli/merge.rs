//! `relora-kit merge`

use super::{DeviceChoice, Outcome, parse_device, ranks};
use crate::{
    checkpoint::Dtype,
    collective::Job,
    error::{Error, Result},
    job_array::ArrayTask,
    merge::{self, Options, Rounding},
    ops::CudaOptions,
    progress::Progress,
    report::{self, Format, units},
};
use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Add adapters to a checkpoint: complete or refused, and measured
///
/// W' = round(W + sum of WEIGHT * scale * B @ A), computed in f32 and rounded once; every other tensor is copied byte for
/// byte. Every tensor of every adapter must find its target. The report says how much of each delta survived rounding.
/// Without an adapter the checkpoint is only recast and resharded.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit merge --base llama --adapter my-lora -o merged
  relora-kit merge --base run/base --adapter 'run/cycles/*' -o merged
  relora-kit merge --base llama --adapter style=0.7 --adapter facts=0.3 --dtype bf16 -o merged
  relora-kit merge --base llama --adapter my-lora --rounding stochastic --seed 1 -o merged
  relora-kit merge --base merged --adapter my-lora=-1 -o without
  relora-kit merge --base llama --adapter my-lora -o merged --dry-run --format json
  relora-kit merge --base llama --adapter my-lora -o merged --device cuda
  relora-kit merge --base llama --dtype bf16 --max-shard-size 2GB -o llama-bf16
  relora-kit merge --base llama --adapter my-lora --max-shard-size 2GB -o merged --shard 3/8
  relora-kit merge --base llama --adapter my-lora --max-shard-size 2GB -o merged --combine
  mpirun -n 4 relora-kit merge --base llama --adapter my-lora --max-shard-size 2GB -o merged")]
pub struct Args {
    /// The checkpoint that deltas are added to: a folder or a .safetensors file
    #[arg(long, value_name = "CKPT")]
    base: PathBuf,
    /// PEFT adapters, added in this order; a glob takes all matches in sorted order, a negative weight un-merges
    #[arg(long, value_name = "ADAPTER[=WEIGHT]", num_args = 1.., allow_negative_numbers = true)]
    adapter: Vec<OsString>,
    /// Adapter names that begin with FROM begin with TO in the base; repeat for more, the first that fits decides
    #[arg(long, value_name = "FROM=TO", value_parser = parse_rule)]
    map: Vec<(String, String)>,
    /// The folder to create
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Type of all floating point tensors of the output
    #[arg(long, value_enum, default_value_t)]
    dtype: TargetDtype,
    /// How values are rounded to bf16 and f16: stochastic keeps small deltas on average, with a larger error
    #[arg(long, value_enum, default_value_t)]
    rounding: RoundingMode,
    /// Seed of stochastic rounding: the same seed gives the same bytes
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// A new file begins before it would exceed this size
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = units::parse_bytes)]
    max_shard_size: u64,
    /// Write the I-th of N shares of the output's files into OUT.parts, for --combine
    #[arg(long, value_name = "I/N", conflicts_with_all = ["dry_run", "combine"], help_heading = "Job arrays")]
    shard: Option<ArrayTask>,
    /// Make the output of all parts that --shard wrote with the same options
    #[arg(long, conflicts_with = "dry_run", help_heading = "Job arrays")]
    combine: bool,
    /// Plan and check everything, but write nothing
    #[arg(long)]
    dry_run: bool,
    /// Replace the output folder if it exists
    #[arg(long)]
    force: bool,
    /// What computes the products B @ A: `cpu`, or an NVIDIA GPU, `cuda` or `cuda:N`, where reading them back costs less
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = parse_device)]
    device: DeviceChoice,
    /// How the report is printed
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
pub(super) enum TargetDtype {
    /// Each tensor's own
    #[default]
    Keep,
    F32,
    F16,
    Bf16,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum RoundingMode {
    /// Ties to even
    #[default]
    Nearest,
    /// Up or down by chance, exact on average
    Stochastic,
}

impl TargetDtype {
    pub(super) fn dtype(self) -> Option<Dtype> {
        match self {
            TargetDtype::Keep => None,
            TargetDtype::F32 => Some(Dtype::F32),
            TargetDtype::F16 => Some(Dtype::F16),
            TargetDtype::Bf16 => Some(Dtype::BF16),
        }
    }
}

impl Args {
    pub(super) fn run(self, progress: &Progress) -> Result<Outcome> {
        // The jobs of an array know nothing of each other.
        if self.shard.is_some() || self.combine {
            return self.merge(None, progress);
        }
        ranks::run(None, progress, |job, progress| self.merge(job, progress))
    }

    fn merge(&self, job: Option<&Arc<Job>>, progress: &Progress) -> Result<Outcome> {
        let options = self.options(job)?;
        let result = match (self.shard, job) {
            (Some(shard), _) => Some(merge::run_shard(&options, shard, progress)?),
            (None, Some(job)) => merge::run_together(&options, job, progress)?,
            (None, None) if self.combine => Some(merge::combine(&options, progress)?),
            (None, None) => Some(merge::run(&options, progress)?),
        };
        if let Some(result) = result {
            report::emit(&result, self.format, None)?;
        }
        Ok(Outcome::Yes)
    }

    fn options(&self, job: Option<&Arc<Job>>) -> Result<Options> {
        let adapters: Vec<Vec<(PathBuf, f64)>> = self.adapter.iter().map(parse_adapter).collect::<Result<_>>()?;
        Ok(Options {
            base: self.base.clone(),
            adapters: adapters.concat(),
            output: self.output.clone(),
            map: self.map.clone(),
            dtype: self.dtype.dtype(),
            rounding: match self.rounding {
                RoundingMode::Nearest => Rounding::Nearest,
                RoundingMode::Stochastic => Rounding::Stochastic { seed: self.seed },
            },
            max_shard_size: self.max_shard_size,
            force: self.force,
            dry_run: self.dry_run,
            gpu: ranks::own_gpu(self.device, job).map(CudaOptions::from_env),
        })
    }
}

/// Reads `FROM=TO`; both may be empty.
fn parse_rule(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((from, to)) => Ok((from.to_owned(), to.to_owned())),
        None => Err("expected FROM=TO, for example =vision_model.".to_owned()),
    }
}

/// Reads `ADAPTER[=WEIGHT]`. What exists as written is a path, even if it holds `=` or `*`.
fn parse_adapter(text: impl AsRef<OsStr>) -> Result<Vec<(PathBuf, f64)>> {
    let text = text.as_ref();
    if Path::new(text).exists() {
        return Ok(vec![(text.into(), 1.0)]);
    }
    // Weights, and globs, are text.
    let Some(text) = text.to_str() else { return parse_raw_adapter(text) };
    let (path, weight) = match text.rsplit_once('=') {
        Some((path, weight)) => {
            let parsed = weight.parse().map_err(|_| {
                Error::request(format!("--adapter '{text}': the weight '{weight}' is not a number"))
                    .help("write ADAPTER=WEIGHT, for example my-lora=0.5")
            })?;
            (path, parsed)
        }
        None => (text, 1.0),
    };
    let is_glob = path.contains(['*', '?', '[']) && !Path::new(path).exists();
    if !is_glob {
        return Ok(vec![(path.into(), weight)]);
    }
    let matches = glob::glob(path).map_err(|e| Error::request(format!("--adapter '{path}' is not a glob: {e}")))?;
    let found = matches
        .map(|path| path.map_err(|e| Error::io("read", e.path(), std::io::Error::from(e.error().kind()))))
        .collect::<Result<Vec<_>>>()?;
    if found.is_empty() {
        return Err(Error::request(format!("--adapter '{path}' matches nothing")).help("check the path"));
    }
    Ok(found.into_iter().map(|path| (path, weight)).collect())
}

/// `PATH=WEIGHT` where the path is not UTF-8.
fn parse_raw_adapter(text: &OsStr) -> Result<Vec<(PathBuf, f64)>> {
    let bytes = text.as_bytes();
    let split = bytes.iter().rposition(|&b| b == b'=').and_then(|at| {
        let weight = std::str::from_utf8(&bytes[at + 1..]).ok()?.parse().ok()?;
        Some((OsStr::from_bytes(&bytes[..at]), weight))
    });
    let (path, weight) = split.unwrap_or((text, 1.0));
    Ok(vec![(path.into(), weight)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_and_globs_are_read_and_sorted() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["cycle-002", "cycle-001", "cycle-010", "a=b"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let parse = |text: &str| {
            let found = parse_adapter(format!("{}/{text}", dir.path().display())).unwrap();
            let name = |p: PathBuf| p.file_name().unwrap().to_string_lossy().into_owned();
            found.into_iter().map(|(p, w)| (name(p), w)).collect::<Vec<_>>()
        };
        let cycles = |w| ["cycle-001", "cycle-002", "cycle-010"].map(|n| (n.to_owned(), w)).to_vec();
        assert_eq!(parse("cycle-*"), cycles(1.0));
        assert_eq!(parse("cycle-*=-1"), cycles(-1.0));
        assert_eq!(parse("cycle-001=0.5"), [("cycle-001".to_owned(), 0.5)]);
        assert_eq!(parse("a=b"), [("a=b".to_owned(), 1.0)]);
        assert!(parse_adapter("nowhere/*").unwrap_err().message.contains("matches nothing"));
        assert!(parse_adapter("x=heavy").unwrap_err().message.contains("'heavy' is not a number"));
    }
}
