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

/// Evaluates `model` on `windows` of `shard`, in the order of the file, until `max_predictions` is reached. The processes of
/// `collective` share out the batches; the result has the same bits however many they are.
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
    // Whole batches, until there are enough predictions.
    let batches = max_predictions.div_ceil(per_window * batch_size as u64);
    let count = windows.count().min(batches.saturating_mul(batch_size as u64));
    let batches = count.div_ceil(batch_size as u64);
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let (mut own, mut tokens) = (Vec::new(), Vec::new());
    let bar = progress.count("evaluating", windows.count());
    for first in (rank as u64..batches).step_by(world_size).map(|i| i * batch_size as u64) {
        if world_size == 1 {
            progress.check().inspect_err(|_| bar.finish_and_clear())?;
        }
        let batch = batch_size.min((count - first) as usize);
        tokens.clear();
        windows.read(shard, first, batch, &mut tokens)?;
        own.extend(model.loss(&tokens, batch, windows.max_length())?.0.to_le_bytes());
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
    let predictions = count * per_window;
    let loss = sum / predictions as f64;
    Ok(Evaluation { loss, perplexity: loss.exp(), predictions })
}
