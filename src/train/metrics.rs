//! `metrics.jsonl`: one object per update, one per evaluation; cut back to the checkpoint when a run resumes.

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
    /// Cycle this update belongs to, from 1; 0 in the warm start.
    pub cycle: u64,
    /// Restarts before this update.
    pub restarts: u64,
    /// Present and true if loss or gradient were not finite and the weights stayed as they were.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
}

/// One evaluation.
#[derive(Clone, Debug, Serialize)]
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

/// The open file.
pub struct Metrics {
    path: PathBuf,
    file: File,
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
        staged::write_file(path, kept.as_bytes(), true)?;
        let file = File::options().append(true).open(path).map_err(|e| Error::io("open", path, e))?;
        Ok(Metrics { path: path.to_owned(), file })
    }

    /// Appends one row.
    pub fn write(&mut self, row: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_string(row).map_err(|e| Error::world(e.to_string()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|e| Error::io("write", &self.path, e))
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
        metrics.write(&serde_json::json!({"step": 3, "again": true})).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n{\"step\":3,\"again\":true}\n");
    }
}
