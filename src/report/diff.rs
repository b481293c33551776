//! `diff`: the tensors that are not identical, and the verdict.

use super::{
    Report,
    inspect::shape,
    spectrum::{number, optional, plural},
    table::Table,
};
use crate::diff::{Diff, Side, Status, TensorDiff};

impl Report for Diff {
    fn tables(&self) -> Vec<Table> {
        let header =
            ["tensor", "status", "shape", "dtype", "max abs", "at", "relative frobenius", "cosine", "beyond tolerance"];
        let mut table = Table::new("", &header);
        for t in self.tensors.iter().filter(|t| t.status != Status::Identical) {
            table.row(row(t));
        }
        if table.rows.is_empty() { Vec::new() } else { vec![table] }
    }

    fn remarks(&self) -> Vec<String> {
        let count = |status| self.tensors.iter().filter(|t| t.status == status).count();
        let mut parts = Vec::new();
        for (status, words) in [
            (Status::Identical, "identical"),
            (Status::Close, "within the tolerance"),
            (Status::Different, "different"),
            (Status::Shape, "of another shape"),
            (Status::Dtype, "of a type that cannot be compared"),
            (Status::OnlyInA, "only in A"),
            (Status::OnlyInB, "only in B"),
        ] {
            let n = count(status);
            parts.extend((n > 0).then(|| format!("{n} {words}")));
        }
        let mut remarks = vec![format!("{}: {}", plural(self.tensors.len(), "tensor"), parts.join(", "))];
        let recast =
            self.tensors.iter().filter(|t| t.a.as_ref().zip(t.b.as_ref()).is_some_and(|(a, b)| a.dtype != b.dtype));
        let recast = recast.filter(|t| t.values.is_some()).count();
        if recast > 0 {
            remarks.push(format!("{} stored in two types, compared by value", plural(recast, "tensor")));
        }
        let verdict = if self.equal { "equal" } else { "different" };
        remarks.push(format!(
            "verdict: '{}' and '{}' are {verdict} (atol {}, rtol {})",
            self.a.display(),
            self.b.display(),
            number(self.atol),
            number(self.rtol)
        ));
        remarks
    }
}

fn row(t: &TensorDiff) -> Vec<String> {
    let sides = |f: fn(&Side) -> String| match (t.a.as_ref().map(f), t.b.as_ref().map(f)) {
        (Some(a), Some(b)) if a != b => format!("{a} / {b}"),
        (Some(x), _) | (None, Some(x)) => x,
        (None, None) => String::new(),
    };
    let status = match t.status {
        Status::Identical => "identical",
        Status::Close => "close",
        Status::Different => "different",
        Status::Shape => "shape",
        Status::Dtype => "dtype",
        Status::OnlyInA => "only in A",
        Status::OnlyInB => "only in B",
    };
    let mut cells =
        vec![t.name.clone(), status.into(), sides(|s| shape(&s.shape)), sides(|s| format!("{:?}", s.dtype))];
    cells.extend(match &t.values {
        Some(d) => vec![
            number(d.max_abs),
            d.max_abs_at.as_ref().map_or("null".into(), |at| format!("{at:?}")),
            optional(d.relative_frobenius),
            // Ten digits: what two trained models differ by starts at the sixth.
            d.cosine.map_or("null".into(), |c| format!("{c:.10}")),
            (d.beyond_tolerance + d.non_finite).to_string(),
        ],
        None => vec!["null".to_owned(); 5],
    });
    cells
}
