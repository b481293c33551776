//! Work divided over the jobs of an array: which pieces belong to which job follows from their costs alone, so that jobs
//! that never talk to each other agree, and their parts are joined only if they belong together.

use crate::{
    error::{Error, Result},
    inputs,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashSet},
    fmt,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    str::FromStr,
};

/// One part of a job that is divided over an array, written `i/n`: the i-th of n, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArrayTask {
    /// From 1.
    pub index: usize,
    /// How many parts there are.
    pub count: usize,
}

impl ArrayTask {
    /// For each piece of these costs, whether it belongs to this part.
    pub fn owns(self, costs: &[f64]) -> Vec<bool> {
        partition(costs, self.count).into_iter().map(|part| part + 1 == self.index).collect()
    }
}

impl FromStr for ArrayTask {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match parsed {
            Some((index, count)) if (1..=count).contains(&index) => Ok(ArrayTask { index, count }),
            _ => Err(Error::request(format!("'{text}' names no part: expected I/N with I from 1 to N, as in 3/8"))),
        }
    }
}

impl fmt::Display for ArrayTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

/// Divides pieces among `count` owners and returns the owner of each, from 0: the costliest first, each to the owner that
/// has least so far (Graham 1969: the largest load is at most 4/3 of the best possible). Ties go to the earlier piece and
/// the earlier owner.
pub fn partition(costs: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|&a, &b| costs[b].total_cmp(&costs[a]).then(a.cmp(&b)));
    assign(order, costs, count)
}

/// The owner, from 0, of each piece: in the given `order`, each goes to the owner that has least so far, the earlier one
/// of two. Pieces that are not in `order` count for nothing and belong to owner 0.
pub fn assign(order: impl IntoIterator<Item = usize>, costs: &[f64], count: usize) -> Vec<usize> {
    // The least loaded owner on top; `Load` orders by load, then by number.
    let mut loads: BinaryHeap<Reverse<Load>> =
        (0..count.min(costs.len())).map(|owner| Reverse(Load { cost: 0.0, owner })).collect();
    let mut owners = vec![0; costs.len()];
    for piece in order {
        let Some(mut least) = loads.peek_mut() else { break };
        owners[piece] = least.0.owner;
        least.0.cost += costs[piece];
    }
    owners
}

struct Load {
    cost: f64,
    owner: usize,
}

impl Ord for Load {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.cost.total_cmp(&other.cost).then(self.owner.cmp(&other.owner))
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

/// What all parts of one job have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// The program and its version.
    pub tool: String,
    /// Option, as on the command line -> value.
    pub options: BTreeMap<String, Value>,
    /// The files the result depends on, each with a [`digest`].
    #[serde(serialize_with = "crate::escape::lossy_pairs")]
    pub inputs: Vec<(PathBuf, String)>,
}

/// The first thing in which two parts differ.
pub struct Discrepancy {
    /// What differs, as a noun.
    pub what: String,
    /// In the one part.
    pub one: String,
    /// In the other.
    pub other: String,
}

impl Identity {
    /// Of a job of this program with these options over these files, each of which counts once.
    pub fn new(options: BTreeMap<String, Value>, files: impl IntoIterator<Item = PathBuf>) -> Result<Identity> {
        let mut seen = HashSet::new();
        let once = files.into_iter().filter(|file| seen.insert(file.clone()));
        let inputs = once.map(|file| digest(&file).map(|digest| (file, digest))).collect::<Result<_>>()?;
        Ok(Identity { tool: concat!("relora-kit ", env!("CARGO_PKG_VERSION")).to_owned(), options, inputs })
    }

    /// The first difference between the jobs of two parts, if there is one.
    pub fn difference(&self, other: &Identity) -> Option<Discrepancy> {
        let differs = |what: &str, one: String, other: String| Some(Discrepancy { what: what.to_owned(), one, other });
        let shown = |value: Option<&Value>| match value {
            None => "absent".to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
        };
        for key in self.options.keys().chain(other.options.keys()) {
            let (a, b) = (self.options.get(key), other.options.get(key));
            if a != b {
                return differs(key, shown(a), shown(b));
            }
        }
        if self.tool != other.tool {
            return differs("the program", self.tool.clone(), other.tool.clone());
        }
        if self.inputs.len() != other.inputs.len() {
            let counts = (self.inputs.len().to_string(), other.inputs.len().to_string());
            return differs("the number of input files", counts.0, counts.1);
        }
        let (one, two) = self.inputs.iter().zip(&other.inputs).find(|(one, two)| one != two)?;
        let words = |(path, digest): &(PathBuf, String)| {
            format!("'{}' ({})", path.display(), digest.get(..12).unwrap_or(digest))
        };
        differs("the content of an input file", words(one), words(two))
    }
}

/// Names the parts of `count` that are not among `found`, ten at most: `2 of 8 parts are missing: 3/8, 5/8`. `None` if all
/// are there.
pub fn missing(found: &[usize], count: usize) -> Option<String> {
    let found: HashSet<usize> = found.iter().copied().collect();
    // Not a list of all that are missing: a damaged part may claim any count.
    let number = count.saturating_sub(found.iter().filter(|index| (1..=count).contains(*index)).count());
    let first = (1..=count).filter(|index| !found.contains(index)).take(10);
    let shown: Vec<String> = first.map(|index| ArrayTask { index, count }.to_string()).collect();
    let more = if number > shown.len() { format!(" and {} more", number - shown.len()) } else { String::new() };
    (number > 0).then(|| format!("{number} of {count} parts are missing: {}{more}", shown.join(", ")))
}

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
    fn a_part_is_read_from_one_to_n() {
        assert_eq!("3/8".parse::<ArrayTask>().unwrap(), ArrayTask { index: 3, count: 8 });
        for wrong in ["0/8", "9/8", "8", "a/b", "1/0", "-1/2", "1/2/3", ""] {
            assert!(wrong.parse::<ArrayTask>().unwrap_err().message.contains("I/N"), "{wrong}");
        }
    }

    #[test]
    fn the_costliest_go_first_and_to_the_least_loaded() {
        assert_eq!(partition(&[1.0, 5.0, 3.0, 3.0], 2), [0, 0, 1, 1]);
        assert_eq!(partition(&[2.0; 5], 3), [0, 1, 2, 0, 1]);
        assert_eq!(partition(&[7.0, 7.0], 5), [0, 1]);
        assert!(partition(&[], 3).is_empty());
    }

    #[test]
    fn every_piece_has_one_owner_and_no_load_exceeds_the_mean_by_more_than_a_piece() {
        let costs: Vec<f64> = (0..97).map(|i| ((i * 37) % 11 + 1) as f64).collect();
        for count in [1, 2, 3, 7, 200] {
            let parts: Vec<Vec<bool>> = (1..=count).map(|index| ArrayTask { index, count }.owns(&costs)).collect();
            for piece in 0..costs.len() {
                assert_eq!(parts.iter().filter(|own| own[piece]).count(), 1);
            }
            let fair = costs.iter().sum::<f64>() / count as f64;
            for own in &parts {
                let load: f64 = costs.iter().zip(own).filter(|(_, own)| **own).map(|(c, _)| c).sum();
                assert!(load <= fair + 11.0, "{load} of {fair}");
            }
        }
    }

    #[test]
    fn missing_parts_are_named() {
        assert_eq!(missing(&[1, 2, 3], 3), None);
        assert_eq!(missing(&[2, 2], 4).unwrap(), "3 of 4 parts are missing: 1/4, 3/4, 4/4");
        assert!(missing(&[1], 1_000_000_000_000).unwrap().ends_with("11/1000000000000 and 999999999989 more"));
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
