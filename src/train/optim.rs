//! AdamW's state: which tensors have moments, how old they are, and what a restart does to them.

use super::{
    config::{ReloraConfig, TrainConfig},
    prune::pruning,
    tokens::mix,
};
use crate::{
    collective::Collective,
    error::Result,
    job_array,
    model::{Model, Param, ParamKind},
    ops::{AdamW, Device},
};
use std::{collections::BTreeMap, sync::Arc};

/// The moments of one tensor.
pub struct Moments<D: Device> {
    /// Running mean of the gradient (`exp_avg`). Empty where another process has it.
    pub m: D::Buffer,
    /// Running mean of its square (`exp_avg_sq`). Empty where another process has it.
    pub v: D::Buffer,
    /// Updates since the bias correction began.
    pub t: u64,
}

/// Decoupled weight decay Adam (arXiv:1711.05101), one parameter group over everything trained. Several processes may share
/// out the moments as in ZeRO's first stage (arXiv:1910.02054): each updates the tensors whose moments it has, and gives them
/// to the others.
pub struct Optimizer<D: Device> {
    /// By parameter name.
    pub moments: BTreeMap<String, Moments<D>>,
    /// The processes that share out the moments.
    holders: Arc<dyn Collective<D>>,
}

impl<D: Device> Optimizer<D> {
    /// No moments yet: a tensor gets them at its first update. `holders` share them out.
    pub fn new(holders: Arc<dyn Collective<D>>) -> Self {
        Optimizer { moments: BTreeMap::new(), holders }
    }

    /// The processes that share out the moments.
    pub fn holders(&self) -> &Arc<dyn Collective<D>> {
        &self.holders
    }

    /// The process that has the moments of each parameter.
    pub fn owners(&self, params: &[Param<D>]) -> Vec<usize> {
        let shapes: Vec<(ParamKind, usize)> = params.iter().map(|p| (p.kind, p.elements())).collect();
        owners(&shapes, self.holders.world_size())
    }

    /// Adds the gradient of everything trained to the stats, and clips it.
    pub fn measure(model: &Model<D>, max_norm: f64, stats: &mut D::StepStats) {
        let gradients: Vec<&D::Buffer> = model.params().iter().filter_map(|p| p.grad.as_ref()).collect();
        model.device().accumulate_and_clip(&gradients, max_norm, stats);
    }

    /// Asks for one update of everything trained. It counts once [`Optimizer::count_update`] says so: whether it moves
    /// anything is up to the stats, which the host may not have seen yet.
    pub fn update(&mut self, model: &mut Model<D>, lr: f64, stats: &D::StepStats, config: &TrainConfig) -> Result<()> {
        let owners = self.owners(model.params());
        let rank = self.holders.rank();
        let (device, params) = model.device_and_params_mut();
        for (param, owner) in params.iter_mut().zip(&owners) {
            let Some(grad) = &param.grad else { continue };
            let len = if *owner == rank { param.elements() } else { 0 };
            let moments = self.moments.entry(param.name.clone()).or_insert_with(|| Moments {
                m: device.zeros(len),
                v: device.zeros(len),
                t: 0,
            });
            if *owner != rank {
                continue;
            }
            let hyper = AdamW {
                lr,
                beta1: config.adam_beta1,
                beta2: config.adam_beta2,
                eps: config.adam_eps,
                weight_decay: config.weight_decay,
                step: moments.t + 1,
            };
            device.adamw(&hyper, stats, &mut param.value, grad, &mut moments.m, &mut moments.v);
        }
        if self.holders.world_size() > 1 {
            for (param, owner) in params.iter_mut().zip(owners).filter(|(param, _)| param.grad.is_some()) {
                self.holders.broadcast(device, owner, &mut param.value)?;
            }
        }
        Ok(())
    }

    /// The update that was asked for has moved the weights.
    pub fn count_update(&mut self, model: &Model<D>) {
        for param in model.params().iter().filter(|p| p.grad.is_some()) {
            self.moments.get_mut(&param.name).into_iter().for_each(|moments| moments.t += 1);
        }
    }

    /// Forgets tensors that are no longer trained.
    pub fn retain_trained(&mut self, model: &Model<D>) {
        let trained: Vec<&str> = model.params().iter().filter(|p| p.trainable).map(|p| p.name.as_str()).collect();
        self.moments.retain(|name, _| trained.contains(&name.as_str()));
    }

    /// Treats the moments of A and B (and of trained scalings) at a restart, as `config` says. `seed` differs at every restart.
    pub fn prune_lora(&mut self, model: &Model<D>, config: &ReloraConfig, seed: u64) {
        let device = model.device();
        for (i, param) in model.params().iter().enumerate() {
            if !param.kind.is_lora() {
                continue;
            }
            let Some(moments) = self.moments.get_mut(&param.name) else { continue };
            let here = device.len(&moments.m) > 0;
            if let Some(how) = pruning(config, mix(seed ^ mix(i as u64))).filter(|_| here) {
                device.prune(how, &mut moments.m, &mut moments.v);
            }
            if config.reset_adam_step {
                moments.t = 0;
            }
        }
    }
}

/// Shares tensors of these kinds and lengths out over `count` processes, the largest first, each to the one that has least so
/// far. What is always trained comes before what cycles train, so that nothing changes hands when they begin.
fn owners(shapes: &[(ParamKind, usize)], count: usize) -> Vec<usize> {
    let group = |kind: ParamKind| match kind {
        ParamKind::Embedding | ParamKind::Norm | ParamKind::Head => 0,
        _ => 1,
    };
    let lora = shapes.iter().any(|(kind, _)| kind.is_lora());
    let trained = |kind: ParamKind| !lora || kind != ParamKind::Linear;
    let mut order: Vec<usize> = (0..shapes.len()).filter(|&i| trained(shapes[i].0)).collect();
    order.sort_by_key(|&i| (group(shapes[i].0), std::cmp::Reverse(shapes[i].1)));
    let lengths: Vec<f64> = shapes.iter().map(|shape| shape.1 as f64).collect();
    job_array::assign(order, &lengths, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_shared_out_evenly_and_keep_their_place_when_cycles_begin() {
        let full = [(ParamKind::Embedding, 900), (ParamKind::Norm, 10), (ParamKind::Norm, 10), (ParamKind::Head, 700)];
        let linear = [(ParamKind::Linear, 400); 14];
        let lora = [[(ParamKind::LoraA, 40), (ParamKind::LoraB, 40)]; 14];
        let before = [&full[..], &linear].concat();
        let after = [&before[..], lora.as_flattened()].concat();
        for count in [1, 2, 3, 4] {
            let owners_before = owners(&before, count);
            assert_eq!(owners(&after, count)[..full.len()], owners_before[..full.len()]);
            let load = |process| -> usize {
                before.iter().zip(&owners_before).filter(|(_, o)| **o == process).map(|(shape, _)| shape.1).sum()
            };
            let loads: Vec<usize> = (0..count).map(load).collect();
            assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 400, "{loads:?}");
        }
    }
}
