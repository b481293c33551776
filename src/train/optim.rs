//! AdamW's state: which tensors have moments, how old they are, and what a restart does to them.

use super::{
    config::{ReloraConfig, TrainConfig},
    prune::pruning,
    tokens::mix,
};
use crate::{
    model::Model,
    ops::{AdamW, Device},
};
use std::collections::BTreeMap;

/// The moments of one tensor.
pub struct Moments<D: Device> {
    /// Running mean of the gradient (`exp_avg`).
    pub m: D::Buffer,
    /// Running mean of its square (`exp_avg_sq`).
    pub v: D::Buffer,
    /// Updates since the bias correction began.
    pub t: u64,
}

/// Decoupled weight decay Adam (arXiv:1711.05101), one parameter group over everything trained.
pub struct Optimizer<D: Device> {
    /// By parameter name.
    pub moments: BTreeMap<String, Moments<D>>,
}

impl<D: Device> Optimizer<D> {
    /// No moments yet: a tensor gets them at its first update.
    pub fn new() -> Self {
        Optimizer { moments: BTreeMap::new() }
    }

    /// Adds the gradient of everything trained to the tally, and clips it.
    pub fn measure(model: &Model<D>, max_norm: f64, tally: &mut D::Tally) {
        let gradients: Vec<&D::Buffer> = model.params().iter().filter_map(|p| p.grad.as_ref()).collect();
        model.device().tally_gradients(&gradients, max_norm, tally);
    }

    /// Asks for one update of everything trained. It counts once [`Optimizer::count_update`] says so: whether it moves
    /// anything is up to the tally, which the host may not have seen yet.
    pub fn update(&mut self, model: &mut Model<D>, lr: f64, tally: &D::Tally, config: &TrainConfig) {
        let (device, params) = model.device_and_params_mut();
        for param in params.iter_mut() {
            let Some(grad) = &param.grad else { continue };
            let len = param.shape.iter().product();
            let moments = self.moments.entry(param.name.clone()).or_insert_with(|| Moments {
                m: device.zeros(len),
                v: device.zeros(len),
                t: 0,
            });
            let hyper = AdamW {
                lr,
                beta1: config.adam_beta1,
                beta2: config.adam_beta2,
                eps: config.adam_eps,
                weight_decay: config.weight_decay,
                step: moments.t + 1,
            };
            device.adamw(&hyper, tally, &mut param.value, grad, &mut moments.m, &mut moments.v);
        }
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
            if let Some(how) = pruning(config, mix(seed ^ mix(i as u64))) {
                device.prune(how, &mut moments.m, &mut moments.v);
            }
            if config.reset_adam_step {
                moments.t = 0;
            }
        }
    }
}

impl<D: Device> Default for Optimizer<D> {
    fn default() -> Self {
        Self::new()
    }
}
