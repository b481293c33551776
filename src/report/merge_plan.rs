//! `merge --dry-run`: what would change, where each tensor would go, and how long it would take.

use super::{spectrum::plural, table::Table, units};
use crate::merge::{Action, Estimate, MergeReport, TensorResult};

/// Tensors that differ in the number of their layer only share a row; then one row per file.
pub(super) fn tables(report: &MergeReport) -> Vec<Table> {
    let header = ["tensors", "count", "action", "shape", "from", "to", "rank", "bytes before", "bytes after"];
    let mut groups: Vec<(String, Vec<&TensorResult>)> = Vec::new();
    for t in &report.tensors {
        let kind = pattern(&t.name);
        match groups.iter_mut().find(|(k, group)| *k == kind && alike(group[0], t)) {
            Some((_, group)) => group.push(t),
            None => groups.push((kind, vec![t])),
        }
    }
    let mut kinds = Table::new("Planned changes; nothing was written", &header);
    for (kind, group) in &groups {
        let first = group[0];
        let name = if group.len() == 1 { &first.name } else { kind };
        let sum = |bytes: fn(&TensorResult) -> u64| units::bytes(group.iter().map(|t| bytes(t)).sum());
        kinds.row(vec![
            name.clone(),
            group.len().to_string(),
            action(first.action).into(),
            format!("{:?}", first.shape),
            format!("{:?}", first.base_dtype),
            format!("{:?}", first.dtype),
            rank(first),
            sum(|t| t.base_bytes),
            sum(|t| t.bytes),
        ]);
    }
    let mut files = Table::new("Files", &["file", "tensors", "changed", "bytes"]);
    for f in &report.files {
        files.row(vec![f.name.clone(), f.tensors.to_string(), f.changed.to_string(), units::bytes(f.bytes)]);
    }
    vec![kinds, files]
}

/// One row per tensor, for programs.
pub(super) fn per_tensor(report: &MergeReport) -> Table {
    let header = ["tensor", "action", "shape", "from", "to", "rank", "bytes_before", "bytes_after", "file"];
    let mut table = Table::new("", &header);
    for t in &report.tensors {
        table.row(vec![
            t.name.clone(),
            action(t.action).into(),
            format!("{:?}", t.shape),
            format!("{:?}", t.base_dtype),
            format!("{:?}", t.dtype),
            rank(t),
            t.base_bytes.to_string(),
            t.bytes.to_string(),
            t.file.clone(),
        ]);
    }
    table
}

/// The estimate as a sentence.
pub(super) fn estimate(e: &Estimate) -> String {
    let (read, written) = (units::bytes(e.bytes_read), units::bytes(e.bytes_written));
    let threads = plural(e.threads, "thread");
    // Below that, starting and stopping take longer than the work.
    let seconds = if e.seconds < 0.1 { "less than 0.1".to_owned() } else { format!("about {:.1}", e.seconds) };
    format!(
        "reads {read}, writes {written}: {seconds} s with {threads} if the base is in memory and the disk keeps up \
         (measured on a few blocks)"
    )
}

/// What happens to a tensor, in one word.
pub(super) fn action(action: Action) -> &'static str {
    match action {
        Action::Merged => "merged",
        Action::Replaced => "replaced",
        Action::Added => "added",
        Action::Recast => "recast",
        Action::Copied => "copied",
    }
}

fn rank(t: &TensorResult) -> String {
    if t.rank > 0 { t.rank.to_string() } else { String::new() }
}

fn alike(a: &TensorResult, b: &TensorResult) -> bool {
    (a.action, &a.shape, a.base_dtype, a.dtype, a.rank) == (b.action, &b.shape, b.base_dtype, b.dtype, b.rank)
}

/// `model.layers.*.mlp.up_proj.weight` for every layer.
fn pattern(name: &str) -> String {
    let number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    name.split('.').map(|part| if number(part) { "*" } else { part }).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_become_stars() {
        assert_eq!(pattern("model.layers.12.mlp.experts.0.w1.weight"), "model.layers.*.mlp.experts.*.w1.weight");
        assert_eq!(pattern("h.0a..1"), "h.0a..*");
    }
}
