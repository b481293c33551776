//! `verify`: the stages, what failed, and what became of every weight.

use super::{
    Report,
    spectrum::{number, plural},
    table::Table,
};
use crate::verify::{Verification, WeightKind};

impl Report for Verification {
    fn tables(&self) -> Vec<Table> {
        let mut checks = Table::new("", &["check", "result", "of"]);
        for c in &self.checks {
            checks.row(vec![c.what.clone(), if c.passed { "holds" } else { "FAILS" }.into(), c.detail.clone()]);
        }
        let merged: Vec<_> = self.weights.iter().filter(|w| w.kind == WeightKind::Merged).collect();
        if merged.is_empty() {
            return vec![checks];
        }
        let mut weights =
            Table::new("Recomputed weights", &["weight", "largest difference", "of what rounding allows"]);
        for w in merged {
            let shown = |x: Option<f64>| x.map_or("null".into(), number);
            let share = w.share_of_bound.map_or("null".into(), |s| format!("{:.1}%", 100.0 * s));
            weights.row(vec![w.name.clone(), shown(w.max_error), share]);
        }
        vec![checks, weights]
    }

    fn remarks(&self) -> Vec<String> {
        let names = |kind| {
            let of_kind = self.weights.iter().filter(move |w| w.kind == kind);
            of_kind.map(|w| w.name.as_str()).collect::<Vec<_>>().join(", ")
        };
        let mut remarks = Vec::new();
        for (kind, words) in [(WeightKind::TrainedInFull, "trained in full"), (WeightKind::Unchanged, "unchanged")] {
            let list = names(kind);
            if !list.is_empty() {
                remarks.push(format!("{words}: {list}"));
            }
        }
        remarks.extend(self.notes.iter().map(|n| format!("note: {n}")));
        remarks.extend(self.mismatches.iter().map(|m| format!("mismatch: {}: {}", m.what, m.detail)));
        remarks.push(match self.mismatches.first() {
            None => format!("verdict: '{}' is what it claims", self.run.display()),
            Some(first) => {
                let found = plural(self.mismatches.len(), "mismatch").replace("mismatchs", "mismatches");
                format!("verdict: '{}' is not what it claims ({found}, first: {})", self.run.display(), first.what)
            }
        });
        remarks
    }
}
