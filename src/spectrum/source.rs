//! Sources of updates: opens them, checks that they fit, and lists the matrices to measure.

use super::{
    Options, Reason, Skipped, Source,
    lowrank::{self, Factors, OpenedRun},
    names,
    pair::{self, Pair},
    schedule::Need,
    svd::{PANEL, Way},
};
use crate::{
    adapter::{Adapter, config::CONFIG_NAME},
    checkpoint::{Checkpoint, Dtype, Filter},
    error::Result,
    interrupt,
    run::{RunDir, sha256_file},
};
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// A path and the name its results go by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labelled {
    /// Unique among the sources.
    pub label: String,
    /// Where it is.
    pub path: PathBuf,
}

impl Labelled {
    /// Reads `[LABEL=]PATH`. A path that exists as written is a path even if it holds `=`; without a label the last
    /// component of the path is taken.
    pub fn parse(text: impl AsRef<OsStr>) -> Labelled {
        let text = text.as_ref();
        let bytes = text.as_bytes();
        match bytes.iter().position(|&b| b == b'=') {
            Some(at) if at > 0 && !Path::new(text).exists() => Labelled {
                label: String::from_utf8_lossy(&bytes[..at]).into_owned(),
                path: OsStr::from_bytes(&bytes[at + 1..]).into(),
            },
            _ => {
                let path = PathBuf::from(text);
                let whole = path.canonicalize().unwrap_or_else(|_| path.clone());
                let last = whole.file_name().unwrap_or(whole.as_os_str());
                Labelled { label: last.to_string_lossy().into_owned(), path }
            }
        }
    }
}

/// One source as asked for.
#[derive(Clone, Debug)]
pub enum Request {
    /// `tuned - base`, two checkpoints.
    Checkpoints {
        /// W0.
        base: PathBuf,
        /// Wn.
        tuned: Labelled,
    },
    /// `scaling * B @ A` of a PEFT adapter.
    Adapter(Labelled),
    /// Every cycle of a run, and their sums.
    Run(Labelled),
}

impl Request {
    /// The label of its results.
    pub fn label(&self) -> &str {
        match self {
            Request::Checkpoints { tuned, .. } => &tuned.label,
            Request::Adapter(source) | Request::Run(source) => &source.label,
        }
    }
}

/// A source whose files are mapped.
pub(super) enum Opened {
    Checkpoints { label: String, base: Checkpoint, tuned: Checkpoint },
    Adapter { label: String, adapter: Box<Adapter> },
    Run { label: String, run: Box<OpenedRun> },
}

/// One matrix to measure.
pub(super) struct Job<'a> {
    pub label: String,
    pub name: String,
    pub place: names::Place,
    pub shape: (usize, usize),
    pub dtype: Dtype,
    pub r: Option<usize>,
    /// The cycles it covers; `None` where there are no cycles.
    pub cycles: Option<Vec<u64>>,
    pub work: Work<'a>,
}

/// How the singular values are found.
pub(super) enum Work<'a> {
    /// Dense difference of two stored matrices.
    Pair { pair: Pair<'a>, roundings: u64 },
    /// Factors of one delta per cycle, or of an adapter.
    Factors(Factors<'a>),
}

impl Job<'_> {
    /// Work: the cube that the eigenvalues take plus the product before. Memory: the Gram matrix and a panel, or the
    /// dense matrix and a workspace. On a GPU: the Gram matrix, a workspace of at most its size, and a panel.
    pub fn need(&self, way: Way) -> Need {
        let (short, long) = (self.shape.0.min(self.shape.1) as f64, self.shape.0.max(self.shape.1) as f64);
        let tolerance = super::measures::default_tolerance(self.shape);
        let panel = PANEL as f64 + 44.0;
        let on_gpu = |n: f64| 8.0 * n * (2.0 * n + panel);
        let cost = short * short * (short + long);
        match &self.work {
            Work::Pair { .. } if way.takes_gram(self.shape, tolerance) && way.gpu.is_some() => {
                Need { cost, memory: 8.0 * short * panel, gpu_memory: on_gpu(short) }
            }
            Work::Pair { .. } if way.takes_gram(self.shape, tolerance) => {
                Need { cost, memory: 8.0 * short * (short + panel), gpu_memory: 0.0 }
            }
            Work::Pair { .. } => Need { cost, memory: 8.0 * short * (long + short.min(300.0)), gpu_memory: 0.0 },
            Work::Factors(factors) => {
                let rank = factors.total_rank() as f64;
                let core = (rank.min(short), rank.min(long));
                let gram = way.gpu.is_some() && way.takes_gram((core.0 as usize, core.1 as usize), tolerance);
                Need {
                    cost: rank * rank * (short + long) + core.0 * core.1 * short,
                    memory: 8.0 * (3.0 * rank * (short + long) + 3.0 * core.0 * core.1),
                    gpu_memory: if gram { on_gpu(core.0) } else { 0.0 },
                }
            }
        }
    }
}

pub(super) fn skipped(name: &str, label: &str, reason: Reason, detail: String) -> Skipped {
    Skipped { name: name.to_owned(), label: label.to_owned(), reason, detail }
}

impl Opened {
    pub fn open(request: &Request) -> Result<Opened> {
        let label = request.label().to_owned();
        Ok(match request {
            Request::Checkpoints { base, tuned } => {
                Opened::Checkpoints { label, base: Checkpoint::open(base)?, tuned: Checkpoint::open(&tuned.path)? }
            }
            Request::Adapter(source) => Opened::Adapter { label, adapter: Box::new(Adapter::open(&source.path)?) },
            Request::Run(source) => Opened::Run { label, run: Box::new(OpenedRun::open(&source.path)?) },
        })
    }

    /// What this source is, with the sha256 of the files that `hashed` takes.
    pub fn describe(&self, hashed: impl Fn(&Path) -> bool) -> Result<Source> {
        let (label, kind, base, path) = match self {
            Opened::Checkpoints { label, base, tuned } => (label, "checkpoints", Some(base.path()), tuned.path()),
            Opened::Adapter { label, adapter } => (label, "adapter", None, adapter.path()),
            Opened::Run { label, run } => (label, "run", None, run.path()),
        };
        let cycles = if let Opened::Run { run, .. } = self { Some(run.cycles()) } else { None };
        let mut files = BTreeMap::new();
        for file in self.files().into_iter().filter(|file| hashed(file)) {
            interrupt::check()?;
            let hash = sha256_file(&file)?;
            files.insert(file.display().to_string(), hash);
        }
        let (base, path) = (base.map(Path::to_owned), path.to_owned());
        Ok(Source { label: label.clone(), kind: kind.into(), base, path, cycles, files })
    }

    /// The files the result depends on; of a run its manifest, which vouches for the others.
    pub fn files(&self) -> Vec<PathBuf> {
        let of = |c: &Checkpoint| c.files().iter().map(|f| f.path().to_owned()).collect::<Vec<_>>();
        match self {
            Opened::Checkpoints { base, tuned, .. } => [of(base), of(tuned)].concat(),
            Opened::Adapter { adapter, .. } => {
                vec![adapter.path().join(CONFIG_NAME), adapter.file().path().to_owned()]
            }
            Opened::Run { run, .. } => vec![RunDir(run.path().to_owned()).manifest_path()],
        }
    }

    /// Adds this source's matrices to `jobs`, and what is none to `skipped`.
    pub fn plan<'a>(&'a self, options: &Options, jobs: &mut Vec<Job<'a>>, skipped: &mut Vec<Skipped>) -> Result<()> {
        let filter = Filter::new(&options.filter)?;
        match self {
            Opened::Checkpoints { label, base, tuned } => {
                pair::plan(label, base, tuned, &filter, options, jobs, skipped)
            }
            Opened::Adapter { label, adapter } => lowrank::plan_adapter(label, adapter, &filter, jobs, skipped),
            Opened::Run { label, run } => run.plan(label, &filter, jobs, skipped),
        }
    }
}
