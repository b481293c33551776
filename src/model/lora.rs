//! LoRA factors (arXiv:2106.09685) on the seven projections of every block: added, drawn anew, merged, removed.

use super::{
    Model, init,
    linear::Linear,
    params::{Param, ParamKind, StorageFormat, TARGETS},
    product::ProductChoice,
};
use crate::{
    adapter::config::scaling,
    ops::{Device, Dropout, Mat, MatMut, Rounding},
};

/// The LoRA hyper-parameters, the same for every target.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSpec {
    /// Rank; positive.
    pub r: usize,
    /// PEFT's `lora_alpha`, for the adapter's config.
    pub lora_alpha: f64,
    /// s in `W + s B A`: `lora_alpha / r`, or whatever the adapter's variant makes of it.
    pub scaling: f64,
    /// Dropout before A while training; below 1.
    pub dropout: f64,
    /// Every target has a parameter p of its own, which starts at 1 and trains, and `s = tanh(p)`.
    pub train_scaling: bool,
    /// How the products are computed.
    pub product: ProductChoice,
}

impl LoraSpec {
    /// Plain LoRA: `s = lora_alpha / r`, no dropout.
    pub fn new(r: usize, lora_alpha: f64) -> Self {
        let scaling = scaling(lora_alpha, r, false);
        LoraSpec { r, lora_alpha, scaling, dropout: 0.0, train_scaling: false, product: ProductChoice::Auto }
    }
}

impl<D: Device> Model<D> {
    /// Adds factors to all targets, trainable, and freezes the targets: A uniform in ±1/√in (Kaiming with a = √5, drawn
    /// from the model's seed; see [`Model::reset_lora`]), B zero. Factors that were there are dropped.
    pub fn add_lora(&mut self, spec: LoraSpec) {
        assert!(spec.r > 0 && (0.0..1.0).contains(&spec.dropout), "LoRA needs a positive rank and a dropout below 1");
        self.remove_lora();
        for layer in 0..self.config.num_hidden_layers {
            for which in 0..TARGETS.len() {
                let weight = self.layout.weight(layer, which);
                self.params[weight].set_trainable(&self.device, false);
                let Param { name, shape, .. } = &self.params[weight];
                let (module, out, inner) = (name.trim_end_matches(".weight").to_owned(), shape[0], shape[1]);
                let mut factors = vec![
                    (ParamKind::LoraA, "lora_A.weight", vec![spec.r, inner]),
                    (ParamKind::LoraB, "lora_B.weight", vec![out, spec.r]),
                ];
                if spec.train_scaling {
                    factors.push((ParamKind::LoraScaling, "scaling", vec![1]));
                }
                for (kind, factor, shape) in factors {
                    let value = self.device.zeros(shape.iter().product());
                    let mut param = Param::new(format!("{module}.{factor}"), kind, shape, value);
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

    /// Chooses the elements that dropout drops in the next [`Model::forward_backward`]: the same key, the same elements. Where
    /// its windows are part of a larger batch, `first_window` of them before these, they are those of the whole (if inputs of
    /// a window are a multiple of 64 elements, see [`Dropout::after`]).
    pub fn set_dropout_key(&mut self, key: u64, first_window: usize) {
        (self.dropout_key, self.dropout_first) = (key, first_window);
    }

    pub(super) fn dropout(&self) -> Option<Dropout> {
        let p = self.lora.as_ref().map_or(0.0, |spec| spec.dropout);
        (p > 0.0).then_some(Dropout { p: p as f32, key: self.dropout_key, first_run: 0 })
    }

    /// Draws A anew, each from `seed` and its name, sets B to zero and trained scalings to 1. Gradients stay.
    pub fn reset_lora(&mut self, seed: u64) {
        self.changed = true;
        for param in &mut self.params[self.layout.len()..] {
            match param.kind {
                ParamKind::LoraA => {
                    let bound = 1.0 / (param.shape[1] as f64).sqrt();
                    let values = init::uniform(seed, &param.name, bound, param.elements());
                    self.device.write(&mut param.value, &values);
                }
                ParamKind::LoraScaling => self.device.fill(&mut param.value, 1.0),
                _ => self.device.fill(&mut param.value, 0.0),
            }
        }
    }

    /// s in `W + s B A` of the projection called `module`.
    pub fn scaling_of(&self, module: &str) -> f64 {
        let Some(spec) = &self.lora else { return 0.0 };
        match self.param(&format!("{module}.scaling")).filter(|_| spec.train_scaling) {
            // In f32, as forward and merge compute it.
            Some(p) => self.device.read(&p.value).first().map_or(0.0, |s| f64::from(s.tanh())),
            None => spec.scaling,
        }
    }

    /// With a trained scaling, B times `tanh(p) / spec.scaling`: what [`Model::merge_lora`] multiplies with `spec.scaling`,
    /// and an adapter stores. `module` is called as in the model, without `.weight`.
    pub fn scaled_b(&self, module: &str) -> Option<Vec<f32>> {
        let spec = self.lora.as_ref().filter(|spec| spec.train_scaling)?;
        let b = self.param(&format!("{module}.lora_B.weight"))?;
        let factor = (self.scaling_of(module) / spec.scaling) as f32;
        Some(self.device.read(&b.value).into_iter().map(|x| x * factor).collect())
    }

    /// Draws B as the official code does where B A stands alone: uniform in ±1/√r.
    pub fn draw_b(&mut self, seed: u64) {
        self.changed = true;
        for param in self.params.iter_mut().filter(|p| p.kind == ParamKind::LoraB) {
            let bound = 1.0 / (param.shape[1] as f64).sqrt();
            self.device.write(&mut param.value, &init::uniform(seed, &param.name, bound, param.shape.iter().product()));
        }
    }

    /// Rounds the projections, to be frozen, to what `store` can be, to the nearest.
    pub fn store_projections(&mut self, store: StorageFormat) {
        let Model { device, params, element, .. } = self;
        for param in params.iter_mut().filter(|p| p.kind == ParamKind::Linear && p.store != store) {
            let mut values = device.zeros(param.elements());
            param.read(device, &mut values);
            param.set_storage(device, store, *element, Rounding::Nearest, &mut values);
        }
        self.changed = true;
        // It holds buffers for what is quantised.
        self.drop_workspace();
    }

    /// `W += s B A` for every target, in f32. The factors stay as they are.
    pub fn merge_lora(&mut self) {
        for at in self.targets() {
            let placeholder = self.device.zeros(0);
            let mut value = std::mem::replace(&mut self.params[at].value, placeholder);
            self.add_delta(at, &mut value);
            self.params[at].value = value;
        }
        self.changed = true;
    }

    /// As [`Model::merge_lora`] into weights that are rounded: to bf16, `rounding(i)` for the i-th parameter, or quantised anew.
    /// Returns the retention: the share of the delta that survived, `<dW, round(W + dW) - W> / |dW|²` over all targets; 1 if
    /// there is no delta.
    pub fn merge_lora_rounded(&mut self, rounding: impl Fn(usize) -> Rounding) -> f64 {
        let (mut kept, mut whole) = (0.0, 0.0);
        for at in self.targets() {
            let new = || self.device.zeros(self.params[at].elements());
            let (mut before, mut merged, mut delta) = (new(), new(), new());
            self.params[at].read(&self.device, &mut before);
            self.device.copy(&before, &mut merged);
            self.add_delta(at, &mut merged);
            let Model { device, params, element, .. } = self;
            device.copy(&merged, &mut delta);
            device.axpy(-1.0, &before, &mut delta);
            let param = &mut params[at];
            match param.store {
                // Weights in f32 that are rounded all the same.
                StorageFormat::F32 => {
                    device.round_to_bf16(rounding(at), &mut merged);
                    device.copy(&merged, &mut param.value);
                }
                store => param.set_storage(device, store, *element, rounding(at), &mut merged),
            }
            device.axpy(-1.0, &before, &mut merged);
            kept += device.dot(&delta, &merged);
            whole += device.sum_of_squares(&delta);
        }
        self.changed = true;
        if whole > 0.0 { kept / whole } else { 1.0 }
    }

    /// Places of the weights that have factors.
    fn targets(&self) -> Vec<usize> {
        let all = if self.lora.is_some() { self.config.num_hidden_layers * TARGETS.len() } else { 0 };
        (0..all).map(|i| self.layout.weight(i / TARGETS.len(), i % TARGETS.len())).collect()
    }

    /// `target += s B A` of the weight at this place, in f32.
    fn add_delta(&self, at: usize, target: &mut D::Buffer) {
        let Some(spec) = &self.lora else { return };
        let module = self.params[at].name.trim_end_matches(".weight");
        let factor = |which: &str| self.param(&format!("{module}.{which}.weight"));
        let (Some(a), Some(b)) = (factor("lora_A"), factor("lora_B")) else { return };
        let scaled = self.scaled_b(module).map(|b| self.device.upload(&b));
        let (out, inner) = (b.shape[0], a.shape[1]);
        let a = Mat::new(&a.value, spec.r, inner);
        let b = Mat::new(scaled.as_ref().unwrap_or(&b.value), out, spec.r);
        self.device.matmul(spec.scaling as f32, b, a, 1.0, MatMut::new(target, out, inner));
    }

    /// The `which`-th projection of block `layer`, for batches of `rows` rows.
    pub(super) fn linear(&self, layer: usize, which: usize, rows: usize) -> Linear {
        let shape = &self.params[self.layout.weight(layer, which)].shape;
        let exact = self.params[self.layout.weight(layer, which)].store == StorageFormat::F32;
        self.layout.linear(layer, which, self.lora.as_ref(), (shape[0], shape[1]), rows, exact)
    }

    /// Drops the factors without merging them. The targets stay frozen; see [`Model::set_trainable`].
    pub fn remove_lora(&mut self) {
        self.params.truncate(self.layout.len());
        self.lora = None;
        self.drop_workspace();
    }
}
