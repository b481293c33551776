//! Mean loss and perplexity on held-out windows.

use super::tokens::{TokenShard, Windows};
use crate::{collective::Collective, error::Result, model::Model, ops::Device, progress::Progress};
use serde::Serialize;

/// The result of an evaluation.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Evaluation {
    /// Mean loss per prediction, natural logarithm.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Predictions that the mean is over.
    pub predictions: u64,
}

/// Evaluates `model` on the first `max_predictions` predictions of `windows` of `shard`, in the order of the file, or on all
/// if there are fewer. Which predictions count does not depend on `batch_size`: the last sequence is cut where the limit falls
/// inside it. The batches are divided among the processes of `collective`; the result has the same bits however many there are.
pub fn evaluate<D: Device>(
    model: &mut Model<D>,
    shard: &TokenShard,
    windows: &Windows,
    batch_size: usize,
    max_predictions: u64,
    collective: &dyn Collective<D>,
    progress: &Progress,
) -> Result<Evaluation> {
    let per_window = (windows.max_length() - 1) as u64;
    let predictions = max_predictions.min(windows.count() * per_window);
    // Whole sequences in batches, and a batch for the one that the limit cuts.
    let (whole, rest) = (predictions / per_window, predictions % per_window);
    let full_batches = whole.div_ceil(batch_size as u64);
    let batches = full_batches + u64::from(rest > 0);
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let (mut own, mut tokens) = (Vec::new(), Vec::new());
    let bar = progress.count("evaluating", windows.count());
    for i in (rank as u64..batches).step_by(world_size) {
        if world_size == 1 {
            progress.check().inspect_err(|_| bar.finish_and_clear())?;
        }
        let first = (i * batch_size as u64).min(whole);
        let (batch, length) = match i < full_batches {
            true => (batch_size.min((whole - first) as usize), windows.max_length()),
            false => (1, rest as usize + 1),
        };
        tokens.clear();
        windows.read(shard, first, batch, &mut tokens)?;
        tokens.truncate(batch * length);
        own.extend(model.loss(&tokens, batch, length)?.0.to_le_bytes());
        bar.inc((batch * world_size) as u64);
    }
    bar.finish_and_clear();
    // By process: the sums of its batches. They are added in the order of the batches.
    let all = collective.gather(&own)?;
    let sum_of = |batch: usize| {
        let bytes = &all[batch % world_size][size_of::<f64>() * (batch / world_size)..][..size_of::<f64>()];
        f64::from_le_bytes(bytes.try_into().unwrap_or_default())
    };
    let sum: f64 = (0..batches as usize).map(sum_of).sum();
    let loss = sum / predictions as f64;
    Ok(Evaluation { loss, perplexity: loss.exp(), predictions })
}
