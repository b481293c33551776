//! Measures weights: singular values, noise edge and measures of each.

use super::{
    Matrix, Measures, Options, Reason, Skipped, factored,
    factors::CycleFactors,
    measures::{self, BELOW},
    noise,
    svd::{self, Sigma, SvdOptions},
    task::{Delta, Task, skipped},
};
use crate::{
    delta::{LowRank, Planned, forms::InMemory},
    error::{Error, Kind, Result},
    progress::Progress,
    threads,
    work_queue::{self, Budget, Need},
};
use ndarray::{Array2, s};
use std::convert::Infallible;

/// Measures `tasks`, some of `of` tasks, and warns about what cannot be measured.
pub(super) fn measure_all(
    tasks: &[&Task],
    of: usize,
    options: &Options,
    svd: SvdOptions,
    progress: &Progress,
) -> Result<Vec<Measured>> {
    let bar = progress.count("singular values", tasks.len() as u64);
    let needs: Vec<Need> = tasks.iter().map(|task| task.need(svd)).collect();
    let budget = Budget { memory: memory_budget(tasks), gpu_memory: gpu_budget(svd)? };
    let work = |(): &mut (), i: usize| {
        progress.check()?;
        let result = measure(tasks[i], options, svd);
        bar.inc(1);
        result
    };
    let run = || work_queue::run(&needs, budget, || (), work);
    // One thread per matrix as soon as the whole has several: the bytes do not depend on how it is divided.
    let results = if of > 1 { threads::with_serial_blas(run) } else { run() };
    bar.finish_and_clear();
    let results = results?;
    for result in &results {
        if let Measured::Skipped(skip) = result {
            progress.warn(&format!("{} ('{}') is not measured: {}", skip.name, skip.label, skip.detail));
        }
    }
    Ok(results)
}

/// Bytes that matrices in flight may hold together: with what else a process needs, below 6 of the largest in f64.
fn memory_budget(tasks: &[&Task]) -> f64 {
    5.5 * tasks.iter().map(|t| 8.0 * t.shape.0 as f64 * t.shape.1 as f64).fold(0.0, f64::max)
}

/// The same for a GPU: most of what is free when measuring begins.
fn gpu_budget(svd: SvdOptions) -> Result<f64> {
    svd.gpu.map_or(Ok(0.0), |gpu| Ok(0.9 * gpu.free_memory()? as f64))
}

/// What became of one task.
pub(super) enum Measured {
    Matrices(Vec<Matrix>),
    Skipped(Skipped),
}

fn measure(task: &Task, options: &Options, svd: SvdOptions) -> Result<Measured> {
    match &task.delta {
        Delta::Difference(pair) => {
            let mut noise = pair.noise();
            let tolerance = tolerance(task, options);
            let block = |rows, columns, out: &mut [f64]| pair.block(rows, columns, out, &mut noise);
            match svd::streamed(pair.shape, svd, tolerance, BELOW, block)? {
                Ok(sigma) => {
                    let edge = pair.noise_edge(noise)?;
                    Ok(Measured::Matrices(vec![matrix(task, options, None, sigma, edge)]))
                }
                Err(found) => non_finite(task, options, found.describe(pair)),
            }
        }
        Delta::Factored(factors) => match factors.read() {
            Ok(deltas) => Ok(Measured::Matrices(measure_factors(task, options, svd, factors, &deltas)?)),
            Err(e) if e.kind == Kind::Request => non_finite(task, options, e.message),
            Err(e) => Err(e),
        },
        Delta::Adapter(planned) => match measure_adapter(planned, svd, tolerance(task, options)) {
            Ok(sigma) => Ok(Measured::Matrices(vec![matrix(task, options, None, sigma, 0.0)])),
            Err(e) if e.kind == Kind::Request => non_finite(task, options, e.message),
            Err(e) => Err(e),
        },
    }
}

/// From the factors of the update where it is one product of them, else of the matrix itself.
fn measure_adapter(planned: &Planned, svd: SvdOptions, tolerance: f64) -> Result<Sigma> {
    let mut update = planned.build_f64()?;
    if let Some([(0, product)]) = update.factors() {
        let values = factored::singular_values(std::slice::from_ref(product), svd, tolerance)?.pop();
        return values.map(|v| v.own).ok_or_else(|| Error::environment("an update has no singular values"));
    }
    let mut dense = Array2::zeros(planned.shape);
    // Such an update is only added: what the weight is does not matter.
    update.prepare(&InMemory(Array2::zeros(planned.shape)))?;
    update.rows(0..planned.shape.0, Array2::zeros((0, 0)).view(), dense.view_mut())?;
    let block = |rows, columns, out: &mut [f64]| {
        out.iter_mut().zip(dense.slice(s![rows, columns])).for_each(|(out, x)| *out = *x);
        Ok(Ok::<(), Infallible>(()))
    };
    let Ok(sigma) = svd::streamed(planned.shape, svd, tolerance, BELOW, block)?;
    Ok(sigma)
}

fn measure_factors(
    task: &Task,
    options: &Options,
    svd: SvdOptions,
    factors: &CycleFactors,
    deltas: &[LowRank<f64>],
) -> Result<Vec<Matrix>> {
    let values = factored::singular_values(deltas, svd, tolerance(task, options))?;
    let Some(cycles) = &task.cycles else {
        return Ok(values.into_iter().map(|v| matrix(task, options, None, v.own, 0.0)).collect());
    };
    let merge = factors.noise()?;
    let mut matrices = Vec::new();
    for (count, (&cycle, v)) in (1u32..).zip(cycles.iter().zip(values)) {
        matrices.push(matrix(task, options, Some((cycle, false)), v.own, noise::edge(&merge, 1.0)));
        matrices.push(matrix(task, options, Some((cycle, true)), v.cumulative, noise::edge(&merge, f64::from(count))));
    }
    Ok(matrices)
}

fn tolerance(task: &Task, options: &Options) -> f64 {
    options.rank_tolerance.unwrap_or_else(|| measures::default_tolerance(task.shape))
}

fn matrix(task: &Task, options: &Options, cycle: Option<(u64, bool)>, sigma: Sigma, noise_edge: f64) -> Matrix {
    let measures = Measures::new(&sigma.values, task.shape, tolerance(task, options), noise_edge);
    Matrix {
        name: task.name.clone(),
        label: task.label.clone(),
        shape: [task.shape.0, task.shape.1],
        dtype: format!("{:?}", task.dtype),
        module: task.module.module.clone(),
        layer: task.module.layer,
        r: task.r,
        cycle: cycle.map(|c| c.0),
        cumulative: cycle.map(|c| c.1),
        measures,
        device: options.gpu.as_ref().map(|gpu| match sigma.on_gpu {
            true => format!("cuda:{}", gpu.ordinal),
            false => "cpu".to_owned(),
        }),
        sigma: options.sigma.then_some(sigma.values),
    }
}

fn non_finite(task: &Task, options: &Options, what: String) -> Result<Measured> {
    if options.skip_nonfinite {
        return Ok(Measured::Skipped(skipped(&task.name, &task.label, Reason::NonFinite, what, true)));
    }
    Err(Error::request(format!("tensor '{}' of source '{}': {what}", task.name, task.label))
        .help("pass --skip-nonfinite to report it and go on"))
}
