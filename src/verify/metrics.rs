//! `metrics.jsonl` against the manifest: both tell of the same updates, cycles and merges.

use super::{Findings, Mismatch};
use crate::{
    inputs,
    run::{CycleRecord, Manifest, RunDir},
};
use serde_json::Value;

/// Bytes of the largest log that is read: ten million updates take less.
const MAX_BYTES: u64 = 8 << 30;

/// Updates are numbered from the first one on without a gap. Each belongs to the warm start, to the cycle whose record
/// covers it, or to the one that is not finished; every cycle that ended has a record, and every record its updates.
pub(super) fn check(dir: &RunDir, manifest: &Manifest, findings: &mut Findings) {
    let path = dir.metrics_path();
    let text = match inputs::read(&path, MAX_BYTES).map(String::from_utf8) {
        Ok(Ok(text)) => text,
        Ok(Err(_)) => return findings.mismatches.push(Mismatch::new("metrics.jsonl", "it is not UTF-8 text")),
        Err(_) if !path.exists() => {
            let detail = "the file is missing: nothing tells of the run's updates";
            return findings.mismatches.push(Mismatch::new("metrics.jsonl", detail));
        }
        Err(e) => return findings.mismatches.push(Mismatch::new("metrics.jsonl", e.message)),
    };
    let mut log = Log { manifest, step: manifest.first_step, cycle: 0 };
    for (line, text) in (1..).zip(text.lines()) {
        let checked = match serde_json::from_str::<Value>(text) {
            Ok(row) => log.take(&row),
            Err(_) => Err("it is not JSON".into()),
        };
        if let Err(detail) = checked {
            return findings.mismatches.push(Mismatch::new(format!("metrics.jsonl line {line}"), detail));
        }
    }
    log.check_end(findings);
}

/// What the rows so far say.
struct Log<'a> {
    manifest: &'a Manifest,
    /// Of the last update.
    step: u64,
    /// Of the last update; 0 in the warm start.
    cycle: u64,
}

impl Log<'_> {
    fn take(&mut self, row: &Value) -> Result<(), String> {
        if row.get("retention").is_some() {
            return self.take_merge(row);
        }
        if row.get("eval_loss").is_some() {
            return match row["step"].as_u64() == Some(self.step) {
                true => Ok(()),
                false => Err(format!("it evaluates step {}, the update before it is {}", row["step"], self.step)),
            };
        }
        let step = self.step.checked_add(1).ok_or("the number of the update overflows")?;
        if row["step"].as_u64() != Some(step) {
            return Err(format!("expected update {step}, found {}", row["step"]));
        }
        let cycle = row["cycle"].as_u64().ok_or("it names no cycle")?;
        let restarts = &row["restarts"];
        if !restarts.is_null() && restarts.as_u64() != Some(cycle.saturating_sub(1)) {
            return Err(format!("it counts {restarts} restarts in cycle {cycle}"));
        }
        let expected = self.expected_cycle(step);
        if cycle != expected {
            return Err(format!("update {step} is of cycle {cycle}, the manifest says {expected}"));
        }
        (self.step, self.cycle) = (step, cycle);
        Ok(())
    }

    /// The cycle of an update, as the manifest has it: after the records comes the one that is not finished.
    fn expected_cycle(&self, step: u64) -> u64 {
        let (Some(base), cycles) = (&self.manifest.base, &self.manifest.cycles) else { return 0 };
        if step <= base.step {
            return 0;
        }
        let covers = |c: &&CycleRecord| c.first_step < step && step <= c.last_step;
        cycles.iter().find(covers).map_or(cycles.len() as u64 + 1, |c| c.cycle)
    }

    fn take_merge(&self, row: &Value) -> Result<(), String> {
        let merged = &row["merged_cycle"];
        let record = self.manifest.cycles.iter().find(|c| merged.as_u64() == Some(c.cycle));
        let Some(record) = record else {
            return Err(format!("it merges cycle {merged}, which the manifest does not list"));
        };
        if row["step"].as_u64() != Some(record.last_step) || self.step != record.last_step {
            return Err(format!(
                "it merges cycle {merged} at step {}, the manifest says {}",
                row["step"], record.last_step
            ));
        }
        match record.retention.is_some_and(|kept| row["retention"].as_f64() == Some(kept)) {
            true => Ok(()),
            false => {
                Err(format!("cycle {merged} kept {} of its delta, the manifest has another number", row["retention"]))
            }
        }
    }

    fn check_end(&self, findings: &mut Findings) {
        let (manifest, what) = (self.manifest, "metrics.jsonl");
        let claimed = manifest.checkpoint.as_ref().map_or(0, |c| c.step);
        let step = self.step;
        findings
            .expect(step >= claimed, what, || format!("it ends at update {step}, the checkpoint is of step {claimed}"));
        if manifest.finished {
            findings.expect(step <= claimed, what, || {
                format!("it ends at update {step}, the finished run's checkpoint is of step {claimed}")
            });
            let cycles = manifest.cycles.len() as u64;
            findings.expect(self.cycle == cycles, what, || {
                format!("it ends in cycle {}, the finished run lists {cycles} cycles", self.cycle)
            });
        }
    }
}
