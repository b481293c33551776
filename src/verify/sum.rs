//! `base + sum over cycles of scaling * B @ A` against the checkpoint, entry by entry.
//!
//! The sum is recomputed in f64 from the stored factors. The run computed it in f32, one merge after the other, so the
//! two may differ by what those roundings allow and no more. Let `u = 2^-24`, and let merge k add `P = scaling * B @ A`
//! with rank r. Summing r products in any order, and multiplying by a scaling that was itself rounded, gives
//! `|fl(P) - P| <= g (|scaling| |B| |A|)`, `g = (r + 2) u / (1 - (r + 2) u)` (Higham, "Accuracy and Stability of
//! Numerical Algorithms", 2nd ed., section 3.1); `(|B| |A|)_ij` is at most the product of the norms of row i of B and
//! column j of A (Cauchy-Schwarz). Adding it to the weight and storing the result in the checkpoint's dtype rounds
//! once more, by at most `v |W_k|` with `v` the unit roundoff of that dtype (and half its smallest subnormal number);
//! twice that where the run rounds by chance. Where the run quantises the result, the rounding is half the largest gap between
//! its numbers, times the largest size in the block that shares a scale (which may be off by what the bound is there); a scale
//! in 8 bits is off by half of 0.9/64, times the largest of the scales around.
//! The bound is the sum of these terms over all merges, times 1.01 for the products of roundings.

use super::{Findings, Mismatch};
use crate::{
    adapter::{Adapter, LoraModule, Stored},
    checkpoint::{Checkpoint, Dtype, EMBEDDING_NAME, HEAD_NAME, Tensor, TensorFile, dtype},
    delta::LowRank,
    error::{Error, Result},
    ops::LARGEST_GAP,
    progress::Progress,
    run::{Manifest, RunDir},
    work_queue::{self, Budget, Need},
};
use ndarray::Array2;
use serde::Serialize;

/// One tensor of the final checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WeightCheck {
    /// Tensor.
    pub name: String,
    /// What the run did to it.
    pub kind: WeightKind,
    /// Largest difference to the recomputed value; for merged weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_error: Option<f64>,
    /// Largest share of its bound that a difference takes up; at most 1 where the claim holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_of_bound: Option<f64>,
}

/// What a run did to a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightKind {
    /// The cycles' deltas were merged into it.
    Merged,
    /// It was trained directly and differs from the base.
    TrainedInFull,
    /// It equals the base, bit for bit.
    Unchanged,
}

/// Compares every tensor of the newest checkpoint with the base and the cycles merged before it.
pub(super) fn check(
    dir: &RunDir,
    manifest: &Manifest,
    cycles: &[Adapter],
    progress: &Progress,
) -> Result<(Findings, Vec<WeightCheck>)> {
    let mut findings = Findings::default();
    let (Some(base_record), Some(record)) = (&manifest.base, &manifest.checkpoint) else {
        findings.detail = "nothing to compare".into();
        findings.notes.push("the run has no base or no checkpoint yet".into());
        return Ok((findings, Vec::new()));
    };
    if record.step < base_record.step {
        findings.detail = "nothing to compare".into();
        findings.notes.push(format!("the newest checkpoint, of step {}, is older than the base", record.step));
        return Ok((findings, Vec::new()));
    }
    let base = super::readable(Checkpoint::open(&dir.base_path()), "base", &mut findings)?;
    let folder = dir.0.join(&record.folder);
    let tuned = super::readable(Checkpoint::open(&folder), "checkpoint", &mut findings)?;
    let (Some(base), Some(tuned)) = (base, tuned) else { return Ok((findings, Vec::new())) };

    let merged = manifest.cycles.iter().filter(|c| c.last_step <= record.step).count();
    if merged < cycles.len() {
        findings.notes.push(format!("cycles {} and later end after the newest checkpoint", merged + 1));
    }
    // Inside a cycle the stored model has a delta merged that no cycle records yet; its frozen weights lie beside it.
    let last_merge = manifest.cycles[..merged].last().map_or(base_record.step, |c| c.last_step);
    let mut frozen = None;
    if record.step > last_merge {
        let state = TensorFile::open(&folder.join("training_state/state.safetensors"));
        frozen = super::readable(state, "checkpoint inside a cycle", &mut findings)?;
    }
    let mut jobs = Vec::new();
    if let Some(how) = manifest.quantised.as_ref().filter(|_| frozen.is_some()) {
        findings.detail = "nothing to compare".into();
        findings.notes.push(format!("the newest checkpoint lies inside a cycle, whose frozen weights are {how}"));
        return Ok((findings, Vec::new()));
    }
    let rounds = Rounds { by_chance: manifest.stochastic_rounding, quantised: manifest.quantised.as_deref() };
    collect(&base, &tuned, frozen.as_ref(), &cycles[..merged], rounds, &mut jobs, &mut findings)?;
    // Between cycles nothing moves what the last one stored in full.
    if let Some(last) = cycles[..merged].last().filter(|_| record.step == last_merge) {
        compare_stored_in_full(last, &tuned, &mut findings)?;
    }
    if !findings.mismatches.is_empty() {
        return Ok((findings, Vec::new()));
    }
    let bar = progress.count("recomputing", jobs.len() as u64);
    let needs: Vec<Need> = jobs.iter().map(Weight::need).collect();
    let results = work_queue::run(
        &needs,
        Budget::NONE,
        || (),
        |(), i| {
            progress.check()?;
            let result = jobs[i].check();
            bar.inc(1);
            result
        },
    );
    bar.finish_and_clear();
    let mut weights = Vec::new();
    for (weight, mismatch) in results? {
        weights.push(weight);
        findings.mismatches.extend(mismatch);
    }
    let count = |kind| weights.iter().filter(|w| w.kind == kind).count();
    findings.detail = format!(
        "{} weights recomputed over {merged} cycles, {} trained in full, {} unchanged",
        count(WeightKind::Merged),
        count(WeightKind::TrainedInFull),
        count(WeightKind::Unchanged)
    );
    Ok((findings, weights))
}

/// Parameters that a cycle stores in full equal those of the checkpoint at its end, in the checkpoint's type.
fn compare_stored_in_full(cycle: &Adapter, tuned: &Checkpoint, findings: &mut Findings) -> Result<()> {
    for (name, how, stored) in cycle.others() {
        if how != Stored::Full {
            continue;
        }
        // A tied head is stored under its own name as well.
        let tied = name == HEAD_NAME && cycle.config().other.get("ensure_weight_tying") == Some(&true.into());
        let held = if tied && tuned.get(name).is_none() { EMBEDDING_NAME } else { name };
        let Some(after) = tuned.get(held) else {
            findings
                .mismatches
                .push(Mismatch::new(name, "the last cycle stores it but the checkpoint does not hold it"));
            continue;
        };
        let same =
            after.shape() == stored.shape() && *dtype::encode_f32(after.dtype(), &stored.to_f32()?)? == *after.bytes();
        findings.expect(same, name, || "the checkpoint holds other values than the last cycle stores in full".into());
    }
    Ok(())
}

struct Weight<'a> {
    name: &'a str,
    base: Tensor<'a>,
    tuned: Tensor<'a>,
    /// Per merged cycle; the flag is `fan_in_fan_out`. Empty for weights that no cycle adapts.
    deltas: Vec<(LoraModule<'a>, bool)>,
    /// Whether the weight must equal the recomputed sum.
    adapted: bool,
    rounds: Rounds<'a>,
}

/// How the run rounded merged weights.
#[derive(Clone, Copy)]
struct Rounds<'a> {
    /// By chance: by up to a unit in the last place instead of half of one.
    by_chance: bool,
    /// `nf4` or `int8`.
    quantised: Option<&'a str>,
}

/// Pairs the tensors of both checkpoints with the deltas that were merged into them.
fn collect<'a>(
    base: &'a Checkpoint,
    tuned: &'a Checkpoint,
    frozen: Option<&'a TensorFile>,
    cycles: &'a [Adapter],
    rounds: Rounds<'a>,
    jobs: &mut Vec<Weight<'a>>,
    findings: &mut Findings,
) -> Result<()> {
    let mut modules = Vec::new();
    for (i, adapter) in cycles.iter().enumerate() {
        for module in adapter.lora_modules() {
            let module = module?;
            let name = module.tensor_name();
            findings.expect(base.get(&name).is_some(), format!("cycle {}", i + 1), || {
                format!("it adapts '{name}', which the base does not hold")
            });
            modules.push((name, module, adapter.config().fan_in_fan_out));
        }
    }
    for tensor in tuned.tensors().filter(|t| base.get(t.name()).is_none()) {
        findings.mismatches.push(Mismatch::new(tensor.name(), "it is in the checkpoint but not in the base"));
    }
    let frozen_of =
        |name: &str| frozen.and_then(|f| f.tensors().find(|t| t.name().strip_prefix("param.") == Some(name)));
    for before in base.tensors() {
        let name = before.name();
        let Some(mut after) = tuned.get(name) else {
            findings.mismatches.push(Mismatch::new(name, "it is in the base but not in the checkpoint"));
            continue;
        };
        let deltas: Vec<_> = modules.iter().filter(|m| m.0 == name).map(|m| (m.1, m.2)).collect();
        let held = frozen_of(name);
        let adapted = !deltas.is_empty() || held.is_some();
        if adapted {
            findings.expect(frozen.is_none() || held.is_some(), name, || {
                "the checkpoint lies inside a cycle and its training state lacks the frozen weight".into()
            });
            after = held.unwrap_or(after);
        }
        findings.expect(before.shape() == after.shape(), name, || {
            format!("its shape is {:?} in the base but {:?} in the checkpoint", before.shape(), after.shape())
        });
        jobs.push(Weight { name, base: before, tuned: after, deltas, adapted, rounds });
    }
    Ok(())
}

/// Rows recomputed at a time.
const BLOCK: usize = 256;

impl Weight<'_> {
    fn need(&self) -> Need {
        Need { cost: (self.base.elements() * (self.deltas.len() + 1)) as f64, ..Need::default() }
    }

    fn check(&self) -> Result<(WeightCheck, Option<Mismatch>)> {
        if !self.adapted {
            let same = self.base.dtype() == self.tuned.dtype() && self.base.bytes() == self.tuned.bytes();
            let kind = if same { WeightKind::Unchanged } else { WeightKind::TrainedInFull };
            let check = WeightCheck { name: self.name.into(), kind, max_error: None, share_of_bound: None };
            return Ok((check, None));
        }
        let (m, n) = self.base.matrix_shape()?;
        let mut deltas = Vec::new();
        for (module, fan_in_fan_out) in &self.deltas {
            let delta = Merge::new(module.low_rank(*fan_in_fan_out)?);
            if delta.factors.shape() != (m, n) {
                let detail = format!("a cycle's delta is {:?}, the weight [{m}, {n}]", delta.factors.shape());
                let check = WeightCheck {
                    name: self.name.into(),
                    kind: WeightKind::Merged,
                    max_error: None,
                    share_of_bound: None,
                };
                return Ok((check, Some(Mismatch::new(self.name, detail))));
            }
            deltas.push(delta);
        }
        let rounding = Rounding::of(self.tuned.dtype(), n, self.rounds)?;
        let mut worst = Worst::default();
        for first in (0..m).step_by(BLOCK) {
            self.compare_rows(first..m.min(first + BLOCK), n, &deltas, rounding, &mut worst)?;
        }
        let check = WeightCheck {
            name: self.name.into(),
            kind: WeightKind::Merged,
            max_error: Some(worst.max_error),
            share_of_bound: Some(worst.share),
        };
        let mismatch = (worst.share > 1.0).then(|| {
            let (i, j) = worst.index;
            Mismatch::new(
                self.name,
                format!(
                    "base + cycles gives {:.9e} at [{i}, {j}], the checkpoint holds {:.9e}: off by {:.1e}, rounding allows {:.1e}",
                    worst.expected, worst.found, (worst.expected - worst.found).abs(), worst.bound
                ),
            )
        });
        Ok((check, mismatch))
    }

    fn compare_rows(
        &self,
        rows: std::ops::Range<usize>,
        n: usize,
        merges: &[Merge],
        rounding: Rounding,
        worst: &mut Worst,
    ) -> Result<()> {
        let count = rows.len();
        let read = |tensor: &Tensor| -> Result<Vec<f64>> {
            let mut values = vec![0.0; count * n];
            tensor.read_f64(rows.start * n, &mut values)?;
            Ok(values)
        };
        let (mut sum, found) = (read(&self.base)?, read(&self.tuned)?);
        let mut bound = vec![0.0; count * n];
        let mut delta = Array2::zeros((count, n));
        for merge in merges {
            merge.factors.rows(rows.clone(), delta.view_mut());
            for (at, d) in delta.iter().enumerate() {
                sum[at] += d;
                bound[at] += merge.error * merge.row_norms[rows.start + at / n] * merge.column_norms[at % n];
            }
            rounding.add(&sum, &mut bound);
        }
        for (at, (&expected, &found)) in sum.iter().zip(&found).enumerate() {
            let (error, bound) = ((expected - found).abs(), 1.01 * bound[at]);
            // Without a merge the bound is 0 and only equality will do; NaN is never equal.
            let share = if error == 0.0 { 0.0 } else { error / bound };
            worst.max_error = worst.max_error.max(error);
            if share > worst.share || share.is_nan() {
                let share = if share.is_nan() { f64::INFINITY } else { share };
                let index = (rows.start + at / n, at % n);
                *worst = Worst { max_error: worst.max_error, share, index, expected, found, bound };
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Worst {
    max_error: f64,
    share: f64,
    index: (usize, usize),
    expected: f64,
    found: f64,
    bound: f64,
}

/// One cycle's delta and the bound on the error of its product in f32.
struct Merge {
    factors: LowRank<f64>,
    /// `(r + 2) u / (1 - (r + 2) u) |scaling|`
    error: f64,
    row_norms: Vec<f64>,
    column_norms: Vec<f64>,
}

impl Merge {
    fn new(factors: LowRank<f64>) -> Self {
        let nu = (factors.r() + 2) as f64 * f64::from(f32::EPSILON) / 2.0;
        let norm = |v: ndarray::ArrayView1<f64>| v.dot(&v).sqrt();
        Merge {
            error: nu / (1.0 - nu) * factors.scaling.abs(),
            row_norms: factors.left.rows().into_iter().map(norm).collect(),
            column_norms: factors.right.columns().into_iter().map(norm).collect(),
            factors,
        }
    }
}

/// Largest error of storing numbers.
#[derive(Clone, Copy)]
enum Rounding {
    /// Each by itself: `relative * |x| + absolute`.
    Float { relative: f64, absolute: f64 },
    /// So many neighbours by the largest of them, times this share; and all by the largest of all, times the share `scales`.
    Blocks { len: usize, share: f64, scales: f64 },
}

impl Rounding {
    /// Of a matrix with `n` columns that is stored as `stored`.
    fn of(stored: Dtype, n: usize, rounds: Rounds) -> Result<Rounding> {
        match rounds.quantised {
            Some("nf4") => return Ok(Rounding::Blocks { len: 64, share: LARGEST_GAP / 2.0, scales: 0.45 / 64.0 }),
            Some("int8") => return Ok(Rounding::Blocks { len: n, share: 0.5 / 127.0, scales: 0.0 }),
            Some(other) => {
                return Err(Error::request(format!(
                    "the manifest says that weights are '{other}', expected nf4 or int8"
                )));
            }
            None => {}
        }
        // The merge itself computes in f32, whatever it is stored in.
        let coarser = if stored == Dtype::F64 { Dtype::F32 } else { stored };
        if !dtype::is_float(coarser) {
            return Err(Error::request(format!("a merged weight is stored as {stored:?}, expected floating point")));
        }
        let units = if rounds.by_chance { 1.0 } else { 0.5 };
        Ok(Rounding::Float { relative: units * dtype::ulp(coarser, 1.0), absolute: units * dtype::ulp(coarser, 0.0) })
    }

    /// Adds to what each of these numbers may be off by already. They are whole rows, from the first of a block on.
    fn add(self, x: &[f64], bound: &mut [f64]) {
        match self {
            Rounding::Float { relative, absolute } => {
                bound.iter_mut().zip(x).for_each(|(bound, x)| *bound += relative * x.abs() + absolute);
            }
            Rounding::Blocks { len, share, scales } => {
                let largest =
                    |bound: &[f64], x: &[f64]| bound.iter().zip(x).fold(0f64, |most, (b, x)| most.max(x.abs() + b));
                let off = scales * largest(bound, x);
                for (bound, x) in bound.chunks_mut(len).zip(x.chunks(len)) {
                    let off = off + share * largest(bound, x);
                    bound.iter_mut().for_each(|bound| *bound += off);
                }
            }
        }
    }
}
