//! LLaMA on one device: parameters under their Hugging Face names, explicit forward and backward, LoRA factors.
//!
//! Shapes, row-major: B windows (batch), T positions (len), N = B·T rows, C hidden width, H query heads, K key/value
//! heads, D head width, F inner width of the MLP, V vocabulary, L blocks, r LoRA rank.

mod block;
mod config;
mod decode;
mod init;
mod linear;
mod llama;
mod lora;
pub mod memory;
mod params;
mod pool;
mod product;

pub use config::{LlamaConfig, RopeScaling};
pub use decode::Decoder;
pub use llama::Ready;
pub use lora::LoraSpec;
pub use params::{Param, ParamKind, StorageFormat};
pub use product::{Extents, Product, ProductChoice};

use crate::{
    checkpoint::Checkpoint,
    error::Result,
    ops::{Device, Element},
};
use llama::Workspace;
use params::Layout;
use pool::Pool;

/// A LLaMA model and, once it has run, the activations of its last batch shape.
pub struct Model<D: Device> {
    device: D,
    config: LlamaConfig,
    params: Vec<Param<D>>,
    layout: Layout,
    lora: Option<LoraSpec>,
    seed: u64,
    dropout_key: u64,
    /// Windows of the update's batch before those of this pass.
    dropout_first: usize,
    activation_checkpointing: bool,
    gradient_accumulation: bool,
    /// Of activations.
    element: Element,
    /// Whether values have changed since products have last read them.
    changed: bool,
    workspace: Option<Workspace<D>>,
    pool: Pool<D>,
}

/// Every layer has tensors of its own: refused before tables are made by what the configuration says.
fn check_layers(config: &LlamaConfig, checkpoint: &Checkpoint) -> Result<()> {
    match config.num_hidden_layers <= checkpoint.len() {
        true => Ok(()),
        false => Err(crate::error::Error::request(format!(
            "num_hidden_layers is {} in config.json, but '{}' holds only {} tensors",
            config.num_hidden_layers,
            checkpoint.path().display(),
            checkpoint.len()
        ))
        .help("download configuration and weights together")),
    }
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
        Self::load_as(device, checkpoint, StorageFormat::F32, false)
    }

    /// [`Model::load`] with projections that are to be frozen, rounded to what `store` can be as they are read, and with or
    /// without [`Model::set_mixed_precision`].
    pub fn load_as(device: D, checkpoint: &Checkpoint, store: StorageFormat, mixed_precision: bool) -> Result<Self> {
        let config = LlamaConfig::from_json(&params::config_path(checkpoint))?;
        check_layers(&config, checkpoint)?;
        let element = activations(&device, mixed_precision);
        let params = params::load(&device, &config, checkpoint, (store, element))?;
        let mut model = Self::assemble(device, config, params, 0);
        model.element = element;
        Ok(model)
    }

    fn assemble(device: D, config: LlamaConfig, params: Vec<Param<D>>, seed: u64) -> Self {
        let layout = Layout::new(&config);
        let mut model = Model {
            device,
            config,
            params,
            layout,
            lora: None,
            seed,
            dropout_key: 0,
            dropout_first: 0,
            activation_checkpointing: false,
            gradient_accumulation: false,
            element: Element::F32,
            changed: true,
            workspace: None,
            pool: Pool::new(),
        };
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

    /// Chooses what trains, and drops the gradients of the rest. A frozen weight costs no product in the backward.
    pub fn set_trainable(&mut self, f: impl Fn(&ParamKind) -> bool) {
        for param in &mut self.params {
            param.set_trainable(&self.device, f(&param.kind));
        }
    }

    /// Whether a block keeps nothing but its input between forward and backward, and runs its forward again: the same
    /// gradients, bit for bit, for about a third more work and the activations of one block instead of all.
    pub fn set_activation_checkpointing(&mut self, on: bool) {
        self.activation_checkpointing = on;
        self.drop_workspace();
    }

    /// Whether activations are bf16 and products multiply bf16, with sums in f32. Values that train stay what they are, as
    /// master copies, and so do gradients. On a device that has no bf16, nothing changes.
    pub fn set_mixed_precision(&mut self, on: bool) {
        self.element = activations(&self.device, on);
        self.changed = true;
        self.drop_workspace();
    }

    /// Whether several passes come before each [`Model::zero_grad`]. Gradients of the projections then have memory of their
    /// own; otherwise most of them lie where the backward needs activations no more. Matters to memory alone.
    pub fn set_gradient_accumulation(&mut self, on: bool) {
        self.gradient_accumulation = on;
        self.drop_workspace();
    }

    /// All parameters: the model's in Hugging Face's order, then the LoRA factors, A before B
    /// (and p of a trained scaling).
    pub fn params(&self) -> &[Param<D>] {
        &self.params
    }

    /// The device and all parameters, to change values with operations of the device.
    pub fn device_and_params_mut(&mut self) -> (&D, &mut [Param<D>]) {
        self.changed = true;
        (&self.device, &mut self.params)
    }

    /// As [`Model::params`], to change values and gradients in place.
    pub fn params_mut(&mut self) -> &mut [Param<D>] {
        self.changed = true;
        &mut self.params
    }

    /// The parameter called `name`.
    pub fn param(&self, name: &str) -> Option<&Param<D>> {
        self.params.iter().find(|p| p.name == name)
    }

    /// Sets all gradients to zero. Those of the projections are gone until the next backward, and leave their memory to it.
    pub fn zero_grad(&mut self) {
        for param in &mut self.params {
            if param.kind == ParamKind::Linear {
                param.grad.take().into_iter().for_each(|grad| self.pool.give(grad));
            } else if let Some(grad) = &mut param.grad {
                self.device.fill(grad, 0.0);
            }
        }
    }

    /// Copies for products what has changed.
    fn refresh(&mut self) {
        if !std::mem::take(&mut self.changed) {
            return;
        }
        let (narrow, head) = (self.element == Element::Bf16, self.layout.head());
        for (at, param) in self.params.iter_mut().enumerate() {
            let multiplied = at == head
                || matches!(param.kind, ParamKind::Head | ParamKind::Linear | ParamKind::LoraA | ParamKind::LoraB);
            param.refresh(&self.device, narrow && multiplied);
        }
    }

    fn drop_workspace(&mut self) {
        self.workspace = None;
        self.pool.clear();
    }
}

/// What activations are with or without mixed precision.
fn activations<D: Device>(device: &D, mixed_precision: bool) -> Element {
    let narrow = device.width(Element::Bf16) < device.width(Element::F32);
    if mixed_precision && narrow { Element::Bf16 } else { Element::F32 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::Dtype,
        ops::{Cpu, StepStats},
    };
    use serde_json::json;
    use std::{fs, path::Path};
    use tempfile::TempDir;

    fn tiny(tied: bool) -> LlamaConfig {
        LlamaConfig::from_value(&json!({"model_type": "llama", "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 37,
            "tie_word_embeddings": tied, "initializer_range": 0.3}))
        .unwrap()
    }

    const TOKENS: [u32; 15] = [1, 5, 36, 0, 7, 7, 7, 2, 9, 11, 30, 4, 4, 1, 0];

    fn spec(r: usize) -> LoraSpec {
        LoraSpec::new(r, 6.0)
    }

    /// Alters the name's shape or values; whether the tensor is stored at all.
    type Change<'a> = &'a dyn Fn(&str, &mut Vec<usize>, &mut Vec<f32>) -> bool;

    /// Writes a Hugging Face folder.
    fn folder(model: &Model<Cpu>, change: Change) -> TempDir {
        let folder = TempDir::new().unwrap();
        let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        for param in model.params() {
            let (mut shape, mut values) = (param.shape.clone(), param.value.clone());
            if change(&param.name, &mut shape, &mut values) {
                tensors.push((param.name.clone(), shape, bytemuck::cast_slice(&values).to_vec()));
            }
        }
        let views = tensors.iter().map(|(name, shape, bytes)| {
            (name, safetensors::tensor::TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
        fs::write(folder.path().join("config.json"), model.config().to_json().to_string()).unwrap();
        folder
    }

    fn load(folder: &Path) -> Result<Model<Cpu>> {
        Model::load(Cpu, &Checkpoint::open(folder)?)
    }

    #[test]
    fn a_saved_model_loads_as_the_same_model() {
        for tied in [false, true] {
            let mut model = Model::init(Cpu, tiny(tied), 3).unwrap();
            let folder = folder(&model, &|_, _, _| true);
            let mut back = load(folder.path()).unwrap();
            assert_eq!(back.config(), model.config());
            assert_eq!(back.loss(&TOKENS, 3, 5).unwrap(), model.loss(&TOKENS, 3, 5).unwrap());
        }
    }

    #[test]
    fn weights_that_do_not_fit_are_refused_by_name() {
        let model = Model::init(Cpu, tiny(false), 3).unwrap();
        let up = "model.layers.1.mlp.up_proj.weight";
        let refused = |change: Change| {
            let folder = folder(&model, change);
            load(folder.path()).err().expect("must be refused").message
        };
        let missing = refused(&|name, _, _| name != up);
        assert!(missing.contains("lacks 1 of the 21") && missing.contains(up), "{missing}");
        let shape = refused(&|name, shape, _| {
            if name == up {
                shape.reverse();
            }
            true
        });
        assert!(shape.contains(up) && shape.contains("[24, 40]") && shape.contains("[40, 24]"), "{shape}");
        let nan = refused(&|name, _, values| {
            if name == up {
                values[17] = f32::NAN;
            }
            true
        });
        assert!(nan.contains(up) && nan.contains("NaN at element 17"), "{nan}");

        let folder = folder(&model, &|_, _, _| true);
        let mut fewer_layers = model.config().to_json();
        fewer_layers["num_hidden_layers"] = json!(1);
        fs::write(folder.path().join("config.json"), fewer_layers.to_string()).unwrap();
        let surplus = load(folder.path()).err().expect("must be refused").message;
        assert!(surplus.contains("9 tensors that are not part") && surplus.contains("layers.1"), "{surplus}");
    }

    #[test]
    fn tokens_that_do_not_fit_are_refused() {
        let mut model = Model::init(Cpu, tiny(false), 3).unwrap();
        let message = model.loss(&[1, 2, 37], 1, 3).unwrap_err().message;
        assert!(message.contains("token 37 at position 2") && message.contains("vocabulary of 37"), "{message}");
        assert!(model.loss(&TOKENS, 2, 5).is_err());
        assert!(model.loss(&TOKENS, 15, 1).is_err());
        assert!(model.logits(&[], 0, 0).is_err());
    }

    #[test]
    fn frozen_weights_get_no_gradient_and_change_no_other() {
        let mut model = Model::init(Cpu, tiny(true), 3).unwrap();
        model.forward_backward(&TOKENS, 3, 5, 1.0).unwrap();
        let all: Vec<Vec<f32>> = model.params().iter().map(|p| p.grad.clone().unwrap()).collect();
        model.set_trainable(|kind| *kind == ParamKind::Norm);
        model.zero_grad();
        model.forward_backward(&TOKENS, 3, 5, 1.0).unwrap();
        for (param, all) in model.params().iter().zip(&all) {
            assert_eq!(param.trainable, param.kind == ParamKind::Norm);
            assert_eq!(param.grad.as_ref(), param.trainable.then_some(all), "{}", param.name);
        }
    }

    #[test]
    fn gradients_accumulate_with_their_scale() {
        let mut model = Model::init(Cpu, tiny(true), 3).unwrap();
        model.add_lora(spec(3));
        model.forward_backward(&TOKENS, 3, 5, 1.0).unwrap();
        let once: Vec<_> = model.params().iter().filter_map(|p| p.grad.clone()).collect();
        model.zero_grad();
        for _ in 0..2 {
            model.forward_backward(&TOKENS, 3, 5, 0.5).unwrap();
        }
        for (param, once) in model.params().iter().filter(|p| p.trainable).zip(&once) {
            let twice: Vec<f64> = param.grad.as_ref().unwrap().iter().map(|&x| x.into()).collect();
            crate::ops::testing::assert_close(&param.name, once, &twice, 1e-6);
        }
    }

    #[test]
    fn lora_starts_as_nothing_merges_as_itself_and_goes() {
        let mut model = Model::init(Cpu, tiny(false), 3).unwrap();
        let plain = model.loss(&TOKENS, 3, 5).unwrap().0;
        model.add_lora(spec(3));
        assert_eq!(model.loss(&TOKENS, 3, 5).unwrap().0, plain);
        let a = "model.layers.1.mlp.down_proj.lora_A.weight";
        assert_eq!(model.param(a).unwrap().shape, [3, 40]);
        assert!(!model.param("model.layers.1.mlp.down_proj.weight").unwrap().trainable);

        for b in model.params_mut().iter_mut().filter(|p| p.kind == ParamKind::LoraB) {
            b.value = crate::ops::testing::noise(7, b.elements());
        }
        let adapted = model.loss(&TOKENS, 3, 5).unwrap().0;
        assert!((adapted - plain).abs() > 1e-2);
        model.merge_lora();
        let before = model.param(a).unwrap().value.clone();
        model.reset_lora(9);
        assert_ne!(model.param(a).unwrap().value, before);
        let merged = model.loss(&TOKENS, 3, 5).unwrap().0;
        assert!((merged / adapted - 1.0).abs() < 1e-5, "{adapted} {merged}");
        model.remove_lora();
        assert_eq!((model.loss(&TOKENS, 3, 5).unwrap().0, model.params().len()), (merged, 21));
    }

    /// A model with factors in every corner case, B not zero.
    fn adapted(spec: LoraSpec) -> Model<Cpu> {
        let mut model = Model::init(Cpu, tiny(true), 3).unwrap();
        model.add_lora(spec);
        for b in model.params_mut().iter_mut().filter(|p| p.kind == ParamKind::LoraB) {
            b.value = crate::ops::testing::noise(7, b.elements());
        }
        model
    }

    fn gradients(model: &mut Model<Cpu>) -> (f64, Vec<Vec<f32>>) {
        model.zero_grad();
        let loss = model.forward_backward(&TOKENS, 3, 5, 1.0).unwrap();
        (loss, model.params().iter().filter_map(|p| p.grad.clone()).collect())
    }

    #[test]
    fn gradients_are_reported_once_complete_and_may_be_taken() {
        let scaled = |product| LoraSpec { train_scaling: true, product, ..spec(3) };
        for lora in [None, Some(spec(3)), Some(scaled(ProductChoice::Factored))] {
            for tied in [false, true] {
                let mut model = Model::init(Cpu, tiny(tied), 3).unwrap();
                lora.clone().into_iter().for_each(|spec| model.add_lora(spec));
                model.forward_backward(&TOKENS, 3, 5, 1.0).unwrap();
                let whole: Vec<_> = model.params().iter().map(|p| p.grad.clone()).collect();
                model.zero_grad();
                let mut taken: Vec<Option<Vec<f32>>> = vec![None; whole.len()];
                let mut seen = vec![0; whole.len()];
                let mut take = |_: &Cpu, params: &mut [Param<Cpu>], ready: &[usize]| {
                    for &at in ready {
                        seen[at] += 1;
                        taken[at] = params[at].grad.take();
                    }
                };
                model.forward_backward_then(&TOKENS, 3, 5, 1.0, &mut StepStats::default(), &mut take).unwrap();
                assert_eq!(seen, vec![1; whole.len()]);
                assert_eq!(taken, whole);
            }
        }
    }

    #[test]
    fn gradients_that_lie_where_activations_were_have_the_same_bits() {
        let tokens: Vec<u32> = (0..72).map(|i| i * i * 7 % 37).collect();
        let mut model = Model::init(Cpu, tiny(true), 3).unwrap();
        let mut pass = |own_memory| {
            model.set_gradient_accumulation(own_memory);
            let mut passes = [(); 2].map(|()| {
                model.forward_backward(&tokens, 8, 9, 1.0).unwrap();
                let grads: Vec<Vec<f32>> = model.params().iter().map(|p| p.grad.clone().unwrap()).collect();
                model.zero_grad();
                grads
            });
            assert!(passes[0] == passes[1], "{own_memory}");
            std::mem::take(&mut passes[0])
        };
        assert!(pass(true) == pass(false));
    }

    #[test]
    fn activation_checkpointing_changes_no_bit() {
        for spec in [
            LoraSpec { product: ProductChoice::Formed, ..spec(3) },
            LoraSpec { dropout: 0.3, train_scaling: true, ..spec(3) },
        ] {
            let mut model = adapted(spec);
            let plain = gradients(&mut model);
            model.set_activation_checkpointing(true);
            assert!(gradients(&mut model) == plain);
        }
    }

    #[test]
    fn every_way_to_compute_the_product_gives_the_same_gradients() {
        let run = |product| gradients(&mut adapted(LoraSpec { product, ..spec(3) }));
        let (loss, expected) = run(ProductChoice::Factored);
        for product in [ProductChoice::Auto, ProductChoice::Formed, ProductChoice::WholeGradient] {
            let (found, grads) = run(product);
            assert!((found / loss - 1.0).abs() < 1e-6, "{product:?} {found} {loss}");
            for (grad, expected) in grads.iter().zip(&expected) {
                crate::ops::testing::assert_close(
                    &format!("{product:?}"),
                    grad,
                    &crate::ops::testing::wide(expected),
                    2e-5,
                );
            }
        }
    }

    #[test]
    fn dropout_depends_on_its_key_and_is_off_in_evaluation() {
        let mut model = adapted(LoraSpec { dropout: 0.5, ..spec(3) });
        let mut with_key = |key| {
            model.set_dropout_key(key, 0);
            gradients(&mut model)
        };
        let first = with_key(1);
        assert!(with_key(2).0 != first.0);
        assert!(with_key(1) == first);
        let evaluated = model.loss(&TOKENS, 3, 5).unwrap().0;
        let without = adapted(LoraSpec { product: ProductChoice::Factored, ..spec(3) }).loss(&TOKENS, 3, 5).unwrap().0;
        assert_eq!(evaluated, without);
    }

    #[test]
    fn a_trained_scaling_is_merged_as_its_tanh() {
        let mut model = adapted(LoraSpec { train_scaling: true, ..spec(3) });
        let module = "model.layers.1.mlp.up_proj";
        assert_eq!(model.scaling_of(module), f64::from(1f32.tanh()));
        for p in model.params_mut().iter_mut().filter(|p| p.kind == ParamKind::LoraScaling) {
            p.value = vec![-0.3];
        }
        let stored = model.scaled_b(module).unwrap();
        let b = &model.param(&format!("{module}.lora_B.weight")).unwrap().value;
        // PEFT multiplies with lora_alpha / r = 2.
        assert!((stored[0] / b[0] - (-0.3f32).tanh() / 2.0).abs() < 1e-6);
        let adapted = model.loss(&TOKENS, 3, 5).unwrap().0;
        model.merge_lora();
        model.remove_lora();
        let merged = model.loss(&TOKENS, 3, 5).unwrap().0;
        assert!((merged / adapted - 1.0).abs() < 1e-5, "{adapted} {merged}");
    }

    #[test]
    fn the_seed_decides_the_weights() {
        let first = |seed| Model::init(Cpu, tiny(false), seed).unwrap().params()[1].value.clone();
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let mut config = tiny(true);
        (config.hidden_size, config.head_dim, config.intermediate_size, config.vocab_size) = (128, 32, 340, 1000);
        let tokens: Vec<u32> = (0..4 * 80).map(|i| i * 7919 % 1000).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut model = Model::init(Cpu, config.clone(), 3).unwrap();
                let loss = model.forward_backward(&tokens, 4, 80, 1.0).unwrap();
                (loss, model.params().iter().map(|p| p.grad.clone().unwrap()).collect::<Vec<_>>())
            })
        };
        let one = run(1);
        assert!(run(2) == one && run(5) == one);
    }
}
