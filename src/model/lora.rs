//! LoRA factors (arXiv:2106.09685) on the seven projections of every block: added, drawn anew, merged, removed.

use super::{
    Model, init,
    params::{Param, ParamKind, TARGETS},
};
use crate::ops::{Device, Mat, MatMut};

/// The LoRA hyper-parameters, the same for every target.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSpec {
    /// Rank; positive.
    pub r: usize,
    /// PEFT's `lora_alpha`, for the adapter's config.
    pub lora_alpha: f64,
    /// s in `W + s B A`: `lora_alpha / r`, or whatever the adapter's variant makes of it.
    pub scaling: f64,
    /// Dropout before A. Must be 0.
    pub dropout: f64,
}

impl<D: Device> Model<D> {
    /// Adds factors to all targets, trainable, and freezes the targets: A uniform in ±1/√in (Kaiming with a = √5, drawn
    /// from the model's seed; see [`Model::reset_lora`]), B zero. Factors that were there are dropped.
    pub fn add_lora(&mut self, spec: LoraSpec) {
        assert!(spec.r > 0 && spec.dropout == 0.0, "LoRA needs a positive rank and no dropout");
        self.remove_lora();
        for layer in 0..self.config.num_hidden_layers {
            for which in 0..TARGETS.len() {
                let weight = self.layout.linear(layer, which, None).weight;
                self.params[weight].set_trainable(&self.device, false);
                let Param { name, shape, .. } = &self.params[weight];
                let (module, out, inner) = (name.trim_end_matches(".weight").to_owned(), shape[0], shape[1]);
                let factors =
                    [(ParamKind::LoraA, "lora_A", [spec.r, inner]), (ParamKind::LoraB, "lora_B", [out, spec.r])];
                for (kind, factor, shape) in factors {
                    let value = self.device.zeros(shape[0] * shape[1]);
                    let mut param = Param::new(format!("{module}.{factor}.weight"), kind, shape.to_vec(), value);
                    param.set_trainable(&self.device, true);
                    self.params.push(param);
                }
            }
        }
        self.lora = Some(spec);
        self.reset_lora(self.seed);
    }

    /// The hyper-parameters of the factors, if there are any.
    pub fn lora(&self) -> Option<&LoraSpec> {
        self.lora.as_ref()
    }

    /// Draws A anew, each from `seed` and its name, and sets B to zero. Gradients stay.
    pub fn reset_lora(&mut self, seed: u64) {
        for param in &mut self.params[self.layout.len()..] {
            if param.kind == ParamKind::LoraA {
                let bound = 1.0 / (param.shape[1] as f64).sqrt();
                let values = init::uniform(seed, &param.name, bound, param.elements());
                self.device.write(&mut param.value, &values);
            } else {
                self.device.fill(&mut param.value, 0.0);
            }
        }
    }

    /// `W += s B A` for every target, in f32. The factors stay as they are.
    pub fn merge_lora(&mut self) {
        for layer in 0..self.config.num_hidden_layers {
            for which in 0..TARGETS.len() {
                let linear = self.layout.linear(layer, which, self.lora.as_ref());
                let Some((a, b, scaling)) = linear.lora else { return };
                let (weights, factors) = self.params.split_at_mut(self.layout.len());
                let (a, b) = (&factors[a - weights.len()], &factors[b - weights.len()]);
                let w = &mut weights[linear.weight];
                let [b, a] = [b, a].map(|p| Mat::new(&p.value, p.shape[0], p.shape[1]));
                self.device.matmul(scaling, b, a, 1.0, MatMut::new(&mut w.value, w.shape[0], w.shape[1]));
            }
        }
    }

    /// Drops the factors without merging them. The targets stay frozen; see [`Model::set_trainable`].
    pub fn remove_lora(&mut self) {
        self.params.truncate(self.layout.len());
        self.lora = None;
        self.workspace = None;
    }
}
