//! `merge`: the tensors that changed, and how much of their deltas survived rounding.

use super::{
    Report, merge_plan,
    spectrum::{number, plural},
    table::Table,
    units,
};
use crate::merge::{MergeReport, Retention, Rounding, TensorResult};

impl Report for MergeReport {
    fn tables(&self) -> Vec<Table> {
        if self.dry_run {
            return merge_plan::tables(self);
        }
        let title = "Changed tensors; retention is the share of the delta that survived rounding";
        let header =
            ["tensor", "action", "shape", "from", "to", "rank", "delta norm", "retention", "relative error", "file"];
        let mut table = Table::new(title, &header);
        self.tensors.iter().for_each(|t| table.row(row(t)));
        if self.tensors.is_empty() { Vec::new() } else { vec![table] }
    }

    fn detail(&self) -> Option<Table> {
        self.dry_run.then(|| merge_plan::per_tensor(self))
    }

    fn remarks(&self) -> Vec<String> {
        let totals = &self.totals;
        let mut remarks = vec![format!(
            "{}, {}: {} merged, {} replaced, {} added, {} recast, {} copied",
            plural(totals.tensors, "tensor"),
            units::bytes(totals.bytes),
            totals.merged,
            totals.replaced,
            totals.added,
            totals.recast,
            totals.copied
        )];
        if let Some(r) = &totals.retention {
            remarks.push(format!(
                "retention of the whole update: {} (relative error {}, norm {})",
                percent(r.retention),
                number(r.relative_error),
                number(r.delta_norm)
            ));
        }
        if let Rounding::Stochastic { seed } = self.rounding {
            remarks.push(format!("rounded by chance to bf16 and f16, seed {seed}"));
        }
        remarks.extend(device_remark(self));
        remarks.extend(self.estimate.as_ref().map(merge_plan::estimate));
        let output = self.output.display();
        remarks.push(match self.dry_run {
            true => format!("dry run: '{output}' was not written"),
            false => format!("written to '{output}'"),
        });
        remarks
    }
}

/// What a GPU takes, where one was asked for.
fn device_remark(report: &MergeReport) -> Option<String> {
    let of = |wanted: fn(&str) -> bool| report.tensors.iter().filter(move |t| t.device.as_deref().is_some_and(wanted));
    let (all, taken) = (of(|_| true).count(), of(|d| d != "cpu").count());
    let name = of(|d| d != "cpu").find_map(|t| t.device.as_deref()).unwrap_or("the GPU");
    let rest = if taken < all { "; the others cost less than reading them back, or are f64" } else { "" };
    (all > 0).then(|| format!("products of {taken} of {all} tensors are computed on {name}{rest}"))
}

fn row(t: &TensorResult) -> Vec<String> {
    let of = |show: fn(&Retention) -> String| t.retention.as_ref().map_or_else(String::new, show);
    vec![
        t.name.clone(),
        merge_plan::action(t.action).into(),
        format!("{:?}", t.shape),
        format!("{:?}", t.base_dtype),
        format!("{:?}", t.dtype),
        if t.rank > 0 { t.rank.to_string() } else { String::new() },
        of(|r| number(r.delta_norm)),
        of(|r| percent(r.retention)),
        of(|r| number(r.relative_error)),
        t.file.clone(),
    ]
}

/// Two decimals: what matters is 99.9 or 60.
fn percent(share: f64) -> String {
    format!("{:.2}%", 100.0 * share)
}
