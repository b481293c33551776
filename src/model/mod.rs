//! LLaMA on one device: parameters under their Hugging Face names, explicit forward and backward, LoRA factors.
//!
//! Shapes, row-major: B windows (batch), T positions (len), N = B·T rows, C hidden width, H query heads, K key/value
//! heads, D head width, F inner width of the MLP, V vocabulary, L blocks, r LoRA rank.

mod block;
mod config;
mod init;
mod linear;
mod llama;
mod lora;
mod params;

pub use config::{LlamaConfig, RopeScaling};
pub use lora::LoraSpec;
pub use params::{Param, ParamKind};

use crate::{checkpoint::Checkpoint, error::Result, ops::Device};
use llama::Workspace;
use params::Layout;

/// A LLaMA model and, once it has run, the activations of its last batch shape.
pub struct Model<D: Device> {
    device: D,
    config: LlamaConfig,
    params: Vec<Param<D>>,
    layout: Layout,
    lora: Option<LoraSpec>,
    seed: u64,
    workspace: Option<Workspace<D>>,
}

impl<D: Device> Model<D> {
    /// A new model: weights normal with standard deviation `initializer_range`, norms 1, as Hugging Face does it. Each
    /// tensor has a generator of its own, seeded by `seed` and its name. Everything is trainable.
    pub fn init(device: D, config: LlamaConfig, seed: u64) -> Result<Self> {
        config.check()?;
        let params = params::init(&device, &config, seed);
        Ok(Self::assemble(device, config, params, seed))
    }

    /// The model in a Hugging Face folder (or a `.safetensors` file beside its `config.json`), as f32. Names and shapes
    /// must match both ways and all values be finite. Everything is trainable.
    pub fn load(device: D, checkpoint: &Checkpoint) -> Result<Self> {
        let config = LlamaConfig::from_json(&params::config_path(checkpoint))?;
        let params = params::load(&device, &config, checkpoint)?;
        Ok(Self::assemble(device, config, params, 0))
    }

    fn assemble(device: D, config: LlamaConfig, params: Vec<Param<D>>, seed: u64) -> Self {
        let layout = Layout::new(&config);
        let mut model = Model { device, config, params, layout, lora: None, seed, workspace: None };
        model.set_trainable(|_| true);
        model
    }

    /// The architecture.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Where the buffers live.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Chooses what trains: allocates gradients (zero) for it and drops the others'. A frozen weight costs no product
    /// in the backward.
    pub fn set_trainable(&mut self, f: impl Fn(&ParamKind) -> bool) {
        for param in &mut self.params {
            param.set_trainable(&self.device, f(&param.kind));
        }
    }

    /// All parameters: the model's in Hugging Face's order, then the LoRA factors, A before B.
    pub fn params(&self) -> &[Param<D>] {
        &self.params
    }

    /// As [`Model::params`], to change values and gradients in place.
    pub fn params_mut(&mut self) -> &mut [Param<D>] {
        &mut self.params
    }

    /// The parameter called `name`.
    pub fn param(&self, name: &str) -> Option<&Param<D>> {
        self.params.iter().find(|p| p.name == name)
    }

    /// Sets all gradients to zero.
    pub fn zero_grad(&mut self) {
        for grad in self.params.iter_mut().filter_map(|p| p.grad.as_mut()) {
            self.device.fill(grad, 0.0);
        }
    }
}
