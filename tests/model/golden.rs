//! Loss and gradients of one batch against PyTorch in f64, on both devices.

use crate::common::cuda_emulator::on_both_devices;
use crate::common::fixtures::{assert_close, fixture, json, text, values};
use relora_kit::{
    checkpoint::Checkpoint,
    model::{LoraSpec, Model, ParamKind},
    ops::Device,
};

const WINDOWS: usize = 4;
const WINDOW: usize = 48;

fn tiny_llama<D: Device>(device: D) -> Model<D> {
    Model::load(device, &Checkpoint::open(&fixture("tiny_llama")).unwrap()).unwrap()
}

/// Every gradient within 1e-5 of its tensor's norm: f32 arithmetic is about ten times closer.
fn gradients_match<D: Device>(mut model: Model<D>, case: &str) {
    let tokens: Vec<u32> = text()[..WINDOWS * WINDOW].iter().map(|&byte| byte.into()).collect();
    let loss = model.forward_backward(&tokens, WINDOWS, WINDOW, 1.0).unwrap();
    let expected_loss = json(&format!("gradients/{case}.json"))["loss"].as_f64().unwrap();
    assert_close("loss", &[1], &[loss], &[expected_loss], |_| 1e-6 * expected_loss);

    let expected = Checkpoint::open(&fixture(&format!("gradients/{case}.safetensors"))).unwrap();
    let trainable: Vec<_> = model.params().iter().filter(|p| p.trainable).collect();
    assert_eq!(trainable.len(), expected.len(), "number of gradients");
    for param in trainable {
        let found: Vec<f64> = model.device().read(param.grad.as_ref().unwrap()).into_iter().map(f64::from).collect();
        let expected = values(&expected, &param.name);
        let norm = expected.iter().map(|g| g * g).sum::<f64>().sqrt();
        assert_close(&param.name, &param.shape, &found, &expected, |_| 1e-5 * norm);
    }
}

on_both_devices! {
    fn gradients_of_every_weight_match_pytorch(device) {
        gradients_match(tiny_llama(device), "full");
    }
}

on_both_devices! {
    fn gradients_of_lora_factors_match_pytorch(device) {
        let mut model = tiny_llama(device.clone());
        let adapter = Checkpoint::open(&fixture("tiny_adapter/adapter_model.safetensors")).unwrap();
        model.add_lora(LoraSpec::new(4, 8.0));
        model.set_trainable(|kind| *kind != ParamKind::Linear);
        for param in model.params_mut().iter_mut().filter(|p| matches!(p.kind, ParamKind::LoraA | ParamKind::LoraB)) {
            let factor = adapter.tensor(&format!("base_model.model.{}", param.name)).unwrap();
            device.write(&mut param.value, &factor.to_f32().unwrap());
        }
        gradients_match(model, "lora");
    }
}
