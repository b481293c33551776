//! What gates and filters are about: refuses those about nothing, and judges the others on all that they name.

use super::{
    Gate, GateResult, Matrix, Options, Skipped, Source,
    gates::Candidate,
    noise::known::{Origin, Roundings},
    task::Task,
    totals,
};
use crate::{
    checkpoint::Filter,
    error::{Error, Result},
};

/// A weight that gates may be about, before it is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Covered<'a> {
    pub label: &'a str,
    pub name: &'a str,
    /// Whether it has an adapter's rank to compare with.
    pub ranked: bool,
}

impl<'a> Covered<'a> {
    pub fn by_task(task: &'a Task) -> Covered<'a> {
        Covered { label: &task.label, name: &task.name, ranked: task.r.is_some() }
    }
}

/// Every glob of `--filter` must match a tensor: a misspelt one would let gates hold on less than they name.
pub(super) fn check_filters(options: &Options, tasks: &[Task], skipped: &[Skipped]) -> Result<()> {
    for glob in &options.filter {
        let filter = Filter::new(std::slice::from_ref(glob))?;
        let mut names = tasks.iter().map(|t| t.name.as_str()).chain(skipped.iter().map(|s| s.name.as_str()));
        if !names.any(|name| filter.takes(name)) {
            return Err(Error::request(format!(
                "there is no matrix to measure: --filter '{glob}' matches no tensor of any source"
            ))
            .help("it matches whole tensor names, and * any characters: --filter '*self_attn*'"));
        }
    }
    Ok(())
}

/// A source without anything to measure is refused, with the reasons.
pub(super) fn check_not_empty(label: &str, options: &Options, tasks: &[Task], skipped: &[Skipped]) -> Result<()> {
    if tasks.iter().any(|task| task.label == label) {
        return Ok(());
    }
    let own: Vec<&Skipped> = skipped.iter().filter(|s| s.label == label).collect();
    let why = match own.first() {
        None => String::new(),
        Some(first) => format!(": {} are left out, first '{}', since {}", own.len(), first.name, first.detail),
    };
    let error = Error::request(format!("there is no matrix to measure in source '{label}'{why}"));
    match (options.filter.is_empty(), own.is_empty()) {
        (false, _) => Err(error.help("--filter may be too narrow: it matches whole tensor names")),
        (true, true) => Err(error),
        (true, false) => Err(error.help("matrices of F64, F32, F16 and BF16 can be measured")),
    }
}

/// A gate on the noise edge needs to know how often the weights were rounded.
pub(super) fn check_roundings(gates: &[Gate], label: &str, roundings: Option<&Roundings>) -> Result<()> {
    if roundings.is_none_or(|r| r.origin != Origin::Assumed) {
        return Ok(());
    }
    match gates.iter().find(|gate| gate.needs_noise_edge()) {
        None => Ok(()),
        Some(gate) => Err(Error::request(format!(
            "gate '{}' depends on how often the weights of '{label}' were rounded since its base, which neither their \
             metadata nor a manifest says",
            gate.text
        ))
        .help("pass --roundings K: 1 for one stored merge, 2 if base and tuned were each rounded from other weights, 0 for exact storage")),
    }
}

/// Every gate must be about at least one weight of each source, and know its rank if it compares with it.
pub(super) fn check_gates<'a>(
    gates: &[Gate],
    labels: impl Iterator<Item = &'a str> + Clone,
    all: &[Covered],
    skipped: &[Skipped],
) -> Result<()> {
    for gate in gates {
        for label in labels.clone() {
            let mut covered = all.iter().filter(|c| c.label == label && gate.covers(c.name)).peekable();
            if covered.peek().is_none() && !skipped.iter().any(|s| s.label == label && gate.names(s)) {
                return Err(gate.no_match(label));
            }
            if gate.needs_rank() && covered.any(|c| !c.ranked) {
                return Err(gate.no_rank(label));
            }
        }
    }
    Ok(())
}

/// The verdict of every gate on every source.
pub(super) fn judge(
    gates: &[Gate],
    sources: &[Source],
    matrices: &[Matrix],
    skipped: &[Skipped],
) -> Result<Vec<GateResult>> {
    let mut results = Vec::new();
    for gate in gates {
        for label in sources.iter().map(|s| s.label.as_str()) {
            let of_label = totals(sources, matrices).filter(|m| m.label == label);
            let candidates: Vec<Candidate> =
                of_label.map(|m| Candidate { name: &m.name, r: m.r, measures: &m.measures }).collect();
            let unmeasured: Vec<&str> =
                skipped.iter().filter(|s| s.label == label && gate.names(s)).map(|s| s.name.as_str()).collect();
            results.push(gate.judge(label, &candidates, &unmeasured)?);
        }
    }
    Ok(results)
}
