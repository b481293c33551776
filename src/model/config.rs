//! `config.json` of a LLaMA checkpoint, with Hugging Face's field names; and the sizes of the ReLoRA experiments.

use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// How the rotary angles are stretched beyond the context the model was trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a linear blend between.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before stretching.
        original_max_position_embeddings: f64,
    },
}

/// A LLaMA architecture. Field names and defaults are those of `transformers.LlamaConfig`.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// C: width of the residual stream.
    pub hidden_size: usize,
    /// F: inner width of the MLP.
    pub intermediate_size: usize,
    /// L: decoder blocks.
    pub num_hidden_layers: usize,
    /// H: query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// D: width of one head; even.
    pub head_dim: usize,
    /// V: number of token ids.
    pub vocab_size: usize,
    /// Longest sequence the model is meant for.
    pub max_position_embeddings: usize,
    /// Added to the mean square inside RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the head is the transposed embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
    /// What else `config.json` held (token ids, ...); written back by [`LlamaConfig::to_json`].
    pub extra: Map<String, Value>,
}

/// Sizes of the official ReLoRA code: name, hidden, inner, layers, heads, vocabulary, context.
const PRESETS: [(&str, usize, usize, usize, usize, usize, usize); 14] = [
    ("llama_9m", 128, 352, 4, 4, 32100, 1024),
    ("llama_20m", 256, 688, 4, 4, 32100, 1024),
    ("llama_35m", 384, 1024, 6, 8, 32100, 1024),
    ("llama_40m", 416, 1024, 8, 8, 32100, 1024),
    ("llama_60m", 512, 1376, 8, 8, 32100, 1024),
    ("llama_71m", 512, 1368, 12, 8, 32100, 1024),
    ("llama_100m", 512, 1368, 21, 16, 32100, 1024),
    ("llama_130m", 768, 2048, 12, 12, 32100, 1024),
    ("llama_250m", 768, 2560, 24, 16, 32100, 1024),
    ("llama_250m_50K", 768, 2560, 24, 16, 50257, 1024),
    ("llama_350m", 1024, 2736, 24, 16, 32100, 1024),
    ("llama_1b", 2048, 5461, 24, 32, 32100, 1024),
    ("llama_3b", 2560, 6848, 32, 32, 32100, 1024),
    ("llama_7b", 4096, 11008, 32, 32, 32100, 2048),
];

/// More layers than any model has: tables of tensors are made by this number.
const MAX_LAYERS: usize = 1 << 16;

/// Keys that [`LlamaConfig`] reads or writes itself, so that they are not part of `extra`.
const OWN_KEYS: [&str; 24] = [
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "max_sequence_length",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "initializer_range",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "hidden_act",
    "torch_dtype",
    "dtype",
    "transformers_version",
];

impl LlamaConfig {
    /// Reads `path` (a `config.json`). Everything this program would compute differently is refused.
    pub fn from_json(path: &Path) -> Result<Self> {
        let text = crate::checkpoint::read_text(path)?;
        let value: Value = serde_json::from_slice(&text)
            .map_err(|e| Error::request(format!("'{}' is not valid JSON: {e}", path.display())))?;
        Self::from_value(&value).map_err(|e| Error { message: format!("'{}': {}", path.display(), e.message), ..e })
    }

    /// Reads a parsed `config.json`.
    pub fn from_value(value: &Value) -> Result<Self> {
        let object =
            value.as_object().ok_or_else(|| Error::request("expected a JSON object with the model's sizes"))?;
        let keys = Keys(object);
        keys.refuse_what_is_not_llama()?;
        let hidden_size = keys.count("hidden_size")?;
        let num_attention_heads = keys.count("num_attention_heads")?;
        let head_dim = match keys.optional_count("head_dim")? {
            Some(n) => n,
            None if hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
            None => {
                return Err(Error::request(format!(
                    "hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}, \
                     and there is no head_dim"
                )));
            }
        };
        let (rope_theta, rope_scaling) = keys.rope()?;
        let context = match keys.optional_count("max_position_embeddings")? {
            Some(n) => n,
            // The spelling of the official ReLoRA configs.
            None => keys.optional_count("max_sequence_length")?.unwrap_or(2048),
        };
        let config = LlamaConfig {
            hidden_size,
            intermediate_size: keys.count("intermediate_size")?,
            num_hidden_layers: keys.count_up_to("num_hidden_layers", MAX_LAYERS)?,
            num_attention_heads,
            num_key_value_heads: keys.optional_count("num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim,
            vocab_size: keys.count("vocab_size")?,
            max_position_embeddings: context,
            rms_norm_eps: keys.number("rms_norm_eps", 1e-6)?,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: keys.boolean("tie_word_embeddings")?,
            initializer_range: keys.number("initializer_range", 0.02)?,
            extra: object
                .iter()
                .filter(|(k, _)| !OWN_KEYS.contains(&k.as_str()))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect(),
        };
        config.check()?;
        Ok(config)
    }

    /// A `config.json` that `transformers.LlamaForCausalLM` loads.
    pub fn to_json(&self) -> Value {
        let rope_scaling = match &self.rope_scaling {
            RopeScaling::None => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": *original_max_position_embeddings as u64,
                })
            }
        };
        let mut value = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope_scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "mlp_bias": false,
            "torch_dtype": "float32",
        });
        let object = value.as_object_mut().expect("an object was just built");
        object.extend(self.extra.iter().map(|(k, v)| (k.clone(), v.clone())));
        value
    }

    /// One of the sizes of the official ReLoRA code, by its name there; untied, as there.
    pub fn preset(name: &str) -> Option<Self> {
        let &(_, hidden, inner, layers, heads, vocab, context) = PRESETS.iter().find(|p| p.0 == name)?;
        let ids = json!({"bos_token_id": 0, "eos_token_id": 1});
        Some(LlamaConfig {
            hidden_size: hidden,
            intermediate_size: inner,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim: hidden / heads,
            vocab_size: vocab,
            max_position_embeddings: context,
            rms_norm_eps: 1e-6,
            rope_theta: 10000.0,
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            extra: ids.as_object().cloned().unwrap_or_default(),
        })
    }

    /// The names [`LlamaConfig::preset`] knows, smallest first.
    pub fn preset_names() -> Vec<&'static str> {
        PRESETS.iter().map(|p| p.0).collect()
    }

    /// Whether the sizes fit together.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, n)| *n == 0) {
            return Err(Error::request(format!("{name} is 0, expected a positive number")));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(Error::request(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.num_attention_heads, self.num_key_value_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::request(format!("head_dim is {}, expected an even number", self.head_dim)));
        }
        for (name, x) in [("rms_norm_eps", self.rms_norm_eps), ("initializer_range", self.initializer_range)] {
            if !(x.is_finite() && x >= 0.0) {
                return Err(Error::request(format!("{name} is {x}, expected a number of at least 0")));
            }
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return Err(Error::request(format!("rope_theta is {}, expected a positive number", self.rope_theta)));
        }
        Ok(())
    }

    /// Radians per position of each of the `head_dim / 2` rotary pairs.
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let d = self.head_dim as f64;
        let plain = (0..self.head_dim / 2).map(|i| self.rope_theta.powf(-2.0 * i as f64 / d));
        match self.rope_scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } => plain
                .map(|f| {
                    let turns = original * f / (2.0 * std::f64::consts::PI);
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    keep * f + (1.0 - keep) * f / factor
                })
                .collect(),
        }
    }

    /// Number of weights, without LoRA factors; a tied head is counted once.
    pub fn parameter_count(&self) -> u64 {
        let [c, f, l, v] = [self.hidden_size, self.intermediate_size, self.num_hidden_layers, self.vocab_size];
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let block = 2 * c * q + 2 * c * kv + 3 * c * f + 2 * c;
        let vocab_matrices = if self.tie_word_embeddings { 1 } else { 2 };
        (vocab_matrices * v * c + l * block + c) as u64
    }
}

/// Typed access to the keys of a `config.json`.
struct Keys<'a>(&'a Map<String, Value>);

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if n > 0 && n <= 1 << 40 => Ok(Some(n as usize)),
            _ => Err(Error::request(format!("{key} is {value}, expected a positive whole number"))),
        }
    }

    fn count(&self, key: &str) -> Result<usize> {
        self.optional_count(key)?.ok_or_else(|| Error::request(format!("{key} is missing")))
    }

    fn count_up_to(&self, key: &str, most: usize) -> Result<usize> {
        match self.count(key)? {
            n if n <= most => Ok(n),
            n => Err(Error::request(format!("{key} is {n}, expected a whole number from 1 to {most}"))),
        }
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_f64().ok_or_else(|| Error::request(format!("{key} is {value}, expected a number")))
    }

    fn boolean(&self, key: &str) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| Error::request(format!("{key} is {value}, expected true or false")))
    }

    fn refuse_what_is_not_llama(&self) -> Result<()> {
        let kind = self.get("model_type").and_then(Value::as_str).unwrap_or("missing");
        if kind != "llama" {
            return Err(Error::request(format!("model_type is {kind}, expected llama"))
                .help("only LLaMA models can be trained and evaluated; merge, inspect and spectrum take any model"));
        }
        for key in ["attention_bias", "mlp_bias"] {
            if self.boolean(key)? {
                return Err(Error::request(format!("{key} is true: linear layers with a bias are not supported")));
            }
        }
        if let Some(act) = self.get("hidden_act")
            && act != "silu"
            && act != "swish"
        {
            return Err(Error::request(format!("hidden_act is {act}, expected silu")));
        }
        if self.number("attention_dropout", 0.0)? != 0.0 {
            return Err(Error::request("attention_dropout is not 0: dropout on attention weights is not supported"));
        }
        if self.get("quantization_config").is_some() {
            return Err(Error::request("the weights are quantised (quantization_config), expected floating point"));
        }
        Ok(())
    }

    /// Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
    fn rope(&self) -> Result<(f64, RopeScaling)> {
        if self.number("partial_rotary_factor", 1.0)? != 1.0 {
            return Err(Error::request("partial_rotary_factor is not 1: partly rotated heads are not supported"));
        }
        let theta = self.number("rope_theta", 10000.0)?;
        let given = |key| self.get(key).filter(|value| value.as_object().is_none_or(|object| !object.is_empty()));
        // transformers 5 lets a rope_scaling replace rope_parameters as a whole, its rope_theta included, which hardly anybody
        // who adds one means.
        match (given("rope_parameters"), given("rope_scaling")) {
            (None, None) => Ok((theta, RopeScaling::None)),
            (Some(value), None) | (None, Some(value)) => Self::rope_of(value, theta),
            (Some(new), Some(old)) => {
                let (new_rope, old_rope) = (Self::rope_of(new, theta)?, Self::rope_of(old, theta)?);
                if new_rope != old_rope {
                    return Err(Error::request(format!(
                        "rope_parameters {new} and rope_scaling {old} with rope_theta {theta} contradict each other"
                    ))
                    .help("remove one of them from config.json; transformers 5 would use rope_scaling alone"));
                }
                Ok(new_rope)
            }
        }
    }

    fn rope_of(value: &Value, theta: f64) -> Result<(f64, RopeScaling)> {
        let object = value
            .as_object()
            .ok_or_else(|| Error::request(format!("rope scaling is {value}, expected an object with rope_type")))?;
        let inner = Keys(object);
        if let Some(layers) = object.iter().find_map(|(key, value)| value.is_object().then_some(key)) {
            return Err(Error::request(format!(
                "rope scaling has settings of its own for '{layers}': rotary embeddings that differ between layers are not supported"
            )));
        }
        let theta = inner.number("rope_theta", theta)?;
        if inner.number("partial_rotary_factor", 1.0)? != 1.0 {
            return Err(Error::request("partial_rotary_factor is not 1: partly rotated heads are not supported"));
        }
        let required = |key: &str| {
            let x = inner.number(key, f64::NAN)?;
            if x > 0.0 { Ok(x) } else { Err(Error::request(format!("rope scaling needs a positive {key}"))) }
        };
        let kind = inner.get("rope_type").or(inner.get("type")).and_then(Value::as_str).unwrap_or("default");
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: required("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: required("factor")?,
                low_freq_factor: required("low_freq_factor")?,
                high_freq_factor: required("high_freq_factor")?,
                original_max_position_embeddings: required("original_max_position_embeddings")?,
            },
            other => {
                return Err(Error::request(format!("rope scaling '{other}' is not supported"))
                    .help("supported: default, linear, llama3"));
            }
        };
        Ok((theta, scaling))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Value {
        json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 256, "bos_token_id": 3})
    }

    fn message(change: Value) -> String {
        let mut value = tiny();
        value.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        LlamaConfig::from_value(&value).unwrap_err().message
    }

    #[test]
    fn two_settings_of_rope_that_contradict_each_other_are_refused() {
        let read = |change: Value| {
            let mut value = tiny();
            value.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            LlamaConfig::from_value(&value).map(|c| (c.rope_theta, c.rope_scaling)).map_err(|e| e.message)
        };
        let linear = json!({"rope_type": "linear", "factor": 4.0});
        let new = json!({"rope_type": "default", "rope_theta": 10000.0});
        // transformers 5 reads the first as linear, others as default.
        let message = read(json!({"rope_parameters": new, "rope_scaling": linear})).unwrap_err();
        assert!(
            message.contains("contradict") && message.contains("linear") && message.contains("default"),
            "{message}"
        );
        // rope_scaling takes the theta of rope_parameters away.
        let theta = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0});
        assert!(read(json!({"rope_parameters": theta, "rope_scaling": linear})).unwrap_err().contains("500000"));
        let same = read(json!({"rope_parameters": theta, "rope_scaling": linear, "rope_theta": 500000.0}));
        assert_eq!(same, Ok((500000.0, RopeScaling::Linear { factor: 4.0 })));
        // Nothing is said by null or {}.
        assert_eq!(read(json!({"rope_parameters": new, "rope_scaling": {}})), Ok((10000.0, RopeScaling::None)));
        assert_eq!(
            read(json!({"rope_parameters": null, "rope_scaling": linear})).unwrap().1,
            RopeScaling::Linear { factor: 4.0 }
        );
        assert!(read(json!({"partial_rotary_factor": 0.5})).unwrap_err().contains("partial_rotary_factor"));
        let nested = json!({"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}});
        assert!(read(json!({"rope_parameters": nested})).unwrap_err().contains("full_attention"));
    }

    #[test]
    fn both_spellings_of_rope_are_read() {
        let mut old = tiny();
        old["rope_theta"] = json!(500000.0);
        old["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
        let mut new = tiny();
        new["rope_parameters"] = json!({"rope_theta": 500000.0, "rope_type": "linear", "factor": 2.0});
        let (old, new) = (LlamaConfig::from_value(&old).unwrap(), LlamaConfig::from_value(&new).unwrap());
        assert_eq!(old, new);
        assert_eq!((old.rope_theta, old.rope_scaling), (500000.0, RopeScaling::Linear { factor: 2.0 }));
    }

    #[test]
    fn what_would_be_computed_differently_is_refused() {
        assert!(message(json!({"model_type": "gpt2"})).contains("model_type is gpt2"));
        assert!(message(json!({"attention_bias": true})).contains("attention_bias"));
        assert!(message(json!({"hidden_act": "gelu"})).contains("hidden_act"));
        assert!(message(json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}})).contains("yarn"));
        assert!(message(json!({"num_key_value_heads": 3})).contains("not a multiple"));
        assert!(message(json!({"hidden_size": 0})).contains("hidden_size"));
        assert!(message(json!({"hidden_size": 62})).contains("no head_dim"));
        assert!(message(json!({"vocab_size": null})).contains("vocab_size is missing"));
    }

    #[test]
    fn writing_and_reading_gives_the_same_config() {
        let mut config = LlamaConfig::from_value(&tiny()).unwrap();
        assert_eq!(config.extra["bos_token_id"], 3);
        config.rope_scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        assert_eq!(LlamaConfig::from_value(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn presets_have_the_sizes_their_names_say() {
        let millions = |name: &str| LlamaConfig::preset(name).unwrap().parameter_count() as f64 / 1e6;
        for name in LlamaConfig::preset_names() {
            LlamaConfig::preset(name).unwrap().check().unwrap();
        }
        // The paper's Table 1 for a vocabulary of 32000; this one has 100 ids more.
        for (name, paper) in [("llama_60m", 58.0), ("llama_130m", 134.0), ("llama_350m", 368.0), ("llama_1b", 1339.0)] {
            let extra_ids = 2.0 * 100.0 * LlamaConfig::preset(name).unwrap().hidden_size as f64 / 1e6;
            assert!((millions(name) - extra_ids - paper).abs() < 0.6, "{name}: {}", millions(name));
        }
        assert!(LlamaConfig::preset("llama_2b").is_none());
    }
}
