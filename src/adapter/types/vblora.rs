//! VB-LoRA (arXiv:2405.15179): `dW = B @ A`, each piece of A's rows and B's columns a mixture of the vectors of a bank that all modules
//! share: `sum_k softmax(top k logits)_k * bank[k]`. Stored are the logits, or the chosen indices and all but the last of the weights.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};
use ndarray::Array2;

/// The type.
pub struct VbLora;

impl AdapterType for VbLora {
    fn about(&self) -> About {
        About {
            id: "VBLORA",
            name: "VB-LoRA",
            prefix: "vblora_",
            slots: &[
                "vblora_logits_A_topk_indices",
                "vblora_logits_A_topk_weights",
                "vblora_logits_B_topk_indices",
                "vblora_logits_B_topk_weights",
                "vblora_logits_A",
                "vblora_logits_B",
                "vblora_vector_bank",
            ],
        }
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let Some(&[_, length]) = module.adapter().shared("vblora_vector_bank").map(|bank| bank.shape()) else {
            return Err(module.damaged("the adapter has no vblora_vector_bank"));
        };
        let (a, b) = (pieces(module, "A")?, pieces(module, "B")?);
        Ok(a.0 == b.1 && (b.0 * length, a.1 * length) == layer.shape())
    }

    fn rank(&self, module: &Module) -> usize {
        module.config().r
    }

    fn build(&self, module: &Module, layer: &Layer, weight: f64) -> Result<Boxed> {
        let (a, b) = (mixtures(module, "A")?, mixtures(module, "B")?);
        let (r, tiles) = pieces(module, "A")?;
        let length = a.ncols();
        let right = Array2::from_shape_fn((r, layer.input), |(i, j)| a[[i * tiles + j / length, j % length]]);
        // B's pieces run along the outputs.
        let left = Array2::from_shape_fn((layer.out, r), |(i, j)| b[[i / length * r + j, i % length]]);
        Ok(forms::low_rank(left, right, weight))
    }
}

/// The first two extents of the logits of A or B.
fn pieces(module: &Module, which: &str) -> Result<(usize, usize)> {
    let slot = format!("vblora_logits_{which}");
    let tensor = module.get(&slot).map_or_else(|| module.need(&format!("{slot}_topk_indices")), Ok)?;
    match *tensor.shape() {
        [m, n, k] if m * n * k > 0 => Ok((m, n)),
        ref shape => Err(module.damaged(&format!("'{slot}' has shape {shape:?}, expected three extents"))),
    }
}

/// `[pieces, length]`.
fn mixtures(module: &Module, which: &str) -> Result<Array2<f64>> {
    let bad = |what: &str| module.damaged(what);
    let bank =
        module.adapter().shared("vblora_vector_bank").ok_or_else(|| bad("the adapter has no vblora_vector_bank"))?;
    let bank = values::matrix::<f64>(&bank, (bank.shape()[0], bank.shape()[1]))?;
    let (slot, (m, n)) = (format!("vblora_logits_{which}"), pieces(module, which)?);
    let mut mixed = Array2::zeros((m * n, bank.ncols()));
    let mut mix = |piece: usize, index: usize, share: f64| {
        if index >= bank.nrows() {
            return Err(bad(&format!("it takes vector {index} of a bank of {}", bank.nrows())));
        }
        mixed.row_mut(piece).scaled_add(share, &bank.row(index));
        Ok(())
    };
    if let Some(logits) = module.get(&slot) {
        let top = module.config().integer("topk").ok_or_else(|| bad("adapter_config.json has no topk"))?;
        let logits = values::matrix::<f64>(&logits, (m * n, logits.shape()[2]))?;
        for (piece, logits) in logits.outer_iter().enumerate() {
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&i, &j| logits[j].total_cmp(&logits[i]));
            order.truncate(top);
            let largest = order.first().map_or(0.0, |&i| logits[i]);
            let total: f64 = order.iter().map(|&i| (logits[i] - largest).exp()).sum();
            order.iter().try_for_each(|&i| mix(piece, i, (logits[i] - largest).exp() / total))?;
        }
    } else {
        let stored = module.need(&format!("{slot}_topk_indices"))?;
        let indices = values::indices(module, &stored)?;
        let (weights, top) = (values::list(module, &format!("{slot}_topk_weights"))?, stored.shape()[2]);
        if weights.len() != m * n * (top - 1) {
            return Err(bad("it has another number of weights than its indices need"));
        }
        for (piece, indices) in indices.chunks(top).enumerate() {
            let shares = &weights[piece * (top - 1)..(piece + 1) * (top - 1)];
            let rest = 1.0 - shares.iter().sum::<f64>();
            let shares = shares.iter().copied().chain([rest]);
            indices.iter().zip(shares).try_for_each(|(index, share)| mix(piece, *index, share))?;
        }
    }
    Ok(mixed)
}
