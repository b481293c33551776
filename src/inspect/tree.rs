//! Tensors grouped by module, equal neighbours (the layers of a model) folded into one.

use crate::checkpoint::{Dtype, Tensor, natural_key};
use serde::Serialize;
use std::collections::BTreeSet;

/// A module with what is in it, or a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    /// Own name; `0..21` for a run of numbered modules with the same content.
    pub name: String,
    /// How many modules it stands for: 1, or the length of the run.
    pub count: usize,
    /// Elements, of all it stands for.
    pub parameters: u64,
    /// Bytes, of all it stands for.
    pub bytes: u64,
    /// Type and shape, of a tensor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensor: Option<(Dtype, Vec<usize>)>,
    /// Modules and tensors in it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<Node>,
}

/// The modules of `tensors`, in reading order.
pub(super) fn of(tensors: &[Tensor]) -> Vec<Node> {
    let mut sorted: Vec<(Vec<&str>, &Tensor)> = tensors.iter().map(|t| (t.name().split('.').collect(), t)).collect();
    sorted.sort_by_cached_key(|(_, t)| natural_key(t.name()));
    level(&sorted, 0)
}

/// The nodes whose names are component `depth` of the sorted names.
fn level(sorted: &[(Vec<&str>, &Tensor)], depth: usize) -> Vec<Node> {
    let groups = sorted.chunk_by(|a, b| a.0.get(depth) == b.0.get(depth));
    let nodes = groups.filter_map(|group| {
        let name = group[0].0.get(depth)?;
        // A tensor `a` beside tensors `a.b`: the first has no further component.
        let own = group.iter().find(|(parts, _)| parts.len() == depth + 1).map(|(_, t)| *t);
        let below: Vec<_> = group.iter().filter(|(parts, _)| parts.len() > depth + 1).cloned().collect();
        let children = level(&below, depth + 1);
        let sum = |f: fn(&Tensor) -> u64| group.iter().map(|(_, t)| f(t)).sum();
        Some(Node {
            name: (*name).to_owned(),
            count: 1,
            parameters: sum(|t| t.elements() as u64),
            bytes: sum(|t| t.bytes().len() as u64),
            tensor: own.map(|t| (t.dtype(), t.shape().to_vec())),
            children,
        })
    });
    fold(nodes.collect())
}

/// Runs of numbered nodes with equal content become one.
fn fold(nodes: Vec<Node>) -> Vec<Node> {
    let mut folded: Vec<(Node, u64)> = Vec::new();
    for node in nodes {
        let number = node.name.parse::<u64>();
        match (folded.last_mut(), number) {
            (Some((first, last)), Ok(n)) if *last + 1 == n && same_content(first, &node) => {
                let start = first.name.split("..").next().unwrap_or_default().to_owned();
                first.name = format!("{start}..{n}");
                first.count += 1;
                first.parameters += node.parameters;
                first.bytes += node.bytes;
                *last = n;
            }
            (_, number) => folded.push((node, number.unwrap_or(u64::MAX - 1))),
        }
    }
    folded.into_iter().map(|(node, _)| node).collect()
}

fn same_content(run: &Node, node: &Node) -> bool {
    run.tensor == node.tensor && run.children == node.children && run.bytes == run.count as u64 * node.bytes
}

impl Node {
    /// The types of the tensors in it.
    pub fn dtypes(&self) -> BTreeSet<String> {
        let mut found: BTreeSet<String> = self.children.iter().flat_map(Node::dtypes).collect();
        found.extend(self.tensor.iter().map(|(dtype, _)| format!("{dtype:?}")));
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Checkpoint, TensorSpec, Writer};

    #[test]
    fn equal_layers_fold_and_unequal_ones_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let spec = |name: String, n| TensorSpec { name, dtype: Dtype::U8, shape: vec![n] };
        let mut specs: Vec<_> = (0..12).map(|i| spec(format!("m.layers.{i}.w"), if i == 11 { 3 } else { 2 })).collect();
        specs.push(spec("m.norm".into(), 5));
        let writer = Writer::create(dir.path(), &specs, 1 << 20, &std::collections::BTreeMap::new()).unwrap();
        specs.iter().for_each(|s| writer.write(&s.name, 0, &vec![0; s.bytes() as usize]).unwrap());
        writer.finish().unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let tree = of(&checkpoint.tensors().collect::<Vec<_>>());
        let [m] = &tree[..] else { panic!("{tree:?}") };
        assert_eq!((m.name.as_str(), m.parameters, m.children.len()), ("m", 30, 2));
        let layers: Vec<_> = m.children[0].children.iter().map(|n| (n.name.as_str(), n.count, n.parameters)).collect();
        assert_eq!(layers, [("0..10", 11, 22), ("11", 1, 3)]);
        assert_eq!(m.children[1].tensor, Some((Dtype::U8, vec![5])));
    }
}
