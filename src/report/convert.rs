//! `convert`: what the tensors were stored as, and what they are now. JSON lists each.

use super::{Report, spectrum::plural, table::Table, units};
use crate::convert::ConvertReport;

impl Report for ConvertReport {
    fn tables(&self) -> Vec<Table> {
        let mut table = Table::new("Tensors by type", &["stored as", "now", "tensors", "bytes before", "bytes now"]);
        let mut groups: Vec<(&str, String, usize, u64, u64)> = Vec::new();
        for t in &self.tensors {
            let bytes = t.shape.iter().product::<usize>() as u64 * t.dtype.bitsize() as u64 / 8;
            let key = (t.stored_as.as_str(), format!("{:?}", t.dtype));
            match groups.iter_mut().find(|g| (g.0, &g.1) == (key.0, &key.1)) {
                Some(group) => {
                    group.2 += 1;
                    group.3 += t.stored_bytes;
                    group.4 += bytes;
                }
                None => groups.push((key.0, key.1, 1, t.stored_bytes, bytes)),
            }
        }
        for (stored, now, count, before, after) in groups {
            table.row(vec![stored.into(), now, count.to_string(), units::bytes(before), units::bytes(after)]);
        }
        if table.rows.is_empty() { Vec::new() } else { vec![table] }
    }

    fn remarks(&self) -> Vec<String> {
        let mut remarks = vec![
            format!("{}, {}", plural(self.tensors.len(), "tensor"), units::bytes(self.bytes)),
            format!("written to '{}': {}", self.output.display(), self.files.join(", ")),
        ];
        remarks.extend(self.left_out.iter().cloned());
        remarks
    }
}
