//! `extract`: the rank of every matrix, and how much of its change the factors hold.

use super::{
    Report,
    spectrum::{number, plural},
    table::Table,
};
use crate::extract::{ChangedTensor, ExtractReport};

impl Report for ExtractReport {
    fn tables(&self) -> Vec<Table> {
        let header = ["tensor", "shape", "rank", "delta norm", "energy", "relative error"];
        let mut table = Table::new("Factored; energy is the share of the squared delta norm", &header);
        for m in &self.matrices {
            table.row(vec![
                m.name.clone(),
                format!("{:?}", m.shape),
                m.rank.to_string(),
                number(m.delta_norm),
                percent(m.energy),
                number(m.relative_error),
            ]);
        }
        let mut tables = vec![table];
        for (title, list) in
            [("Stored in full", &self.saved_in_full), ("Changed, but left out of the adapter", &self.left_out)]
        {
            if !list.is_empty() {
                tables.push(changed(title, list));
            }
        }
        tables.retain(|t| !t.rows.is_empty());
        tables
    }

    fn remarks(&self) -> Vec<String> {
        let t = &self.totals;
        let mut remarks = Vec::new();
        if t.matrices > 0 {
            let ranks = match t.rank_min == t.rank_max {
                true => format!("rank {}", t.rank_min),
                false => format!("ranks {} to {}", t.rank_min, t.rank_max),
            };
            remarks.push(format!(
                "{} of {ranks}, {}: energy {}, relative error {} over all",
                if t.matrices == 1 { "1 matrix".to_owned() } else { format!("{} matrices", t.matrices) },
                plural(t.parameters, "parameter"),
                percent(t.energy),
                number(t.relative_error)
            ));
        }
        remarks.push(format!(
            "{} stored in full, {} left out, {} unchanged",
            self.saved_in_full.len(),
            self.left_out.len(),
            self.unchanged
        ));
        remarks.push(format!("written to '{}'", self.output.display()));
        remarks
    }
}

fn changed(title: &str, list: &[ChangedTensor]) -> Table {
    let mut table = Table::new(title, &["tensor", "shape", "delta norm"]);
    for t in list {
        table.row(vec![t.name.clone(), format!("{:?}", t.shape), number(t.delta_norm)]);
    }
    table
}

fn percent(share: f64) -> String {
    format!("{:.2}%", 100.0 * share)
}
