//! One token after another, with the keys and values of the tokens before kept: the work per token grows with the length
//! of the text only in attention.

use super::{Model, params::TARGETS};
use crate::{
    error::{Error, Result},
    ops::{Device, Mat, MatMut, RopeShape},
};

/// A text that grows by a token at a time.
pub struct Decoder<'a, D: Device> {
    model: &'a Model<D>,
    /// Per block, on the host: keys, turned, and values of all tokens so far, (len, K, D).
    cache: Vec<[Vec<f32>; 2]>,
    len: usize,
}

impl<D: Device> Model<D> {
    /// An empty text. The model must have no LoRA factors: merge them first.
    pub fn decoder(&self) -> Result<Decoder<'_, D>> {
        if self.lora.is_some() {
            return Err(Error::request("a model with unmerged factors cannot generate").help("merge the adapter first"));
        }
        let cache = vec![[Vec::new(), Vec::new()]; self.config.num_hidden_layers];
        Ok(Decoder { model: self, cache, len: 0 })
    }
}

impl<D: Device> Decoder<'_, D> {
    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a token; returns the logits (V) of the one that follows it.
    pub fn push(&mut self, token: u32) -> Result<Vec<f32>> {
        let Model { device, config, params, layout, .. } = self.model;
        if self.len >= config.max_position_embeddings || token as usize >= config.vocab_size {
            return Err(Error::request(format!(
                "token {token} at position {} does not fit a model with vocab_size {} and max_position_embeddings {}",
                self.len, config.vocab_size, config.max_position_embeddings
            )));
        }
        let (c, f, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let eps = config.rms_norm_eps as f32;
        let angles = config.rope_frequencies().into_iter().map(|w| self.len as f64 * w);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        let (cos, sin) = (device.upload(&cos), device.upload(&sin));
        let rope = |heads| RopeShape { batch: 1, len: 1, heads, head_dim: d };
        let product = |x: &D::Buffer, weight: usize, beta: f32, y: &mut D::Buffer| {
            let p = &params[weight];
            let (out, inner) = (p.shape[0], p.shape[1]);
            let weight = Mat::new(&p.value, out, inner).t();
            device.matmul(1.0, Mat::new(x, 1, inner), weight, beta, MatMut::new(y, 1, out));
        };

        let (mut x, mut h, mut rstd) = (device.zeros(c), device.zeros(c), device.zeros(1));
        let [mut q, mut k, mut v] = [heads, kv_heads, kv_heads].map(|n| device.zeros(n * d));
        let [mut gate, mut up, mut act] = [(); 3].map(|()| device.zeros(f));
        device.embedding_forward(&device.upload_tokens(&[token]), &params[layout.embedding()].value, &mut x);
        for (layer, [keys, values]) in self.cache.iter_mut().enumerate() {
            let weights: [usize; TARGETS.len()] = std::array::from_fn(|which| layout.weight(layer, which));
            let [wq, wk, wv, wo, w_gate, w_up, w_down] = weights;
            device.rms_norm_forward(&x, &params[layout.norm(layer, 0)].value, eps, &mut h, &mut rstd);
            product(&h, wq, 0.0, &mut q);
            product(&h, wk, 0.0, &mut k);
            product(&h, wv, 0.0, &mut v);
            device.rope_forward(rope(heads), &cos, &sin, &mut q);
            device.rope_forward(rope(kv_heads), &cos, &sin, &mut k);
            keys.extend(device.read(&k));
            values.extend(device.read(&v));
            let o = device.upload(&attend(&device.read(&q), keys, values, heads, kv_heads, d));
            product(&o, wo, 1.0, &mut x);
            device.rms_norm_forward(&x, &params[layout.norm(layer, 1)].value, eps, &mut h, &mut rstd);
            product(&h, w_gate, 0.0, &mut gate);
            product(&h, w_up, 0.0, &mut up);
            device.swiglu_forward(&gate, &up, &mut act);
            product(&act, w_down, 1.0, &mut x);
        }
        device.rms_norm_forward(&x, &params[layout.final_norm()].value, eps, &mut h, &mut rstd);
        let mut logits = device.zeros(config.vocab_size);
        product(&h, layout.head(), 0.0, &mut logits);
        device.status()?;
        self.len += 1;
        Ok(device.read(&logits))
    }
}

/// The newest query (H, D) against all keys and values (len, K, D).
fn attend(q: &[f32], keys: &[f32], values: &[f32], heads: usize, kv_heads: usize, d: usize) -> Vec<f32> {
    let scale = 1.0 / (d as f32).sqrt();
    let mut o = vec![0f32; heads * d];
    for (h, (q, o)) in q.chunks(d).zip(o.chunks_mut(d)).enumerate() {
        let own = (h / (heads / kv_heads)) * d;
        let of_head = |all: &'_ [f32], t: usize| -> std::ops::Range<usize> {
            let start = t * kv_heads * d + own;
            debug_assert!(start + d <= all.len());
            start..start + d
        };
        let len = keys.len() / (kv_heads * d);
        let mut scores: Vec<f32> =
            (0..len).map(|t| scale * q.iter().zip(&keys[of_head(keys, t)]).map(|(q, k)| q * k).sum::<f32>()).collect();
        let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        scores.iter_mut().for_each(|s| *s = (*s - top).exp());
        let total: f32 = scores.iter().sum();
        for (t, s) in scores.iter().enumerate() {
            for (o, v) in o.iter_mut().zip(&values[of_head(values, t)]) {
                *o += s / total * v;
            }
        }
    }
    o
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{LlamaConfig, LoraSpec},
        ops::{
            Cpu,
            testing::{assert_close, wide},
        },
    };

    #[test]
    fn a_text_that_grows_has_the_logits_of_the_whole_text() {
        let config = LlamaConfig::from_value(&serde_json::json!({"model_type": "llama", "hidden_size": 24,
            "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 37, "max_position_embeddings": 9, "initializer_range": 0.3}));
        let mut model = Model::init(Cpu, config.unwrap(), 3).unwrap();
        let tokens = [1, 5, 36, 0, 7, 7, 2, 9, 11];
        let whole = model.logits(&tokens, 1, tokens.len()).unwrap();
        let mut decoder = model.decoder().unwrap();
        for (i, token) in tokens.into_iter().enumerate() {
            let logits = decoder.push(token).unwrap();
            assert_close(&format!("position {i}"), &logits, &wide(&whole[37 * i..][..37]), 1e-5);
        }
        assert!(decoder.push(1).unwrap_err().message.contains("max_position_embeddings 9"));
        model.add_lora(LoraSpec::new(2, 4.0));
        assert!(model.decoder().is_err());
    }
}
