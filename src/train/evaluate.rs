//! Mean loss and perplexity on held-out windows.

use super::tokens::{TokenShard, Windows};
use crate::{error::Result, interrupt, model::Model, ops::Device};
use indicatif::ProgressBar;
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

/// Evaluates `model` on `windows` of `shard`, in the order of the file, until `max_predictions` is reached.
pub fn evaluate<D: Device>(
    model: &mut Model<D>,
    shard: &TokenShard,
    windows: &Windows,
    batch_size: usize,
    max_predictions: u64,
    bar: &ProgressBar,
) -> Result<Evaluation> {
    let (mut sum, mut predictions, mut sample) = (0.0, 0, 0);
    let mut tokens = Vec::new();
    while sample < windows.count() && predictions < max_predictions {
        interrupt::check()?;
        let batch = batch_size.min((windows.count() - sample) as usize);
        tokens.clear();
        windows.read(shard, sample, batch, &mut tokens)?;
        let (loss, n) = model.loss(&tokens, batch, windows.max_length())?;
        sum += loss;
        predictions += n;
        sample += batch as u64;
        bar.inc(batch as u64);
    }
    let loss = sum / predictions as f64;
    Ok(Evaluation { loss, perplexity: loss.exp(), predictions })
}
