//! The difference of two checkpoints as a PEFT adapter: a truncated SVD per changed matrix.
//!
//! `T - W0 = U S Vᵀ` is stored as `A = sqrt(S) Vᵀ`, `B = U sqrt(S)` with `lora_alpha = r`, so that the scale is 1.

mod factor;
mod plan;
mod result;

pub use result::{ChangedTensor, ExtractReport, ExtractTotals, ExtractedMatrix};

use crate::{
    adapter::{AdapterConfig, FullTensor, NewModule, save_with},
    checkpoint::{Checkpoint, Filter, Tensor},
    error::{Error, Result},
    inputs::Inputs,
    progress::Progress,
    staged::{Holds, StagedDir, Target},
    threads,
};
use factor::Factors;
use ndarray::Array2;
use plan::{Changed, Plan};
use rayon::prelude::*;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// How large the factors are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// The same rank for all.
    Rank(usize),
    /// For each matrix the smallest rank that holds this share of `||dW||^2`.
    Energy(f64),
}

/// What to extract, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The checkpoint before (W0).
    pub base: PathBuf,
    /// The checkpoint after (T).
    pub tuned: PathBuf,
    /// The adapter folder to create.
    pub output: PathBuf,
    /// Rank or energy.
    pub size: Size,
    /// Which tensors are looked at.
    pub filter: Filter,
    /// StorageFormat changed tensors that cannot be factored in full.
    pub save_rest: bool,
    /// Replace the output if it exists.
    pub force: bool,
}

/// Extracts. On success the adapter is complete; on an error, or when interrupted, nothing is left behind.
pub fn run(options: &Options, progress: &Progress) -> Result<ExtractReport> {
    let inputs = Inputs::of([&options.base, &options.tuned]);
    let target = Target::folder(&options.output, Holds::Adapter, options.force, &inputs)?;
    match options.size {
        Size::Rank(0) => return Err(Error::request("rank 0 holds nothing, expected at least 1")),
        Size::Energy(share) if !(share > 0.0 && share <= 1.0) => {
            return Err(Error::request(format!(
                "an energy of {share} is no share, expected more than 0 and at most 1"
            ))
            .help("0.99 keeps 99% of each squared norm"));
        }
        _ => {}
    }
    let (base, tuned) = (Checkpoint::open(&options.base)?, Checkpoint::open(&options.tuned)?);
    let plan = Plan::new(&base, &tuned, options)?;
    let staged = StagedDir::create(target)?;
    let factors = factors(&plan, options.size, progress)?;
    let rest = norms(&plan.rest, progress)?;
    write(&plan, &factors, options, staged.path())?;
    let report = report(options, &plan, &factors, rest);
    if !options.save_rest && !report.left_out.is_empty() {
        progress.warn(&format!(
            "left out {} of the changed tensors, first: '{}'; --save-rest stores them in full",
            report.left_out.len(),
            report.left_out[0].name
        ));
    }
    staged.commit()?;
    Ok(report)
}

fn factors(plan: &Plan, size: Size, progress: &Progress) -> Result<Vec<Factors>> {
    let bar = progress.count("factoring", plan.matrices.len() as u64);
    // Whole matrices at a time, one per thread.
    let all = threads::with_serial_blas(|| {
        let one = |m: &Changed| {
            progress.check()?;
            let shape = m.tuned.matrix_shape()?;
            let delta = Array2::from_shape_vec(shape, factor::difference(&m.base, &m.tuned)?)
                .map_err(|e| Error::environment(format!("tensor '{}': {e}", m.tuned.name())))?;
            let factors = factor::factor(delta, size, plan.is_transposed(&m.tuned))?;
            bar.inc(1);
            Ok(factors)
        };
        plan.matrices.par_iter().with_max_len(1).map(one).collect::<Result<Vec<_>>>()
    })?;
    bar.finish_and_clear();
    Ok(all)
}

fn norms(changed: &[Changed], progress: &Progress) -> Result<Vec<ChangedTensor>> {
    let one = |c: &Changed| {
        progress.check()?;
        let delta = factor::difference(&c.base, &c.tuned)?;
        Ok(ChangedTensor {
            name: c.tuned.name().to_owned(),
            shape: c.tuned.shape().to_vec(),
            delta_norm: delta.iter().map(|d| d * d).sum::<f64>().sqrt(),
        })
    };
    changed.iter().map(one).collect()
}

fn write(plan: &Plan, factors: &[Factors], options: &Options, folder: &Path) -> Result<()> {
    let names: Vec<&str> = plan.matrices.iter().map(|m| plan::module(m.tuned.name())).collect();
    let mut modules = Vec::with_capacity(factors.len());
    for ((m, &name), f) in plan.matrices.iter().zip(&names).zip(factors) {
        let (rows, columns) = m.tuned.matrix_shape()?;
        let (out_features, in_features) = if plan.is_transposed(&m.tuned) { (columns, rows) } else { (rows, columns) };
        modules.push(NewModule { name, r: f.r, out_features, in_features, a: &f.a, b: &f.b });
    }
    let ranks: Vec<usize> = factors.iter().map(|f| f.r).collect();
    let mut config = configuration(plan, &names, &ranks)?;
    config.base_model_name_or_path = Some(options.base.display().to_string());
    let mut saved: Vec<(&str, Tensor)> = Vec::new();
    if options.save_rest {
        saved.extend(plan.rest.iter().map(|c| (c.tuned.name(), c.tuned)));
        // Whole names: PEFT compares with the end of a module's name, and `norm` would be `input_layernorm`, too.
        let whole = saved.iter().filter(|(name, _)| !plan.is_bias_of_factored(name));
        let mut whole: Vec<String> = whole.map(|(name, _)| plan::module(name).to_owned()).collect();
        whole.dedup();
        if saved.iter().any(|(name, _)| plan.is_bias_of_factored(name)) {
            config.bias = "all".to_owned();
        }
        config.modules_to_save = Some(whole);
        if let Some(head) = plan.tied_head() {
            saved.push(head);
            config.other.insert("ensure_weight_tying".into(), true.into());
        }
    }
    let values = saved.iter().map(|(_, t)| t.to_f32()).collect::<Result<Vec<_>>>()?;
    // PEFT's layers keep the bias below the factors.
    let stored = |name: &str| match plan.is_bias_of_factored(name) {
        true => format!("{}.base_layer.bias", plan::module(name)),
        false => name.to_owned(),
    };
    let names: Vec<String> = saved.iter().map(|(name, _)| stored(name)).collect();
    let full: Vec<FullTensor> = (saved.iter().zip(&values).zip(&names))
        .map(|(((_, t), values), name)| FullTensor { name, shape: t.shape(), values })
        .collect();
    let metadata = BTreeMap::from([
        ("extracted_by".to_owned(), concat!("relora-kit ", env!("CARGO_PKG_VERSION")).to_owned()),
        ("base".to_owned(), options.base.display().to_string()),
        ("tuned".to_owned(), options.tuned.display().to_string()),
    ]);
    save_with(folder, &config, &modules, &full, &metadata)
}

/// The commonest rank is the adapter's, the others stand in its patterns; `lora_alpha` equals the rank everywhere.
fn configuration(plan: &Plan, names: &[&str], ranks: &[usize]) -> Result<AdapterConfig> {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    ranks.iter().for_each(|&r| *counts.entry(r).or_default() += 1);
    let r = counts.iter().max_by_key(|(_, n)| **n).map_or(1, |(&r, _)| r);
    let targets = plan.targets(names);
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    let mut config = AdapterConfig::new(r, r as f64, &targets);
    config.fan_in_fan_out = plan.matrices.iter().any(|m| plan.is_transposed(&m.tuned));
    for (&name, &rank) in names.iter().zip(ranks).filter(|(_, rank)| **rank != r) {
        for pattern in [&mut config.rank_pattern, &mut config.alpha_pattern] {
            pattern
                .push(&regex::escape(name), rank as f64)
                .map_err(|e| Error::request(format!("module '{name}' cannot be a pattern: {e}")))?;
        }
    }
    Ok(config)
}

fn report(options: &Options, plan: &Plan, factors: &[Factors], rest: Vec<ChangedTensor>) -> ExtractReport {
    // A matrix without a change is not in the plan: no division by 0.
    let matrices = plan.matrices.iter().zip(factors).map(|(m, f)| ExtractedMatrix {
        name: m.tuned.name().to_owned(),
        shape: m.tuned.shape().to_vec(),
        rank: f.r,
        delta_norm: f.energy.sqrt(),
        energy: (f.captured / f.energy).min(1.0),
        relative_error: (f.residual / f.energy).sqrt(),
    });
    let matrices: Vec<_> = matrices.collect();
    let sum = |of: fn(&Factors) -> f64| factors.iter().map(of).sum::<f64>();
    let energy = sum(|f| f.energy);
    let totals = ExtractTotals {
        matrices: matrices.len(),
        rank_min: factors.iter().map(|f| f.r).min().unwrap_or(0),
        rank_max: factors.iter().map(|f| f.r).max().unwrap_or(0),
        parameters: factors.iter().map(|f| f.a.len() + f.b.len()).sum(),
        delta_norm: energy.sqrt(),
        // Where nothing is factored, nothing is missed.
        energy: if energy > 0.0 { (sum(|f| f.captured) / energy).min(1.0) } else { 1.0 },
        relative_error: if energy > 0.0 { (sum(|f| f.residual) / energy).sqrt() } else { 0.0 },
    };
    let (saved_in_full, left_out) = if options.save_rest { (rest, Vec::new()) } else { (Vec::new(), rest) };
    ExtractReport {
        schema: 1,
        base: options.base.clone(),
        tuned: options.tuned.clone(),
        output: options.output.clone(),
        matrices,
        saved_in_full,
        left_out,
        unchanged: plan.unchanged,
        totals,
    }
}
