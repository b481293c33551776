//! Loss and every gradient of a whole model, with and without LoRA, on both devices, against candle's autograd in f64.
//! Tolerances: 1e-6 for the loss, 1e-5 of the largest element for a gradient; 1e-4 for that of a scaling, which is a single
//! number, the sum of terms of both signs.

use crate::common::autograd::{
    assert_close, attention, cross_entropy, grad, indices, noise, rms_norm, rope, swiglu, values, var,
};
use crate::common::cuda_emulator::on_both_devices;
use candle_core::{Result, Tensor, Var};
use relora_kit::{
    model::{LlamaConfig, LoraSpec, Model, ParamKind, ProductChoice},
    ops::Device,
};
use std::collections::BTreeMap;

const BATCH: usize = 3;
const LEN: usize = 7;

/// The model's loss, from its parameters by their names.
fn loss(config: &LlamaConfig, vars: &BTreeMap<String, Var>, lora: Option<&LoraSpec>, tokens: &[u32]) -> Result<Tensor> {
    let get = |name: String| vars.get(&name).unwrap_or_else(|| panic!("no '{name}'")).as_tensor();
    let linear = |x: &Tensor, module: String| -> Result<Tensor> {
        let y = x.matmul(&get(format!("{module}.weight")).t()?)?;
        let Some(spec) = lora else { return Ok(y) };
        let (a, b) = (get(format!("{module}.lora_A.weight")), get(format!("{module}.lora_B.weight")));
        let low = x.matmul(&a.t()?)?.matmul(&b.t()?)?;
        if spec.train_scaling {
            return y + low.broadcast_mul(&get(format!("{module}.scaling")).tanh()?)?;
        }
        y + (low * spec.scaling)?
    };
    let (d, eps) = (config.head_dim, config.rms_norm_eps);
    let angles: Vec<f64> =
        (0..LEN).flat_map(|t| config.rope_frequencies().into_iter().map(move |f| t as f64 * f)).collect();
    let angles = Tensor::from_vec(angles, (LEN, d / 2), &candle_core::Device::Cpu)?;
    let embedding = get("model.embed_tokens.weight".into());
    let mut x = embedding.index_select(&indices(tokens), 0)?;
    for i in 0..config.num_hidden_layers {
        let name = |module: &str| format!("model.layers.{i}.{module}");
        let h = rms_norm(&x, get(name("input_layernorm.weight")), eps)?;
        let heads = |x: Tensor, heads: usize| x.reshape((BATCH, LEN, heads, d));
        let q = heads(linear(&h, name("self_attn.q_proj"))?, config.num_attention_heads)?;
        let k = heads(linear(&h, name("self_attn.k_proj"))?, config.num_key_value_heads)?;
        let v = heads(linear(&h, name("self_attn.v_proj"))?, config.num_key_value_heads)?;
        let o = attention(&rope(&q, &angles)?, &rope(&k, &angles)?, &v)?;
        x = (x + linear(&o.reshape((BATCH * LEN, ()))?, name("self_attn.o_proj"))?)?;
        let h = rms_norm(&x, get(name("post_attention_layernorm.weight")), eps)?;
        let inner = swiglu(&linear(&h, name("mlp.gate_proj"))?, &linear(&h, name("mlp.up_proj"))?)?;
        x = (x + linear(&inner, name("mlp.down_proj"))?)?;
    }
    let h = rms_norm(&x, get("model.norm.weight".into()), eps)?;
    let head = vars.get("lm_head.weight").map_or(embedding, |head| head.as_tensor());
    let predicting: Vec<u32> = (0..(BATCH * LEN) as u32).filter(|i| (i + 1) % LEN as u32 != 0).collect();
    let targets: Vec<u32> = predicting.iter().map(|&i| tokens[i as usize + 1]).collect();
    cross_entropy(&h.matmul(&head.t()?)?.index_select(&indices(&predicting), 0)?, &targets)?.mean_all()
}

fn compare<D: Device>(device: D, tied: bool, lora: Option<LoraSpec>) {
    let config = LlamaConfig::from_value(&serde_json::json!({"model_type": "llama", "hidden_size": 24,
        "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "vocab_size": 37, "tie_word_embeddings": tied, "initializer_range": 0.3}));
    let mut model = Model::init(device, config.unwrap(), 3).unwrap();
    if let Some(spec) = &lora {
        model.add_lora(spec.clone());
        let (device, params) = model.device_and_params_mut();
        for b in params.iter_mut().filter(|p| p.kind == ParamKind::LoraB) {
            let values = noise(7, b.elements());
            device.write(&mut b.value, &values);
        }
    }
    let tokens: Vec<u32> = (0..(BATCH * LEN) as u32).map(|i| i * i * 31 % 37).collect();
    let found = model.forward_backward(&tokens, BATCH, LEN, 1.0).unwrap();

    let vars: BTreeMap<String, Var> =
        model.params().iter().map(|p| (p.name.clone(), var(&model.device().read(&p.value), &p.shape))).collect();
    let loss = loss(model.config(), &vars, lora.as_ref(), &tokens).unwrap();
    let grads = loss.backward().unwrap();
    let expected = values(&loss)[0];
    assert!((found / expected - 1.0).abs() < 1e-6, "{found}, expected {expected}");
    for param in model.params() {
        assert_eq!(param.grad.is_some(), lora.is_none() || param.kind != ParamKind::Linear, "{}", param.name);
        if let Some(found) = &param.grad {
            let tolerance = if param.kind == ParamKind::LoraScaling { 1e-4 } else { 1e-5 };
            assert_close(&param.name, &model.device().read(found), &grad(&grads, &vars[&param.name]), tolerance);
        }
    }
}

on_both_devices! {
    fn a_full_rank_model_matches_candle(device) {
        compare(device.clone(), false, None);
        compare(device.clone(), true, None);
    }
}

on_both_devices! {
    fn a_model_with_lora_matches_candle_however_its_products_are_computed(device) {
        for product in [ProductChoice::Factored, ProductChoice::Formed, ProductChoice::WholeGradient] {
            compare(device.clone(), false, Some(LoraSpec { product, ..LoraSpec::new(3, 6.0) }));
        }
        compare(device.clone(), true, Some(LoraSpec { train_scaling: true, ..LoraSpec::new(3, 6.0) }));
    }
}
