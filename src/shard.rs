//! Work shared out over the jobs of an array: which pieces are whose follows from their costs alone, so that jobs that
//! never talk to each other agree.

use crate::{
    error::{Error, Result},
    inputs,
};
use sha2::{Digest, Sha256};
use std::{cmp::Reverse, fmt, os::unix::fs::FileExt, path::Path, str::FromStr};

/// One job of several, written `i/n`: the i-th of n, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 1.
    pub index: usize,
    /// How many jobs there are.
    pub count: usize,
}

impl Shard {
    /// For each piece, whether it is this job's.
    pub fn own(self, costs: &[f64]) -> Vec<bool> {
        split(costs, self.count).into_iter().map(|job| job + 1 == self.index).collect()
    }
}

impl FromStr for Shard {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match parsed {
            Some((index, count)) if (1..=count).contains(&index) => Ok(Shard { index, count }),
            _ => Err(Error::request(format!("'{text}' is no shard: expected I/N with I from 1 to N, as in 3/8"))),
        }
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

/// Shares pieces out over `count` jobs and returns the job of each, from 0: the costliest first, each to the job that has
/// least so far (Graham 1969: the longest job takes at most 4/3 of the best possible). Ties go to the earlier piece and
/// the earlier job.
pub fn split(costs: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|&a, &b| costs[b].total_cmp(&costs[a]).then(a.cmp(&b)));
    // The least loaded job on top; `Load` orders by load, then by number.
    let mut jobs: std::collections::BinaryHeap<Reverse<Load>> =
        (0..count.min(costs.len())).map(|job| Reverse(Load { cost: 0.0, job })).collect();
    let mut owners = vec![0; costs.len()];
    for piece in order {
        let Some(mut least) = jobs.peek_mut() else { break };
        owners[piece] = least.0.job;
        least.0.cost += costs[piece];
    }
    owners
}

struct Load {
    cost: f64,
    job: usize,
}

impl Ord for Load {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.cost.total_cmp(&other.cost).then(self.job.cmp(&other.job))
    }
}

impl PartialOrd for Load {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Load {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Load {}

/// Bytes of one sample, and how many samples are taken of a file.
const SAMPLE: u64 = 16 << 10;
const SAMPLES: u64 = 32;

/// sha256 of a file's length and of samples spread over it: training changes every weight, so that another state of the
/// same checkpoint shows without reading it all.
pub fn digest(path: &Path) -> Result<String> {
    let read = |e| Error::io("read", path, e);
    let file = inputs::open(path)?;
    let len = file.metadata().map_err(read)?.len();
    let mut hasher = Sha256::new_with_prefix(len.to_le_bytes());
    let mut sample = |from: u64, to: u64| {
        let mut bytes = vec![0; (to - from) as usize];
        file.read_exact_at(&mut bytes, from).map_err(read)?;
        hasher.update(&bytes);
        Ok(())
    };
    if len <= SAMPLE * SAMPLES {
        sample(0, len)?;
    } else {
        let step = (len - SAMPLE) / (SAMPLES - 1);
        (0..SAMPLES).try_for_each(|i| sample(i * step, i * step + SAMPLE))?;
    }
    Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_is_read_from_one_to_n() {
        assert_eq!("3/8".parse::<Shard>().unwrap(), Shard { index: 3, count: 8 });
        for wrong in ["0/8", "9/8", "8", "a/b", "1/0", "-1/2", "1/2/3", ""] {
            assert!(wrong.parse::<Shard>().unwrap_err().message.contains("I/N"), "{wrong}");
        }
    }

    #[test]
    fn the_costliest_go_first_and_to_the_least_loaded() {
        assert_eq!(split(&[1.0, 5.0, 3.0, 3.0], 2), [0, 0, 1, 1]);
        assert_eq!(split(&[2.0; 5], 3), [0, 1, 2, 0, 1]);
        assert_eq!(split(&[7.0, 7.0], 5), [0, 1]);
        assert!(split(&[], 3).is_empty());
    }

    #[test]
    fn every_piece_is_exactly_one_jobs_and_no_job_exceeds_its_share_by_a_piece() {
        let costs: Vec<f64> = (0..97).map(|i| ((i * 37) % 11 + 1) as f64).collect();
        for count in [1, 2, 3, 7, 200] {
            let shards: Vec<Vec<bool>> = (1..=count).map(|index| Shard { index, count }.own(&costs)).collect();
            for piece in 0..costs.len() {
                assert_eq!(shards.iter().filter(|own| own[piece]).count(), 1);
            }
            let fair = costs.iter().sum::<f64>() / count as f64;
            for own in &shards {
                let load: f64 = costs.iter().zip(own).filter(|(_, own)| **own).map(|(c, _)| c).sum();
                assert!(load <= fair + 11.0, "{load} of {fair}");
            }
        }
    }

    #[test]
    fn the_digest_of_a_large_file_sees_its_length_and_changes_all_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| ((i * 31) >> 3) as u8).collect();
        let of = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            digest(&path).unwrap()
        };
        let whole = of(&bytes);
        assert_eq!(whole, of(&bytes));
        assert_ne!(whole, of(&bytes[..2_999_999]));
        let trained: Vec<u8> = bytes.iter().enumerate().map(|(i, b)| if i > 2_900_000 { b ^ 1 } else { *b }).collect();
        assert_ne!(whole, of(&trained));
        assert_ne!(of(b"short"), of(b"shorT"));
    }
}
