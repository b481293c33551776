//! What a merge did, and how much of each delta survived.

use super::{
    DtypeAdvice, Estimate, MIN_RETENTION, Options, Rounding,
    apply::Sums,
    device::Gpu,
    plan::{Output, Plan},
};
use crate::checkpoint::{Dtype, FileSpecs};
use serde::Serialize;
use std::{collections::HashMap, path::PathBuf};

/// The result of a merge, or of its plan (`dry_run`).
#[derive(Clone, Debug, Serialize)]
pub struct MergeReport {
    /// Version of this layout.
    pub schema: u32,
    /// The checkpoint that updates were added to.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub base: PathBuf,
    /// What was added, in order.
    pub adapters: Vec<AdapterUse>,
    /// The folder that was (or would be) created.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub output: PathBuf,
    /// How values were rounded to bf16 and f16.
    #[serde(flatten)]
    pub rounding: Rounding,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// Every tensor that is not a copy, in the order of the base; in a dry run the copies, too.
    pub tensors: Vec<TensorResult>,
    /// The files of the output's tensors.
    pub files: Vec<OutputFile>,
    /// Over the whole model.
    pub totals: Totals,
    /// What would keep the delta of the worst tensor, where one loses more than allowed.
    pub remedy: Option<DtypeAdvice>,
    /// What a merge would take; only in a dry run.
    pub estimate: Option<Estimate>,
}

/// A file of the output.
#[derive(Clone, Debug, Serialize)]
pub struct OutputFile {
    /// Its name in the output's folder.
    pub name: String,
    /// How many tensors it holds.
    pub tensors: usize,
    /// How many of these are no copies.
    pub changed: usize,
    /// Bytes of its tensors.
    pub bytes: u64,
}

/// An adapter and its weight.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterUse {
    /// The folder.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub path: PathBuf,
    /// What its deltas were multiplied with.
    pub weight: f64,
}

/// What happens to a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Deltas are added.
    Merged,
    /// An adapter's tensor, or some of its rows, takes its place.
    Replaced,
    /// An adapter's tensor that the base lacks.
    Added,
    /// Only the element type changes.
    Recast,
    /// Byte for byte.
    Copied,
}

/// One tensor of the output.
#[derive(Clone, Debug, Serialize)]
pub struct TensorResult {
    /// Name as stored.
    pub name: String,
    /// What happened to it.
    pub action: Action,
    /// Extents.
    pub shape: Vec<usize>,
    /// Element type in the base.
    pub base_dtype: Dtype,
    /// Element type in the output.
    pub dtype: Dtype,
    /// Sum of the ranks of its deltas.
    pub rank: usize,
    /// Bytes of the tensor it is made from; 0 where the base has none.
    pub base_bytes: u64,
    /// Bytes in the output.
    pub bytes: u64,
    /// The file that holds it.
    pub file: String,
    /// Where its products are computed, if a GPU was asked for and there are any: `cuda:N` or `cpu`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// How much of the delta survived rounding; absent in a dry run and where the delta is zero.
    #[serde(flatten)]
    pub retention: Option<Retention>,
}

/// How much of an intended delta dW survived rounding to the stored type. Q is the stored result.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Retention {
    /// `||dW||`, Frobenius.
    pub delta_norm: f64,
    /// `<dW, Q - W> / ||dW||^2`: 1 when nothing is lost.
    pub retention: f64,
    /// `||Q - W - dW|| / ||dW||`: 0 when nothing is lost.
    pub relative_error: f64,
}

/// Over the whole model.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Totals {
    /// Tensors of the output.
    pub tensors: usize,
    /// Of these, with deltas added.
    pub merged: usize,
    /// Of these, replaced by an adapter's tensor in whole or in part, without a delta.
    pub replaced: usize,
    /// Of these, missing in the base and added from an adapter.
    pub added: usize,
    /// Of these, only converted to another type.
    pub recast: usize,
    /// Of these, copied byte for byte.
    pub copied: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// All deltas taken as one vector.
    #[serde(flatten)]
    pub retention: Option<Retention>,
}

impl TensorResult {
    /// Share of the delta that was kept; 1 where there is nothing to lose.
    pub fn kept(&self) -> f64 {
        self.retention.map_or(1.0, |r| r.retention)
    }

    /// Whether a warning is due.
    pub fn loses_more_than_allowed(&self) -> bool {
        self.kept() < MIN_RETENTION
    }
}

impl Retention {
    pub(super) fn new(sums: Sums) -> Option<Retention> {
        (sums.delta > 0.0).then(|| Retention {
            delta_norm: sums.delta.sqrt(),
            retention: sums.kept / sums.delta,
            relative_error: (sums.error / sums.delta).sqrt(),
        })
    }
}

fn action(output: &Output) -> Action {
    match output.replaced {
        _ if !output.updates.is_empty() => Action::Merged,
        Some(replaced) if replaced.added => Action::Added,
        Some(_) => Action::Replaced,
        None if !output.tokens.is_empty() => Action::Replaced,
        None if output.is_copy() => Action::Copied,
        None => Action::Recast,
    }
}

/// Describes a plan and the files of its tensors, and with the sums of the tensors its outcome.
pub(super) fn report(
    options: &Options,
    plan: &Plan,
    gpu: Option<&Gpu>,
    layout: &[FileSpecs],
    sums: &[Sums],
) -> MergeReport {
    let file_of: HashMap<&str, usize> =
        layout.iter().enumerate().flat_map(|(i, (_, specs))| specs.iter().map(move |s| (s.name.as_str(), i))).collect();
    let mut files: Vec<OutputFile> = layout
        .iter()
        .map(|(name, specs)| OutputFile {
            name: name.clone(),
            tensors: specs.len(),
            changed: 0,
            bytes: specs.iter().map(|s| s.bytes()).sum(),
        })
        .collect();
    let mut totals = Totals { tensors: plan.outputs.len(), ..Totals::default() };
    let (mut tensors, mut all) = (Vec::new(), Sums::default());
    for (i, output) in plan.outputs.iter().enumerate() {
        let (spec, action, sums) = (&output.spec, action(output), sums.get(i).copied().unwrap_or_default());
        totals.bytes += spec.bytes();
        match action {
            Action::Merged => totals.merged += 1,
            Action::Replaced => totals.replaced += 1,
            Action::Added => totals.added += 1,
            Action::Recast => totals.recast += 1,
            Action::Copied => totals.copied += 1,
        }
        let file = &mut files[file_of[spec.name.as_str()]];
        file.changed += usize::from(action != Action::Copied);
        if action == Action::Copied && !options.dry_run {
            continue;
        }
        all += sums;
        let rank = output.rank();
        tensors.push(TensorResult {
            name: spec.name.clone(),
            action,
            shape: spec.shape.clone(),
            base_dtype: output.source.dtype(),
            dtype: spec.dtype,
            rank,
            base_bytes: if action == Action::Added { 0 } else { output.source.bytes().len() as u64 },
            bytes: spec.bytes(),
            file: file.name.clone(),
            device: gpu.filter(|_| rank > 0).map(|gpu| if gpu.takes(output) { gpu.name() } else { "cpu" }.to_owned()),
            retention: Retention::new(sums),
        });
    }
    totals.retention = Retention::new(all);
    MergeReport {
        schema: 1,
        base: options.base.clone(),
        adapters: options
            .adapters
            .iter()
            .map(|(path, weight)| AdapterUse { path: path.clone(), weight: *weight })
            .collect(),
        output: options.output.clone(),
        rounding: options.rounding,
        dry_run: options.dry_run,
        tensors,
        files,
        totals,
        remedy: None,
        estimate: None,
    }
}
