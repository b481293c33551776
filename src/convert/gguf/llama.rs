//! The LLaMA family in GGUF: its sizes, its `config.json`, its tensors by Hugging Face's names.
//!
//! L layers, H query heads, K key/value heads, D head size.

use super::{reader::Gguf, rope, settings};
use crate::{
    checkpoint::{Dtype, dtype},
    error::{Error, Result},
};
use serde_json::{Map, Value, json};

/// What a file's `general.architecture` says, and what `config.json` has to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    /// LLaMA, Mistral, SmolLM2: rotary pairs are stored side by side and have to be taken apart.
    Llama,
    /// The same layers with biases on q, k and v; rotary pairs as in Hugging Face's files.
    Qwen2,
}

/// Sizes and settings of a model.
#[derive(Clone, Debug)]
pub struct Llama {
    architecture: String,
    family: Family,
    hidden: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocabulary: usize,
    context: usize,
    eps: f64,
    theta: f64,
    scaling: Value,
    tied: bool,
    attention_bias: bool,
    mlp_bias: bool,
}

/// Where a tensor goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Hugging Face's name.
    pub name: String,
    /// The extents that the metadata ask for.
    pub shape: Vec<usize>,
    /// Rows of each head whose rotary pairs are stored side by side; `None` for tensors that are stored as they are.
    pub paired_head: Option<usize>,
}

impl Llama {
    /// Reads the metadata; refuses other architectures by name.
    pub fn read(file: &Gguf) -> Result<Llama> {
        let architecture = file.text("general.architecture")?.unwrap_or("missing");
        let family = match architecture {
            "llama" | "mistral" => Family::Llama,
            "qwen2" => Family::Qwen2,
            other => {
                return Err(file
                    .bad(format!("general.architecture is '{other}', which is not supported"))
                    .help("supported: llama (LLaMA, Mistral, SmolLM2 and relatives), qwen2"));
            }
        };
        let key = |name: &str| format!("{architecture}.{name}");
        if let Some(experts) = file.count(&key("expert_count"))?.filter(|&n| n > 0) {
            return Err(file.bad(format!("it is a mixture of {experts} experts, which is not supported")));
        }
        let (hidden, heads) = (file.size(&key("embedding_length"))?, file.size(&key("attention.head_count"))?);
        let kv_heads = file.count(&key("attention.head_count_kv"))?.unwrap_or(heads);
        let head_dim = file.count(&key("attention.key_length"))?.unwrap_or(hidden / heads);
        if kv_heads == 0 || heads % kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 || head_dim > 1 << 20 {
            return Err(file.bad(format!(
                "{heads} heads of {head_dim} with {kv_heads} key/value heads: expected an even size and a divisor"
            )));
        }
        for name in ["rope.dimension_count", "attention.value_length"] {
            if let Some(n) = file.count(&key(name))?.filter(|&n| n != head_dim) {
                return Err(file.bad(format!("{} is {n}, expected the head size {head_dim}", key(name))));
            }
        }
        let layers = file.size(&key("block_count"))?;
        if layers > file.tensors.len() {
            return Err(file.bad(format!("it claims {layers} layers, but holds {} tensors", file.tensors.len())));
        }
        let theta = file.number(&key("rope.freq_base"))?.unwrap_or(10000.0);
        let has = |name: &str| file.tensors.iter().any(|t| t.name == name);
        let vocabulary = match file.tensors.iter().find(|t| t.name == "token_embd.weight").map(|t| &t.shape[..]) {
            Some(&[rows, _]) => rows,
            _ => return Err(file.bad("it has no matrix 'token_embd.weight'")),
        };
        Ok(Llama {
            architecture: architecture.to_owned(),
            family,
            hidden,
            inner: file.size(&key("feed_forward_length"))?,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocabulary,
            context: file.size(&key("context_length"))?,
            eps: file.number(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-6),
            theta,
            scaling: rope::scaling(file, architecture, theta, head_dim)?,
            tied: !has("output.weight"),
            attention_bias: has("blk.0.attn_q.bias"),
            mlp_bias: has("blk.0.ffn_down.bias"),
        })
    }

    /// What the file calls it, in front of its settings.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Size of an attention head, D.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Tokens of the embedding.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Every tensor of the model by its name in the file, in the order of Hugging Face's files.
    pub fn places(&self) -> Vec<(String, Place)> {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut places = Vec::new();
        let mut add = |from: String, to: String, shape: &[usize], paired: bool| {
            let paired_head = (paired && self.family == Family::Llama).then_some(self.head_dim);
            places.push((from, Place { name: to, shape: shape.to_vec(), paired_head }));
        };
        add("token_embd.weight".into(), "model.embed_tokens.weight".into(), &[self.vocabulary, self.hidden], false);
        for i in 0..self.layers {
            let mut part = |from: &str, to: &str, shape: &[usize], paired: bool| {
                add(format!("blk.{i}.{from}"), format!("model.layers.{i}.{to}"), shape, paired);
            };
            part("attn_norm.weight", "input_layernorm.weight", &[self.hidden], false);
            for (from, to, rows, columns, paired, biased) in [
                ("attn_q", "self_attn.q_proj", q, self.hidden, true, self.attention_bias),
                ("attn_k", "self_attn.k_proj", kv, self.hidden, true, self.attention_bias),
                ("attn_v", "self_attn.v_proj", kv, self.hidden, false, self.attention_bias),
                // Qwen2 has no bias here; a LLaMA with biases has one on each of the four.
                ("attn_output", "self_attn.o_proj", self.hidden, q, false, self.attention_bias && self.is_llama()),
                ("ffn_gate", "mlp.gate_proj", self.inner, self.hidden, false, self.mlp_bias),
                ("ffn_up", "mlp.up_proj", self.inner, self.hidden, false, self.mlp_bias),
                ("ffn_down", "mlp.down_proj", self.hidden, self.inner, false, self.mlp_bias),
            ] {
                part(&format!("{from}.weight"), &format!("{to}.weight"), &[rows, columns], paired);
                if biased {
                    part(&format!("{from}.bias"), &format!("{to}.bias"), &[rows], paired);
                }
            }
            part("ffn_norm.weight", "post_attention_layernorm.weight", &[self.hidden], false);
        }
        add("output_norm.weight".into(), "model.norm.weight".into(), &[self.hidden], false);
        if !self.tied {
            add("output.weight".into(), "lm_head.weight".into(), &[self.vocabulary, self.hidden], false);
        }
        places
    }

    fn is_llama(&self) -> bool {
        self.family == Family::Llama
    }

    /// `config.json`, and `generation_config.json` with the token ids that generation needs.
    pub fn configs(&self, file: &Gguf, weights: Dtype) -> Result<(Value, Value)> {
        let ids = token_ids(file, self.vocabulary)?;
        let (class, kind) = match self.family {
            Family::Llama => ("LlamaForCausalLM", "llama"),
            Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        };
        let mut config = json!({
            "architectures": [class],
            "model_type": kind,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "rope_scaling": self.scaling,
            "tie_word_embeddings": self.tied,
            "attention_dropout": 0.0,
            "torch_dtype": dtype::torch_name(weights),
        });
        let object = config.as_object_mut().ok_or_else(|| Error::environment("an object was just built"))?;
        if self.family == Family::Llama {
            object.insert("attention_bias".into(), self.attention_bias.into());
            object.insert("mlp_bias".into(), self.mlp_bias.into());
        }
        object.extend(ids.clone());
        let mut generation = ids;
        generation.extend(sampling(file)?);
        Ok((config, Value::Object(generation)))
    }
}

/// What the file recommends for drawing tokens.
fn sampling(file: &Gguf) -> Result<Map<String, Value>> {
    let mut settings = Map::new();
    for (from, to) in settings::SAMPLING {
        let key = format!("general.sampling.{from}");
        let value = match file.metadata.get(&key) {
            None => continue,
            Some(_) if from == "top_k" => file.count(&key)?.map(Value::from),
            Some(_) => file.number(&key)?.map(Value::from),
        };
        settings.insert("do_sample".into(), true.into());
        settings.extend(value.map(|value| (to.to_owned(), value)));
    }
    Ok(settings)
}

/// `bos_token_id`, `eos_token_id` (a list where chats end with another token than texts), `pad_token_id`.
fn token_ids(file: &Gguf, vocabulary: usize) -> Result<Map<String, Value>> {
    let mut ids = Map::new();
    let get = |name: &str| -> Result<Option<usize>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match file.count(&key)? {
            Some(id) if id >= vocabulary => {
                Err(file.bad(format!("{key} is {id}, expected less than the {vocabulary} tokens of the embedding")))
            }
            id => Ok(id),
        }
    };
    if let Some(id) = get("bos")? {
        ids.insert("bos_token_id".into(), id.into());
    }
    let (eos, eot) = (get("eos")?, get("eot")?);
    let eos = match (eos, eot) {
        (Some(eos), Some(eot)) if eos != eot => Some(json!([eos, eot])),
        (eos, eot) => eos.or(eot).map(Value::from),
    };
    if let Some(eos) = eos {
        ids.insert("eos_token_id".into(), eos);
    }
    if let Some(id) = get("padding")? {
        ids.insert("pad_token_id".into(), id.into());
    }
    Ok(ids)
}
