//! How often, and how, the weights of a checkpoint were rounded since which other checkpoint: what our own outputs say in
//! their metadata, under `roundings`, as a JSON list of [`Step`]s.
//!
//! Rounding leaves noise of full rank in the difference of two checkpoints. How large it may be depends on the number of
//! roundings, which the values themselves do not tell.

use super::{Checkpoint, Dtype, dtype};
use crate::{error::Result, job_array};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{collections::BTreeMap, path::PathBuf};

/// The key in `__metadata__`.
pub const KEY: &str = "roundings";

/// How a value becomes a number of the stored type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// To the nearest number: an error of variance `u^2 / 12`, u the distance between neighbours.
    Nearest,
    /// Up or down at random, unbiased: an error of mean variance `u^2 / 6`.
    Stochastic,
    /// To the nearest of 16 numbers times the scale of 64 neighbours (QLoRA, arXiv:2305.14314).
    Nf4,
    /// To the nearest of 255 numbers times the scale of the row (LLM.int8(), arXiv:2208.07339).
    Int8,
}

/// Weights that were changed and rounded `count` times, starting from another checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// [`fingerprint`] of the checkpoint it started from.
    pub base: String,
    /// How each value was rounded.
    pub kind: Kind,
    /// The type rounded to, `BF16` and so on, where it is coarser than that of the file; of several, the coarsest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// How often.
    pub count: u64,
    /// The last components of the names of the modules that this is about (`q_proj`); all modules if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub modules: Vec<String>,
    /// The seed of stochastic roundings. Two with the same seed draw the same numbers, so that their errors add up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// The updates of the other modules, which were trained in full: each rounded the weights to their stored type.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub updates: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Step {
    /// The type rounded to, if it is named.
    pub fn dtype(&self) -> Option<Dtype> {
        self.dtype.as_deref().and_then(dtype::parse_float)
    }
}

/// Identifies a checkpoint by samples of all its files, without reading them in full.
pub fn fingerprint(checkpoint: &Checkpoint) -> Result<String> {
    of_files(checkpoint.files().iter().map(|file| file.path().to_owned()))
}

/// The [`fingerprint`] of a checkpoint that consists of these files, in the order of their names.
pub fn of_files(files: impl Iterator<Item = PathBuf>) -> Result<String> {
    let mut hasher = Sha256::new();
    for file in files {
        hasher.update(job_array::digest(&file)?);
    }
    Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// What the files of `checkpoint` say, oldest step first; `None` if they say nothing, or not the same.
pub fn read(checkpoint: &Checkpoint) -> Option<Vec<Step>> {
    let mut texts = checkpoint.files().iter().map(|file| file.metadata().get(KEY));
    let first = texts.next()??;
    if texts.any(|text| text != Some(first)) {
        return None;
    }
    serde_json::from_str(first).ok()
}

/// The metadata of weights that `steps` made.
pub fn metadata(steps: &[Step]) -> BTreeMap<String, String> {
    let text = serde_json::to_string(steps).unwrap_or_default();
    BTreeMap::from([(KEY.to_owned(), text)])
}

/// The steps of an output whose weights are those of `base` changed and then rounded once to `dtype` (their stored type if
/// none is given), stochastically with `seed`: those of `base`, and one more.
pub fn after_merge(base: &Checkpoint, kind: Kind, seed: Option<u64>, dtype: Option<Dtype>) -> Result<Vec<Step>> {
    let mut steps = read(base).unwrap_or_default();
    let dtype = dtype.map(|dtype| format!("{dtype:?}"));
    steps.push(Step { base: fingerprint(base)?, kind, dtype, count: 1, modules: Vec::new(), updates: 0, seed });
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{TensorSpec, Writer};

    fn checkpoint(folder: &std::path::Path, value: u8, metadata: &BTreeMap<String, String>) -> Checkpoint {
        std::fs::create_dir(folder).unwrap();
        let spec = TensorSpec { name: "w".into(), dtype: Dtype::F32, shape: vec![1] };
        let writer = Writer::create(folder, &[spec], 1 << 20, metadata).unwrap();
        writer.write("w", 0, &[value; 4]).unwrap();
        writer.finish().unwrap();
        Checkpoint::open(folder).unwrap()
    }

    #[test]
    fn steps_pass_through_metadata_and_add_up() {
        let dir = tempfile::tempdir().unwrap();
        let first = checkpoint(&dir.path().join("a"), 1, &BTreeMap::new());
        assert_eq!(read(&first), None);
        let once = after_merge(&first, Kind::Stochastic, Some(3), Some(Dtype::BF16)).unwrap();
        let second = checkpoint(&dir.path().join("b"), 2, &metadata(&once));
        assert_eq!(read(&second).unwrap(), once);
        let twice = after_merge(&second, Kind::Nearest, None, None).unwrap();
        assert_eq!((&twice[0], twice.len(), twice[1].kind), (&once[0], 2, Kind::Nearest));
        assert_eq!((&twice[0].base, twice[0].dtype()), (&fingerprint(&first).unwrap(), Some(Dtype::BF16)));
        assert_ne!(twice[0].base, twice[1].base);
    }

    #[test]
    fn what_cannot_be_read_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let odd = BTreeMap::from([(KEY.to_owned(), "twice".to_owned())]);
        assert_eq!(read(&checkpoint(&dir.path().join("a"), 1, &odd)), None);
    }
}
