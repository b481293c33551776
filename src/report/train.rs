//! Training and evaluation as tables.

use super::{Report, table::Table, units::bytes};
use crate::{
    ops::OperationTime,
    train::{config::Mode, evaluate::Evaluation, plan::Plan, summary::Summary},
};
use std::time::Duration;

pub(super) fn facts(title: &str, rows: Vec<(&str, String)>) -> Vec<Table> {
    let mut table = Table::new(title, &["", ""]);
    rows.into_iter().for_each(|(name, value)| table.row(vec![name.to_owned(), value]));
    vec![table]
}

/// Where the time went, what took longest first.
fn operations(times: &[OperationTime]) -> Table {
    let mut table = Table::new("time per operation", &["operation", "calls", "seconds", "share", "GFLOP/s"]);
    let total: f64 = times.iter().map(|t| t.seconds).sum();
    for t in times {
        table.row(vec![
            t.operation.clone(),
            t.calls.to_string(),
            format!("{:.3}", t.seconds),
            format!("{:.1}%", 100.0 * t.seconds / total.max(f64::MIN_POSITIVE)),
            t.gflops.map_or(String::new(), |g| format!("{g:.1}")),
        ]);
    }
    table
}

impl Report for Summary {
    fn tables(&self) -> Vec<Table> {
        let mut rows = vec![
            ("updates", self.steps.to_string()),
            ("cycles merged", self.cycles.to_string()),
            ("tokens", self.tokens.to_string()),
        ];
        rows.extend(self.loss.map(|loss| ("training loss (last tenth)", format!("{loss:.4}"))));
        if let Some(e) = &self.evaluation {
            rows.push(("validation loss", format!("{:.4}", e.loss)));
            rows.push(("validation perplexity", format!("{:.3}", e.perplexity)));
        }
        if self.skipped > 0 {
            rows.push(("updates skipped (not finite)", self.skipped.to_string()));
        }
        if self.world_size > 1 {
            rows.push(("processes", self.world_size.to_string()));
        }
        rows.extend(self.tokens_per_s.map(|speed| ("tokens/s", format!("{speed:.0}"))));
        rows.push(("time", indicatif::HumanDuration(Duration::from_secs_f64(self.seconds)).to_string()));
        if let Some(peak) = self.peak_memory {
            rows.push(("peak memory", bytes(peak)));
        }
        if let Some(peak) = self.device_peak_memory {
            rows.push(("peak memory of the device", bytes(peak)));
        }
        if let Some(share) = self.host_wait {
            let graphs = if self.cuda_graphs { " (with CUDA graphs in the end)" } else { "" };
            rows.push(("host waits for the GPU", format!("{:.0}% of the time{graphs}", 100.0 * share)));
        }
        rows.push(("final checkpoint", self.checkpoint.display().to_string()));
        let mut tables = facts(&format!("run {}", self.run.display()), rows);
        if !self.operations.is_empty() {
            tables.push(operations(&self.operations));
        }
        tables
    }
}

impl Report for Plan {
    fn tables(&self) -> Vec<Table> {
        let checkpointing = if self.activation_checkpointing { ", activation checkpointing" } else { "" };
        let title = format!(
            "memory of training, {} windows of {} tokens, r = {}{checkpointing}",
            self.batch_size, self.max_length, self.lora_r
        );
        let header = [
            "model",
            "mode",
            "dtype",
            "parameters",
            "trained",
            "weights",
            "gradients",
            "optimiser",
            "activations",
            "total",
            "of full",
            "MFLOP/token",
        ];
        let mut table = Table::new(title, &header);
        for n in &self.needs {
            let dtype = if n.dtype == "4bit" { "bf16" } else { n.dtype };
            let full = self.needs.iter().find(|f| f.model == n.model && f.mode == Mode::Full && f.dtype == dtype);
            table.row(vec![
                n.model.clone(),
                format!("{:?}", n.mode).to_lowercase(),
                n.dtype.to_owned(),
                millions(n.parameters),
                millions(n.trained),
                bytes(n.weights),
                bytes(n.gradients),
                bytes(n.optimiser),
                bytes(n.activations),
                bytes(n.total),
                full.map_or(String::new(), |f| format!("{:.0}%", 100.0 * n.total as f64 / f.total as f64)),
                format!("{:.0}", n.flops_per_token / 1e6),
            ]);
        }
        vec![table]
    }

    fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        if let Some(peak) = self.configured_peak {
            let spare = self.available.map(|n| format!(" This machine has {} to spare.", bytes(n))).unwrap_or_default();
            remarks.push(format!("The configured run will need {} at its peak.{spare}", bytes(peak)));
        }
        remarks.push(
            "bf16: train.mixed_precision on a GPU; 4bit: relora.quantize besides. What trains, gradients and moments are f32."
                .into(),
        );
        remarks
    }
}

/// `58.1 M`.
fn millions(n: u64) -> String {
    format!("{:.1} M", n as f64 / 1e6)
}

impl Report for Evaluation {
    fn tables(&self) -> Vec<Table> {
        let mut table = Table::new("", &["loss", "perplexity", "predictions"]);
        table.row(vec![format!("{:.6}", self.loss), format!("{:.4}", self.perplexity), self.predictions.to_string()]);
        vec![table]
    }
}
