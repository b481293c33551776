//! Sources of updates: opens them, checks that they fit, and lists the weights to measure.

mod adapter;
mod checkpoints;
mod run;

use super::{
    Options, Skipped, Source,
    noise::known::{History, Roundings},
    task::Task,
};
use crate::{
    adapter::{Adapter, config::CONFIG_NAME},
    checkpoint::{Checkpoint, Filter},
    error::Result,
    run::{RunDir, sha256_file},
};
use run::OpenRun;
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

/// One source, by its paths.
#[derive(Clone, Debug)]
pub enum SourceSpec {
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

impl SourceSpec {
    /// The label of its results.
    pub fn label(&self) -> &str {
        match self {
            SourceSpec::Checkpoints { tuned, .. } => &tuned.label,
            SourceSpec::Adapter(source) | SourceSpec::Run(source) => &source.label,
        }
    }
}

/// A source whose files are mapped.
pub(super) enum OpenSource {
    Checkpoints { label: String, base: Checkpoint, tuned: Checkpoint, history: Box<History> },
    Adapter { label: String, adapter: Box<Adapter> },
    Run { label: String, run: Box<OpenRun> },
}

impl OpenSource {
    /// `roundings`: the number of roundings between two checkpoints, if the command line names one.
    pub fn open(spec: &SourceSpec, roundings: Option<u64>) -> Result<OpenSource> {
        let label = spec.label().to_owned();
        Ok(match spec {
            SourceSpec::Checkpoints { base, tuned } => {
                let (base, tuned) = (Checkpoint::open(base)?, Checkpoint::open(&tuned.path)?);
                let history = Box::new(History::between(&base, &tuned, roundings)?);
                OpenSource::Checkpoints { label, base, tuned, history }
            }
            SourceSpec::Adapter(source) => {
                OpenSource::Adapter { label, adapter: Box::new(Adapter::open(&source.path)?) }
            }
            SourceSpec::Run(source) => OpenSource::Run { label, run: Box::new(OpenRun::open(&source.path)?) },
        })
    }

    /// What this source is, with the sha256 of the files that `hashed` takes.
    pub fn describe(&self, hashed: impl Fn(&Path) -> bool) -> Result<Source> {
        let (label, kind, base, path) = match self {
            OpenSource::Checkpoints { label, base, tuned, .. } => {
                (label, "checkpoints", Some(base.path()), tuned.path())
            }
            OpenSource::Adapter { label, adapter } => (label, "adapter", None, adapter.path()),
            OpenSource::Run { label, run } => (label, "run", None, run.path()),
        };
        let cycles = if let OpenSource::Run { run, .. } = self { Some(run.cycles()) } else { None };
        let mut files = BTreeMap::new();
        for file in self.files().into_iter().filter(|file| hashed(file)) {
            let hash = sha256_file(&file)?;
            files.insert(file.display().to_string(), hash);
        }
        let (base, path) = (base.map(Path::to_owned), path.to_owned());
        Ok(Source { label: label.clone(), kind: kind.into(), base, path, cycles, files, roundings: self.roundings() })
    }

    /// The history of its roundings; `None` for an adapter, which is not rounded into a weight.
    pub fn history(&self) -> Option<&History> {
        match self {
            OpenSource::Checkpoints { history, .. } => Some(history),
            OpenSource::Adapter { .. } => None,
            OpenSource::Run { run, .. } => Some(run.history()),
        }
    }

    /// How often it was rounded, for the report.
    pub fn roundings(&self) -> Option<Roundings> {
        self.history().map(History::summary)
    }

    /// The name of its results.
    pub fn label(&self) -> &str {
        match self {
            OpenSource::Checkpoints { label, .. }
            | OpenSource::Adapter { label, .. }
            | OpenSource::Run { label, .. } => label,
        }
    }

    /// The files the result depends on; of a run its manifest, which vouches for the others.
    pub fn files(&self) -> Vec<PathBuf> {
        let of = |c: &Checkpoint| c.files().iter().map(|f| f.path().to_owned()).collect::<Vec<_>>();
        match self {
            OpenSource::Checkpoints { base, tuned, .. } => [of(base), of(tuned)].concat(),
            OpenSource::Adapter { adapter, .. } => {
                vec![adapter.path().join(CONFIG_NAME), adapter.file().path().to_owned()]
            }
            OpenSource::Run { run, .. } => vec![RunDir(run.path().to_owned()).manifest_path()],
        }
    }

    /// Adds this source's weights to `tasks`, and what is not measured to `skipped`.
    pub fn list<'a>(&'a self, options: &Options, tasks: &mut Vec<Task<'a>>, skipped: &mut Vec<Skipped>) -> Result<()> {
        let filter = Filter::new(&options.filter)?;
        match self {
            OpenSource::Checkpoints { label, base, tuned, history } => {
                checkpoints::list(label, (base, tuned), history, &filter, options, tasks, skipped)
            }
            OpenSource::Adapter { label, adapter } => adapter::list(label, adapter, &filter, tasks, skipped),
            OpenSource::Run { label, run } => run.list(label, &filter, tasks, skipped),
        }
    }
}
