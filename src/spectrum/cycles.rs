//! How the rank of a run's update grows, cycle by cycle.

use super::{Matrix, groups::Range};
use serde::{Deserialize, Serialize};

/// One cycle of a run, over all its matrices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CycleSummary {
    /// Source.
    pub label: String,
    /// From 1.
    pub cycle: u64,
    /// Matrices that the cycle trained.
    pub matrices: usize,
    /// Rank of A and B in this cycle.
    pub r: Range,
    /// Sum of r over the cycles up to this one: what the rank of the sum cannot exceed.
    pub sum_of_r: Range,
    /// `min(m, n)`: what no rank can exceed.
    pub full_rank: Range,
    /// `rank_above_noise` of the cycle alone.
    pub own_rank: Range,
    /// `rank_above_noise` of the sum of the cycles up to this one.
    pub rank_above_noise: Range,
    /// `effective_rank` of that sum; absent where it is zero everywhere.
    pub effective_rank: Option<Range>,
}

/// Summaries in the order of sources and cycles.
pub fn summarise(matrices: &[Matrix]) -> Vec<CycleSummary> {
    let mut keys: Vec<(&str, u64)> = Vec::new();
    for m in matrices {
        if let Some(cycle) = m.cycle.filter(|&c| !keys.contains(&(&m.label, c))) {
            keys.push((&m.label, cycle));
        }
    }
    keys.into_iter().filter_map(|(label, cycle)| summary(matrices, label, cycle)).collect()
}

fn summary(matrices: &[Matrix], label: &str, cycle: u64) -> Option<CycleSummary> {
    let of = |cumulative| {
        let wanted = move |m: &&Matrix| m.label == label && m.cycle == Some(cycle) && m.cumulative == Some(cumulative);
        matrices.iter().filter(wanted)
    };
    let sum_of_r = |m: &Matrix| {
        let same = |o: &&Matrix| o.label == label && o.name == m.name && o.cumulative == Some(false);
        let earlier = matrices.iter().filter(same).filter(|o| o.cycle <= Some(cycle));
        earlier.filter_map(|o| o.r).sum::<usize>() as f64
    };
    Some(CycleSummary {
        label: label.to_owned(),
        cycle,
        matrices: of(true).count(),
        r: Range::of(of(false).filter_map(|m| m.r).map(|r| r as f64))?,
        sum_of_r: Range::of(of(true).map(sum_of_r))?,
        full_rank: Range::of(of(true).map(|m| m.shape[0].min(m.shape[1]) as f64))?,
        own_rank: Range::of(of(false).map(|m| m.measures.rank_above_noise as f64))?,
        rank_above_noise: Range::of(of(true).map(|m| m.measures.rank_above_noise as f64))?,
        effective_rank: Range::of(of(true).filter_map(|m| m.measures.effective_rank)),
    })
}
