//! The model against PyTorch, on both devices: gradients of one batch, and whole training trajectories.

use crate::common;
use crate::common::cuda_emulator::on_both_devices;
use relora_kit::{
    checkpoint::{Checkpoint, TensorFile},
    model::{LoraSpec, Model},
    ops::{AdamW, Device},
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// The training text of the fixtures.
fn licence() -> Vec<u32> {
    tokens(&Path::new(env!("CARGO_MANIFEST_DIR")).join("LICENSE"))
}

/// One token per byte.
fn tokens(path: &Path) -> Vec<u32> {
    fs::read(path).unwrap().into_iter().map(u32::from).collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn load<D: Device>(device: D, folder: &Path) -> Model<D> {
    Model::load(device, &Checkpoint::open(folder).unwrap()).unwrap()
}

/// Adds the factors of a PEFT folder, rank and alpha from its config.
fn attach<D: Device>(model: &mut Model<D>, adapter: &Path) {
    let config = json(&adapter.join("adapter_config.json"));
    let (r, lora_alpha) = (config["r"].as_u64().unwrap() as usize, config["lora_alpha"].as_f64().unwrap());
    model.add_lora(LoraSpec::new(r, lora_alpha));
    set_factors(model, &adapter.join("adapter_model.safetensors"));
}

fn set_factors<D: Device>(model: &mut Model<D>, file: &Path) {
    let file = TensorFile::open(file).unwrap();
    let (device, params) = model.device_and_params_mut();
    for tensor in file.tensors() {
        let name = tensor.name().trim_start_matches("base_model.model.").to_owned();
        let param = params.iter_mut().find(|p| p.name == name).unwrap_or_else(|| panic!("no '{name}'"));
        assert_eq!(param.shape, tensor.shape(), "{name}");
        device.write(&mut param.value, &tensor.to_f32().unwrap());
    }
}

/// Loss to 1e-6, and every gradient to 1e-5 of its tensor's largest element (f32 arithmetic gives about 1e-6).
fn check_gradients<D: Device>(model: &mut Model<D>, tokens: &[u32], len: usize, loss: f64, grads: &Path) {
    let batch = tokens.len() / len;
    let (sum, predictions) = model.loss(tokens, batch, len).unwrap();
    let found = model.forward_backward(tokens, batch, len, 1.0).unwrap();
    assert_eq!(found, sum / predictions as f64);
    assert!((found / loss - 1.0).abs() < 1e-6, "loss {found}, expected {loss}");

    let expected = TensorFile::open(grads).unwrap();
    let trained = model.params().iter().filter(|p| p.trainable).count();
    assert_eq!(trained, expected.tensors().len());
    for tensor in expected.tensors() {
        let param = model.param(tensor.name()).unwrap_or_else(|| panic!("no '{}'", tensor.name()));
        let grad = model.device().read(param.grad.as_ref().unwrap());
        let mut want = vec![0.0; grad.len()];
        tensor.read_f64(0, &mut want).unwrap();
        let top = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let (at, worst) = grad
            .iter()
            .zip(&want)
            .map(|(g, w)| (f64::from(*g) - w).abs() / top)
            .enumerate()
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .unwrap();
        assert!(worst < 1e-5, "{}: element {at} is {}, expected {}", tensor.name(), grad[at], want[at]);
        println!("{:60} {worst:.1e}", tensor.name());
    }
}

on_both_devices! {
    fn gradients_of_every_weight_match_pytorch(device) {
        let folder = fixtures().join("gradients");
        let loss = json(&folder.join("full.json"))["loss"].as_f64().unwrap();
        let mut model = load(device.clone(), &fixtures().join("tiny_llama"));
        check_gradients(&mut model, &licence()[..192], 48, loss, &folder.join("full.safetensors"));
    }
}

on_both_devices! {
    fn gradients_with_lora_match_pytorch(device) {
        let folder = fixtures().join("gradients");
        let loss = json(&folder.join("lora.json"))["loss"].as_f64().unwrap();
        let mut model = load(device.clone(), &fixtures().join("tiny_llama"));
        attach(&mut model, &fixtures().join("tiny_adapter"));
        check_gradients(&mut model, &licence()[..192], 48, loss, &folder.join("lora.safetensors"));
    }
}

on_both_devices! {
    fn gradients_of_the_oracles_match(device) {
        let Some(oracles) = common::oracles() else { return };
        for case in ["g1_gqa_tied", "g3_lora_untied"] {
            let folder = oracles.join("train/c4_grads").join(case);
            let expected = json(&folder.join("expected.json"));
            let mut model = load(device.clone(), &folder.join("model"));
            if folder.join("adapter").exists() {
                attach(&mut model, &folder.join("adapter"));
            }
            let tokens = tokens(&folder.join("tokens.bin"));
            let loss = expected["loss_f64"].as_f64().unwrap();
            check_gradients(&mut model, &tokens, 64, loss, &folder.join("grads_f64.safetensors"));

            let vocab = model.config().vocab_size;
            let logits = model.logits(&tokens, 4, 64).unwrap();
            let last = &logits[63 * vocab..64 * vocab];
            for (i, (found, want)) in last.iter().zip(expected["last_logits_window0_f64"].as_array().unwrap()).enumerate() {
                let want = want.as_f64().unwrap();
                assert!((f64::from(*found) - want).abs() < 1e-5, "{case}: logit {i} is {found}, expected {want}");
            }
        }
    }
}

/// One update as PyTorch does it: clip to norm 1, AdamW on everything that trains.
struct Trainer<D: Device> {
    model: Model<D>,
    moments: Vec<[D::Buffer; 2]>,
    step: u64,
}

impl<D: Device> Trainer<D> {
    fn new(model: Model<D>) -> Self {
        let zeros = |n| model.device().zeros(n);
        let moments = model.params().iter().map(|p| [zeros(p.elements()), zeros(p.elements())]).collect();
        Trainer { model, moments, step: 0 }
    }

    /// Loss before the update, and the gradient's norm before clipping.
    fn update(&mut self, tokens: &[u32], batch: usize, lr: f64) -> (f64, f64) {
        self.model.zero_grad();
        let loss = self.model.forward_backward(tokens, batch, tokens.len() / batch, 1.0).unwrap();
        let gradients: Vec<&D::Buffer> = self.model.params().iter().filter_map(|p| p.grad.as_ref()).collect();
        let mut stats = self.model.device().step_stats();
        self.model.device().accumulate_and_clip(&gradients, 1.0, &mut stats);
        let norm = self.model.device().read_step_stats(&stats).unwrap().squares.sqrt();
        self.step += 1;
        let settings = AdamW { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: self.step };
        let (device, params) = self.model.device_and_params_mut();
        for (param, [m, v]) in params.iter_mut().zip(&mut self.moments) {
            if let Some(grad) = &param.grad {
                device.adamw(&settings, &stats, &mut param.value, grad, m, v);
            }
        }
        (loss, norm)
    }

    /// Replays `updates`, each with its rate and the f64 loss and gradient norm under these keys.
    fn replay(&mut self, updates: &Value, tokens: &[u32], batch: usize, [loss_key, norm_key]: [&str; 2]) {
        let updates = updates.as_array().unwrap();
        let (mut worst_loss, mut worst_norm) = (0.0f64, 0.0f64);
        for (i, row) in updates.iter().enumerate() {
            let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("no {key} in {row}"));
            let per_batch = tokens.len() / updates.len();
            let (loss, norm) = self.update(&tokens[i * per_batch..][..per_batch], batch, number("lr"));
            let off = (loss / number(loss_key) - 1.0).abs();
            assert!(off < 1e-4, "update {i}: loss {loss}, expected {}", number(loss_key));
            worst_loss = worst_loss.max(off);
            worst_norm = worst_norm.max((norm / number(norm_key) - 1.0).abs());
        }
        println!("{} updates: loss within {worst_loss:.1e}, gradient norm within {worst_norm:.1e}", updates.len());
        assert!(worst_norm < 1e-2, "{worst_norm}");
    }

    fn assert_weights(&self, file: &Path, tolerance: f64) {
        for tensor in TensorFile::open(file).unwrap().tensors() {
            let name = tensor.name().trim_start_matches("base_model.model.");
            let found = self.model.device().read(&self.model.param(name).unwrap().value);
            let want = tensor.to_f32().unwrap();
            let worst = found.iter().zip(want.iter()).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(f64::from(worst) < tolerance, "{name}: off by {worst:e}");
        }
    }
}

on_both_devices! {
    fn full_rank_training_follows_pytorch(device) {
        let expected = json(&fixtures().join("full/trajectory.json"));
        let mut trainer = Trainer::new(load(device.clone(), &fixtures().join("tiny_llama")));
        trainer.replay(&expected["updates"], &licence()[..20 * 192], 4, ["loss", "grad_norm"]);
        for (name, want) in expected["final_weights"].as_object().unwrap() {
            let value = &trainer.model.param(name).unwrap().value;
            let norm = trainer.model.device().sum_of_squares(value).sqrt();
            let want = want["norm"].as_f64().unwrap();
            assert!((norm / want - 1.0).abs() < 1e-5, "{name}: norm {norm}, expected {want}");
        }
    }
}

on_both_devices! {
    fn the_full_rank_trajectory_of_the_oracles_is_followed(device) {
        let Some(oracles) = common::oracles() else { return };
        let folder = oracles.join("train/c1_full");
        let mut trainer = Trainer::new(load(device.clone(), &folder.join("init")));
        let steps = &json(&folder.join("trajectory.json"))["steps"];
        trainer.replay(steps, &tokens(&folder.join("tokens.bin")), 4, ["loss_f64", "grad_norm_f64"]);
        // Two f32 runs of PyTorch differ by 2e-5 there.
        trainer.assert_weights(&folder.join("final/model.safetensors"), 1e-4);
    }
}

on_both_devices! {
    fn the_lora_trajectory_of_the_oracles_is_followed(device) {
        let Some(oracles) = common::oracles() else { return };
        let folder = oracles.join("train/c2_lora");
        let mut model = load(device.clone(), &oracles.join("train/c1_full/final"));
        attach(&mut model, &folder.join("adapter_init"));
        let mut trainer = Trainer::new(model);
        let steps = &json(&folder.join("trajectory.json"))["steps"];
        trainer.replay(steps, &tokens(&folder.join("tokens.bin")), 4, ["loss_f64", "grad_norm_f64"]);
        trainer.assert_weights(&folder.join("adapter_final/adapter_model.safetensors"), 1e-4);
        trainer.assert_weights(&folder.join("final_nonlora.safetensors"), 1e-4);

        // Merging leaves the function as it is.
        let batch = &tokens(&folder.join("tokens.bin"))[..256];
        let before = trainer.model.loss(batch, 4, 64).unwrap().0;
        trainer.model.merge_lora();
        trainer.model.reset_lora(1);
        let after = trainer.model.loss(batch, 4, 64).unwrap().0;
        assert!((after / before - 1.0).abs() < 1e-6, "{before} before the merge, {after} after");
    }
}
