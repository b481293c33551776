//! `spectrum`: matrices, module kinds, gates.

use super::{Report, table::Table};
use crate::{
    checkpoint::roundings::Kind,
    spectrum::{
        Against, GateResult, Matrix, Reason, Source, Spectrum, groups::Range, measures::METRICS, noise::known::Origin,
    },
};
use serde::{Serialize, Serializer};
use std::collections::BTreeSet;

/// A spectrum as it is shown.
pub struct SpectrumReport<'a> {
    /// What was measured.
    pub spectrum: &'a Spectrum,
    /// Every metric as a column, all digits: for CSV.
    pub wide: bool,
}

impl Serialize for SpectrumReport<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.spectrum.serialize(serializer)
    }
}

impl Report for SpectrumReport<'_> {
    fn tables(&self) -> Vec<Table> {
        let s = self.spectrum;
        if self.wide {
            return vec![wide_table(&s.matrices)];
        }
        let mut tables = vec![matrix_table(s), group_table(s)];
        if !s.cycles.is_empty() {
            tables.push(cycle_table(s));
        }
        if let Some(against) = &s.against {
            tables.push(against_table(against, several_labels(s)));
        }
        if !s.gates.is_empty() {
            tables.push(gate_table(&s.gates));
        }
        tables
    }

    fn remarks(&self) -> Vec<String> {
        let mut remarks = skipped_remarks(self.spectrum);
        remarks.extend(self.spectrum.sources.iter().filter_map(roundings_remark));
        remarks.extend(device_remark(self.spectrum));
        remarks.extend(self.spectrum.against.iter().flat_map(against_remarks));
        remarks.extend(self.spectrum.gates.iter().filter(|g| !g.passed).map(offenders));
        if let Some(verdict) = verdict(&self.spectrum.gates) {
            remarks.push(verdict);
        }
        remarks
    }
}

/// How often the weights of a source were rounded, where that had to be assumed or matters for reading its ranks.
pub(super) fn roundings_remark(source: &Source) -> Option<String> {
    let roundings = source.roundings.as_ref()?;
    let kinds: Vec<&str> = roundings.kinds.iter().map(|kind| kind_words(*kind)).collect();
    let (label, count, kinds) = (&source.label, plural(roundings.count as usize, "rounding"), kinds.join(", then "));
    match roundings.origin {
        Origin::Assumed => Some(format!(
            "noise edge of '{label}': 1 rounding is assumed, since its files do not say how often it was rounded; pass --roundings K"
        )),
        Origin::Option => Some(format!("noise edge of '{label}': {count} {kinds} (--roundings)")),
        Origin::Metadata => Some(format!("noise edge of '{label}': {count} {kinds} (its metadata)")),
        Origin::Manifest => Some(format!("noise edge of '{label}': {count} {kinds} (the run's manifest)")),
    }
}

fn kind_words(kind: Kind) -> &'static str {
    match kind {
        Kind::Nearest => "to nearest",
        Kind::Stochastic => "at random (stochastic)",
        Kind::Nf4 => "to NF4",
        Kind::Int8 => "to int8",
    }
}

/// What a GPU computed, where one was named.
fn device_remark(s: &Spectrum) -> Option<String> {
    let asked = s.matrices.iter().filter(|m| m.device.is_some()).count();
    let gpus: BTreeSet<&str> = s.matrices.iter().filter_map(|m| m.device.as_deref()).filter(|d| *d != "cpu").collect();
    let taken = s.matrices.iter().filter(|m| m.device.as_deref().is_some_and(|d| d != "cpu")).count();
    let rest = match asked - taken {
        0 => "",
        _ => "; the others, small or of low rank or in need of the SVD, on the CPU",
    };
    let names = gpus.into_iter().collect::<Vec<_>>().join(", ");
    let taker = if names.is_empty() { "the GPU" } else { &names };
    (asked > 0).then(|| format!("singular values of {taken} of {asked} updates were computed on {taker}{rest}"))
}

fn wide_table(matrices: &[Matrix]) -> Table {
    let mut header = vec!["name", "label", "rows", "columns", "dtype", "module", "layer", "r", "cycle", "cumulative"];
    header.extend(METRICS.iter().map(|m| m.name));
    let mut table = Table::new("", &header);
    for m in matrices {
        let optional = |n: Option<usize>| n.map_or(String::new(), |n| n.to_string());
        let mut row = vec![m.name.clone(), m.label.clone(), m.shape[0].to_string(), m.shape[1].to_string()];
        row.extend([m.dtype.clone(), m.module.clone(), optional(m.layer), optional(m.r)]);
        row.push(m.cycle.map_or(String::new(), |c| c.to_string()));
        row.push(m.cumulative.map_or(String::new(), |c| c.to_string()));
        row.extend(METRICS.iter().map(|metric| m.measures.get(metric).map_or(String::new(), |v| v.to_string())));
        table.row(row);
    }
    table
}

fn several_labels(s: &Spectrum) -> bool {
    s.sources.len() > 1
}

fn matrix_table(s: &Spectrum) -> Table {
    let mut header = vec!["matrix"];
    header.extend(several_labels(s).then_some("source"));
    header.extend([
        "shape",
        "dtype",
        "s1",
        "rank",
        "above noise",
        "effective",
        "of min(m,n)",
        "stable",
        "90% energy",
        "99%",
    ]);
    let mut table = Table::new("", &header);
    for m in s.totals() {
        let v = &m.measures;
        let mut row = vec![m.name.clone()];
        row.extend(several_labels(s).then(|| m.label.clone()));
        row.extend([
            format!("{}x{}", m.shape[0], m.shape[1]),
            m.dtype.clone(),
            number(v.spectral_norm),
            v.numerical_rank.to_string(),
            v.rank_above_noise.to_string(),
            optional(v.effective_rank),
            optional(v.proportional_effective_rank),
            optional(v.stable_rank),
            v.energy_rank_90.to_string(),
            v.energy_rank_99.to_string(),
        ]);
        table.row(row);
    }
    table
}

fn group_table(s: &Spectrum) -> Table {
    let shown = ["rank_above_noise", "effective_rank", "proportional_effective_rank", "stable_rank"];
    let mut header = vec!["module"];
    header.extend(several_labels(s).then_some("source"));
    header.extend(["matrices", "above noise", "effective", "of min(m,n)", "stable"]);
    let mut table = Table::new("Per module kind: median (smallest to largest)", &header);
    for group in &s.groups {
        let mut row = vec![group.module.clone()];
        row.extend(several_labels(s).then(|| group.label.clone()));
        row.push(group.matrices.to_string());
        row.extend(shown.iter().map(|metric| match group.metrics.get(*metric) {
            Some(r) => range(*r),
            None => "null".into(),
        }));
        table.row(row);
    }
    table
}

fn cycle_table(s: &Spectrum) -> Table {
    let title =
        "Per cycle: median (smallest to largest) over the matrices; k cycles can reach rank k*r, at most min(m,n)";
    let mut header = vec!["cycle"];
    header.extend(several_labels(s).then_some("source"));
    header.extend(["r", "rank of the cycle", "k*r", "min(m,n)", "rank of the sum", "effective rank of the sum"]);
    let mut table = Table::new(title, &header);
    for c in &s.cycles {
        let mut row = vec![c.cycle.to_string()];
        row.extend(several_labels(s).then(|| c.label.clone()));
        row.extend([c.r, c.own_rank, c.sum_of_r, c.full_rank, c.rank_above_noise].map(range));
        row.push(c.effective_rank.map_or("null".into(), range));
        table.row(row);
    }
    table
}

fn against_table(against: &Against, several: bool) -> Table {
    let title = format!("Against '{}': medians before -> now", against.path.display());
    let mut header = vec!["module"];
    header.extend(several.then_some("source"));
    header.extend(["above noise", "effective", "s1"]);
    let mut table = Table::new(title, &header);
    let arrow = |(before, now): (f64, f64)| format!("{} -> {}", number(before), number(now));
    for c in &against.changes {
        let mut row = vec![c.module.clone()];
        row.extend(several.then(|| c.label.clone()));
        let effective = c.effective_rank.map_or("null".into(), arrow);
        row.extend([arrow(c.rank_above_noise), effective, arrow(c.spectral_norm)]);
        table.row(row);
    }
    table
}

fn against_remarks(against: &Against) -> Vec<String> {
    let mut remarks = Vec::new();
    for l in &against.losses {
        remarks.push(format!("{} ('{}') lost rank: {} before, {} now", l.name, l.label, l.before, l.now));
    }
    let places = [(&against.only_here, "new here"), (&against.only_there, "no longer here")];
    for (names, words) in places.into_iter().filter(|(names, _)| !names.is_empty()) {
        remarks.push(format!("{} {words} (first: {})", plural(names.len(), "update"), names[0]));
    }
    remarks
}

/// `8` where all are the same, `12 (8 to 16)` otherwise.
pub(super) fn range(r: Range) -> String {
    if r.min == r.max {
        number(r.median)
    } else {
        format!("{} ({} to {})", number(r.median), number(r.min), number(r.max))
    }
}

fn gate_table(gates: &[GateResult]) -> Table {
    let mut table = Table::new("Gates", &["gate", "source", "satisfied", "verdict"]);
    for g in gates {
        let satisfied = satisfied(g);
        table.row(vec![g.gate.clone(), g.label.clone(), satisfied, if g.passed { "holds" } else { "FAILS" }.into()]);
    }
    table
}

/// `9 of 12`, and how many of these were not measured.
pub(super) fn satisfied(gate: &GateResult) -> String {
    match gate.not_measured {
        0 => format!("{} of {}", gate.satisfied, gate.matrices),
        n => format!("{} of {} ({n} not measured)", gate.satisfied, gate.matrices),
    }
}

/// `gate '..' fails for 'run': worst: q_proj 8 (limit 16), ...`
fn offenders(gate: &GateResult) -> String {
    let worst: Vec<String> = gate
        .offenders
        .iter()
        .map(|o| format!("{} has {} against {}", o.name, optional(o.value), number(o.limit)))
        .collect();
    let of = match gate.matrices - gate.satisfied - gate.not_measured {
        missing if missing > worst.len() => format!(" (the worst of {missing})"),
        _ => String::new(),
    };
    let mut reasons = Vec::new();
    reasons.extend((!worst.is_empty()).then(|| worst.join("; ") + &of));
    if let Some(first) = gate.not_measured_names.first() {
        let were = if gate.not_measured == 1 { "1 weight was" } else { &format!("{} weights were", gate.not_measured) };
        reasons.push(format!("{were} not measured (first: {first}), which satisfies no gate"));
    }
    format!("gate '{}' fails for '{}': {}", gate.gate, gate.label, reasons.join("; "))
}

fn verdict(gates: &[GateResult]) -> Option<String> {
    let failed = gates.iter().filter(|g| !g.passed).count();
    let unmeasured = match gates.iter().map(|g| g.not_measured).max() {
        Some(n) if n > 0 => format!("; {} not measured", plural(n, "weight")),
        _ => String::new(),
    };
    match (gates.len(), failed) {
        (0, _) => None,
        (n, 0) => Some(format!("verdict: {} held{unmeasured}", plural(n, "gate"))),
        (n, failed) => Some(format!("verdict: {failed} of {} failed{unmeasured}", plural(n, "gate"))),
    }
}

fn skipped_remarks(s: &Spectrum) -> Vec<String> {
    let reasons = [
        (Reason::NotAMatrix, "not a matrix"),
        (Reason::NotFloatingPoint, "not floating point"),
        (Reason::UnreadableType, "of a floating-point type that is not read"),
        (Reason::OneSideOnly, "on one side only"),
        (Reason::NonFinite, "NaN or infinite"),
        (Reason::NotLowRank, "stored in full"),
    ];
    let count = |reason| s.skipped.iter().filter(|k| k.reason == reason).count();
    reasons
        .into_iter()
        .filter(|(reason, _)| count(*reason) > 0)
        .map(|(reason, words)| {
            let first = s.skipped.iter().find(|k| k.reason == reason).map_or("", |k| k.name.as_str());
            format!("skipped {}: {words} (first: {first})", plural(count(reason), "tensor"))
        })
        .collect()
}

pub(super) fn plural(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

pub(super) fn optional(value: Option<f64>) -> String {
    value.map_or("null".into(), number)
}

/// Four significant digits; whole numbers below a million as they are.
pub(super) fn number(x: f64) -> String {
    let magnitude = x.abs();
    if x == x.trunc() && magnitude < 1e6 {
        format!("{x}")
    } else if (1e-3..1e6).contains(&magnitude) {
        let decimals = (3 - magnitude.log10().floor() as i32).max(0) as usize;
        format!("{x:.decimals$}")
    } else {
        format!("{x:.3e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_significant_digits() {
        let shown: Vec<String> = [0.0, 24.0, 22.62532, 0.098763, 1234.56, 1.5e-7, 2e12].map(number).to_vec();
        assert_eq!(shown, ["0", "24", "22.63", "0.09876", "1235", "1.500e-7", "2.000e12"]);
    }
}
