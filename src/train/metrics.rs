//! `metrics.jsonl`: one object per update, one per evaluation; cut back to the checkpoint when a run resumes. The same
//! numbers go into `tensorboard/`.

use super::tensorboard::EventFile;
use crate::{
    error::{Error, Result},
    staged,
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

/// One update.
#[derive(Clone, Debug, Serialize)]
pub struct UpdateRow {
    /// Updates made, this one included.
    pub step: u64,
    /// Mean loss of the batch before the update.
    pub loss: f64,
    /// Learning rate used.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens seen so far.
    pub tokens: u64,
    /// Tokens per second of this update.
    pub tokens_per_s: f64,
    /// On a GPU: the share of the update's time in which the host waited for it at the update's end. Where this is near 0, the GPU
    /// waits for the host, or both for MPI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_wait: Option<f64>,
    /// Cycle this update belongs to, from 1; 0 in the warm start.
    pub cycle: u64,
    /// Restarts before this update.
    pub restarts: u64,
    /// Present and true if loss or gradient were not finite and the weights stayed as they were.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
}

/// One evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRow {
    /// Updates made.
    pub step: u64,
    /// Mean loss over the validation windows.
    pub eval_loss: f64,
    /// `exp(eval_loss)`.
    pub perplexity: f64,
    /// Predictions that the mean is over.
    pub eval_tokens: u64,
}

/// One merge into weights that are rounded.
#[derive(Clone, Debug, Serialize)]
pub struct MergeRow {
    /// Updates made.
    pub step: u64,
    /// The cycle that ended.
    pub merged_cycle: u64,
    /// `<dW, round(W + dW) - W> / |dW|²` over all merged weights.
    pub retention: f64,
}

/// The open files.
pub struct Metrics {
    path: PathBuf,
    file: File,
    events: EventFile,
    last_evaluation: Option<EvalRow>,
}

/// A row of the file.
pub trait Row: Serialize {
    /// What TensorBoard shows its numbers under.
    const GROUP: &str;
    /// Updates made.
    fn step(&self) -> u64;
}

impl Row for UpdateRow {
    const GROUP: &str = "train";
    fn step(&self) -> u64 {
        self.step
    }
}

impl Row for MergeRow {
    const GROUP: &str = "merge";
    fn step(&self) -> u64 {
        self.step
    }
}

impl Row for EvalRow {
    const GROUP: &str = "eval";
    fn step(&self) -> u64 {
        self.step
    }
}

impl Metrics {
    /// Opens `path` for appending, after dropping every row beyond `step` (and half a row that a crash left).
    pub fn open(path: &Path, step: u64) -> Result<Metrics> {
        #[derive(Deserialize)]
        struct Row {
            step: u64,
        }
        let old = match fs::read(path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(Error::io("read", path, e)),
        };
        let kept: String = old
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n') && serde_json::from_str::<Row>(line).is_ok_and(|r| r.step <= step))
            .collect();
        let last_evaluation = kept.lines().rev().find_map(|line| serde_json::from_str::<EvalRow>(line).ok());
        staged::write_own(path, kept.as_bytes())?;
        let file = File::options().append(true).open(path).map_err(|e| Error::io("open", path, e))?;
        let events = EventFile::create(&path.with_file_name("tensorboard"), step)?;
        Ok(Metrics { path: path.to_owned(), file, events, last_evaluation })
    }

    /// The evaluation after `step` updates that the file held when it was opened.
    pub fn evaluation_at(&self, step: u64) -> Option<EvalRow> {
        self.last_evaluation.filter(|row| row.step == step)
    }

    /// Appends one row.
    pub fn write<R: Row>(&mut self, row: &R) -> Result<()> {
        let value = serde_json::to_value(row).map_err(|e| Error::environment(e.to_string()))?;
        let line = format!("{value}\n");
        self.file.write_all(line.as_bytes()).map_err(|e| Error::io("write", &self.path, e))?;
        let numbers = value.as_object().into_iter().flatten().filter(|(key, _)| *key != "step");
        let scalars: Vec<(String, f64)> =
            numbers.filter_map(|(key, value)| Some((format!("{}/{key}", R::GROUP), value.as_f64()?))).collect();
        self.events.scalars(row.step(), &scalars)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_after_the_checkpoint_and_torn_rows_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"ste").unwrap();
        let mut metrics = Metrics::open(&path, 2).unwrap();
        assert_eq!(metrics.evaluation_at(2), None);
        metrics.write(&EvalRow { step: 3, eval_loss: 0.5, perplexity: 2.0, eval_tokens: 7 }).unwrap();
        let third = "{\"step\":3,\"eval_loss\":0.5,\"perplexity\":2.0,\"eval_tokens\":7}";
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{{\"step\":1}}\n{{\"step\":2}}\n{third}\n"));
        let evaluation = |step| Metrics::open(&path, 3).unwrap().evaluation_at(step);
        assert_eq!((evaluation(2), evaluation(3).map(|row| row.eval_tokens)), (None, Some(7)));
        assert_eq!(fs::read_dir(dir.path().join("tensorboard")).unwrap().count(), 1);
    }
}
