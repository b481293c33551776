//! The story the manifest tells: cycles follow each other without a gap, and each is what it claims.

use super::{Findings, metrics, settings};
use crate::{
    adapter::{Adapter, LoraModule},
    error::Result,
    progress::Progress,
    run::{Manifest, RunDir},
    spectrum::{
        factored,
        svd::{Method, SvdOptions},
    },
    work_queue::{self, Budget, Need},
};

/// Numbers, folders and steps of the cycles, and the updates of `metrics.jsonl`.
pub(super) fn check(dir: &RunDir, manifest: &Manifest) -> Result<Findings> {
    let mut findings = Findings::default();
    let base_step = manifest.base.as_ref().map(|b| b.step);
    check_mode(manifest, &mut findings);
    if manifest.cycles.is_empty() {
        findings.notes.push("no cycle is finished: there is no update to recompute".into());
    } else {
        findings.expect(base_step.is_some(), "base", || "the manifest lists cycles but no base they start from".into());
    }
    findings.expect(base_step.is_none_or(|step| step >= manifest.first_step), "base", || {
        format!("it is of step {}, the run began at {}", base_step.unwrap_or(0), manifest.first_step)
    });
    let mut expected = base_step.unwrap_or(0);
    for (number, record) in (1..).zip(&manifest.cycles) {
        let what = format!("cycle {}", record.cycle);
        findings.expect(record.cycle == number, &*what, || format!("expected cycle {number} at this place"));
        let folder = RunDir::cycle_folder(record.cycle);
        findings.expect(record.folder == folder, &*what, || {
            format!("its folder is '{}', expected '{}'", record.folder.display(), folder.display())
        });
        findings.expect(record.first_step == expected, &*what, || {
            format!("it starts after step {}, the one before it ends at {expected}", record.first_step)
        });
        findings.expect(record.first_step < record.last_step, &*what, || {
            format!("it ends at step {}, not after its start at {}", record.last_step, record.first_step)
        });
        expected = record.last_step;
    }
    if let Some(checkpoint) = &manifest.checkpoint {
        let folder = RunDir::checkpoint_folder(checkpoint.step);
        findings.expect(checkpoint.folder == folder, "checkpoint", || {
            format!("its folder is '{}', expected '{}'", checkpoint.folder.display(), folder.display())
        });
        findings.expect(
            !manifest.finished || manifest.cycles.is_empty() || checkpoint.step == expected,
            "checkpoint",
            || format!("the final checkpoint is of step {}, the last cycle ends at {expected}", checkpoint.step),
        );
    } else {
        findings.expect(!manifest.finished, "checkpoint", || "the run is finished but lists no checkpoint".into());
    }
    findings.detail = format!("{} cycles, last step {expected}", manifest.cycles.len());
    metrics::check(dir, manifest, &mut findings);
    settings::check(dir, manifest, &mut findings);
    Ok(findings)
}

/// What a run of its mode must have.
fn check_mode(manifest: &Manifest, findings: &mut Findings) {
    let (mode, cycles) = (manifest.mode.as_str(), manifest.cycles.len());
    match mode {
        "full" => {
            findings.expect(cycles == 0 && manifest.base.is_none(), "mode", || {
                format!("it is full, which has no base and no cycles, but {cycles} cycles are listed")
            });
        }
        "lora" | "relora" => {
            findings.expect(!manifest.finished || manifest.base.is_some(), "base", || {
                format!("the run is finished and of mode {mode}, but the manifest lists no base")
            });
            findings.expect(!manifest.finished || cycles > 0, "cycles", || {
                format!("the run is finished and of mode {mode}, but the manifest lists no cycle")
            });
        }
        _ => findings.expect(false, "mode", || format!("it is '{mode}', expected full, lora or relora")),
    }
}

/// Each adapter has the rank and the scale of its record, in its configuration and in its factors. A product `B @ A`
/// of rank r has r singular values above f64 rounding; more than r it cannot have.
pub(super) fn check_cycles(manifest: &Manifest, cycles: &[Adapter], progress: &Progress) -> Result<Findings> {
    let mut findings = Findings::default();
    let mut factors = Vec::new();
    for (record, adapter) in manifest.cycles.iter().zip(cycles) {
        for module in adapter.lora_modules() {
            let module = module?;
            let what = format!("cycle {}, '{}'", record.cycle, module.name);
            findings.expect(module.r == record.r, &*what, || {
                format!("its rank is {}, the manifest says {}", module.r, record.r)
            });
            findings.expect((module.scaling - record.scaling).abs() <= 1e-12 * record.scaling.abs(), &*what, || {
                format!("its scale is {}, the manifest says {}", module.scaling, record.scaling)
            });
            factors.push((what, record.r, module, adapter.config().fan_in_fan_out));
        }
    }
    let count = factors.len();
    if !findings.mismatches.is_empty() {
        findings.detail = format!("{count} deltas");
        return Ok(findings);
    }
    let bar = progress.count("ranks", count as u64);
    let need = |(_, _, module, _): &(String, usize, LoraModule, bool)| {
        let cost = (module.a.elements() + module.b.elements()) as f64;
        Need { cost, ..Need::default() }
    };
    let needs: Vec<Need> = factors.iter().map(need).collect();
    let ranks = work_queue::run(
        &needs,
        Budget::NONE,
        || (),
        |(), i| {
            progress.check()?;
            bar.inc(1);
            let (_, _, module, fan_in_fan_out) = &factors[i];
            let delta = module.low_rank(*fan_in_fan_out)?;
            let (m, n) = delta.shape();
            let sigma = factored::singular_values(&[delta], SvdOptions::cpu(Method::Dense), 0.0)?
                .pop()
                .map(|v| v.own.values)
                .unwrap_or_default();
            let s1 = sigma.first().copied().unwrap_or(0.0);
            let rounding = m.max(n) as f64 * f64::EPSILON * s1;
            Ok((sigma.iter().filter(|&&s| s > rounding).count(), m.min(n)))
        },
    );
    bar.finish_and_clear();
    for ((what, r, ..), (rank, full)) in factors.iter().zip(ranks?) {
        let claimed = (*r).min(full);
        findings
            .expect(rank == claimed, &**what, || format!("its delta has rank {rank}, the manifest claims {claimed}"));
    }
    findings.detail = format!("{count} deltas");
    Ok(findings)
}
