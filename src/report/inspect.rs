//! `inspect`: tensors or the tree of modules, files, adapter, sums.

use super::{
    Report,
    spectrum::{number, plural},
    table::Table,
    units,
};
use crate::inspect::{AdapterSummary, Inspection, Node, TensorSummary};

impl Report for Inspection {
    fn tables(&self) -> Vec<Table> {
        let with_stats = self.tensors.iter().any(|t| t.stats.is_some());
        let mut tables = vec![match &self.tree {
            Some(nodes) => tree_table(nodes),
            None => tensor_table(&self.tensors, self.files.len() > 1, with_stats),
        }];
        if self.files.len() > 1 {
            tables.push(file_table(self));
        }
        tables.extend(metadata_table(self));
        tables.extend(self.adapter.as_ref().map(adapter_table));
        tables
    }

    fn remarks(&self) -> Vec<String> {
        let dtypes: Vec<String> = self.dtypes.iter().map(|(d, n)| format!("{d} {}", count(*n))).collect();
        let mut remarks = vec![format!(
            "{}, {} parameters ({}), {} in {}",
            plural(self.tensors.len(), "tensor"),
            count(self.parameters),
            dtypes.join(", "),
            units::bytes(self.bytes),
            plural(self.files.len(), "file")
        )];
        for t in &self.tensors {
            if let Some(stats) = &t.stats
                && let Some(at) = &stats.first_non_finite
            {
                let values = plural((stats.nan + stats.inf) as usize, "value");
                remarks.push(format!("'{}' holds {values} that are NaN or infinite, the first at {at:?}", t.name));
            }
        }
        remarks
    }
}

fn tensor_table(tensors: &[TensorSummary], with_file: bool, with_stats: bool) -> Table {
    let mut header = vec!["tensor", "dtype", "shape", "bytes"];
    header.extend(with_file.then_some("file"));
    if with_stats {
        header.extend(["min", "max", "mean", "std", "zeros", "nan", "inf"]);
    }
    let mut table = Table::new("", &header);
    for t in tensors {
        let mut row = vec![t.name.clone(), format!("{:?}", t.dtype), shape(&t.shape), t.bytes.to_string()];
        row.extend(with_file.then(|| t.file.clone()));
        if with_stats {
            row.extend(match &t.stats {
                Some(s) => {
                    let shown = |x: Option<f64>| x.map_or("null".into(), number);
                    let counts = [s.zeros, s.nan, s.inf].map(|n| n.to_string());
                    [s.min, s.max, s.mean, s.std].map(shown).into_iter().chain(counts).collect()
                }
                None => vec!["null".to_owned(); 7],
            });
        }
        table.row(row);
    }
    table
}

fn tree_table(nodes: &[Node]) -> Table {
    let mut table = Table::new("", &["module", "shape", "dtype", "parameters", "bytes"]);
    add_nodes(&mut table, nodes, "", true);
    table
}

fn add_nodes(table: &mut Table, nodes: &[Node], indent: &str, top: bool) {
    for (i, node) in nodes.iter().enumerate() {
        let last = i + 1 == nodes.len();
        let (branch, below) = match (top, last) {
            (true, _) => ("", ""),
            (_, true) => ("└── ", "    "),
            _ => ("├── ", "│   "),
        };
        let times = if node.count > 1 { format!(" ({} times)", node.count) } else { String::new() };
        table.row(vec![
            format!("{indent}{branch}{}{times}", node.name),
            node.tensor.as_ref().map_or(String::new(), |(_, s)| shape(s)),
            node.dtypes().into_iter().collect::<Vec<_>>().join(", "),
            node.parameters.to_string(),
            node.bytes.to_string(),
        ]);
        add_nodes(table, &node.children, &format!("{indent}{below}"), false);
    }
}

fn file_table(inspection: &Inspection) -> Table {
    let mut table = Table::new("Files", &["file", "tensors", "bytes"]);
    for f in &inspection.files {
        table.row(vec![f.name.clone(), f.tensors.to_string(), f.bytes.to_string()]);
    }
    table
}

/// Shards usually repeat their metadata: a pair that all files share is shown once.
fn metadata_table(inspection: &Inspection) -> Option<Table> {
    let mut table = Table::new("Metadata", &["key", "value"]);
    let first = inspection.files.first()?;
    let everywhere = |k: &String, v: &String| inspection.files.iter().all(|f| f.metadata.get(k) == Some(v));
    for file in &inspection.files {
        for (key, value) in &file.metadata {
            let shared = everywhere(key, value);
            if !shared {
                table.row(vec![format!("{key} ({})", file.name), value.clone()]);
            } else if file.name == first.name {
                table.row(vec![key.clone(), value.clone()]);
            }
        }
    }
    (!table.rows.is_empty()).then_some(table)
}

fn adapter_table(a: &AdapterSummary) -> Table {
    let mut table = Table::new("Adapter", &["key", "value"]);
    let own = if a.patterns { " (some modules have their own)" } else { "" };
    let mut rows = vec![
        ("peft_type", a.peft_type.clone()),
        ("r", format!("{}{own}", a.r)),
        ("lora_alpha", format!("{}{own}", number(a.lora_alpha))),
        ("scaling", format!("{}{}", number(a.scaling), if a.use_rslora { " (rsLoRA)" } else { own })),
        ("modules", a.modules.to_string()),
    ];
    rows.extend(a.target_modules.as_ref().map(|t| ("target_modules", targets(t))));
    rows.extend(a.use_dora.then(|| ("use_dora", "true".to_owned())));
    rows.extend((!a.full.is_empty()).then(|| ("stored in full", a.full.join(", "))));
    rows.extend(a.task_type.clone().map(|t| ("task_type", t)));
    rows.extend(a.base_model_name_or_path.clone().map(|b| ("base_model_name_or_path", b)));
    rows.into_iter().for_each(|(key, value)| table.row(vec![key.to_owned(), value]));
    table
}

fn targets(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Array(names) => {
            names.iter().map(|n| n.as_str().map_or(n.to_string(), str::to_owned)).collect::<Vec<_>>().join(", ")
        }
        serde_json::Value::String(regex) => regex.clone(),
        other => other.to_string(),
    }
}

pub(super) fn shape(extents: &[usize]) -> String {
    match extents {
        [] => "scalar".into(),
        _ => extents.iter().map(usize::to_string).collect::<Vec<_>>().join("x"),
    }
}

/// `1.35e9` reads worse than `1.35 G`: 12345 -> `12.3 k`.
fn count(n: u64) -> String {
    let (unit, size) = match n {
        0..10_000 => return n.to_string(),
        10_000..1_000_000 => ("k", 1e3),
        1_000_000..1_000_000_000 => ("M", 1e6),
        _ => ("G", 1e9),
    };
    format!("{} {unit}", number(n as f64 / size))
}
