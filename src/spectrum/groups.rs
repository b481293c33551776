//! Summaries per module kind.

use super::{
    Matrix,
    measures::{METRICS, Metric},
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// All matrices of one module kind in one source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Source.
    pub label: String,
    /// `q_proj`, `down_proj`, ...
    pub module: String,
    /// How many matrices.
    pub matrices: usize,
    /// Metric -> its range over those matrices; metrics that are undefined for all of them are left out.
    pub metrics: BTreeMap<String, Range>,
}

/// Smallest, middle and largest value.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Range {
    /// Smallest.
    pub min: f64,
    /// Middle; the mean of the two middle ones for an even count.
    pub median: f64,
    /// Largest.
    pub max: f64,
}

impl Range {
    /// The range of some values; `None` if there are none.
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Range> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let n = values.len();
        let (min, max) = (*values.first()?, *values.last()?);
        Some(Range { min, median: (values[(n - 1) / 2] + values[n / 2]) / 2.0, max })
    }
}

/// Groups in the order in which their first matrices come.
pub fn groups<'a>(matrices: impl Iterator<Item = &'a Matrix>) -> Vec<Group> {
    let mut members: Vec<Vec<&Matrix>> = Vec::new();
    for matrix in matrices {
        match members.iter_mut().find(|g| g[0].label == matrix.label && g[0].module == matrix.module) {
            Some(group) => group.push(matrix),
            None => members.push(vec![matrix]),
        }
    }
    let summarise = |group: Vec<&Matrix>| {
        let range = |metric: &Metric| Range::of(group.iter().filter_map(|m| m.measures.get(metric)));
        Group {
            label: group[0].label.clone(),
            module: group[0].module.clone(),
            matrices: group.len(),
            metrics: METRICS.iter().filter_map(|m| Some((m.name.to_owned(), range(m)?))).collect(),
        }
    };
    members.into_iter().map(summarise).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_the_usual_median() {
        assert_eq!(Range::of([4.0, 1.0, 2.0].into_iter()), Some(Range { min: 1.0, median: 2.0, max: 4.0 }));
        assert_eq!(Range::of([4.0, 1.0].into_iter()).unwrap().median, 2.5);
        assert_eq!(Range::of(std::iter::empty()), None);
    }
}
