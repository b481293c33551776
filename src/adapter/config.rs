//! `adapter_config.json`, and the crate's only definition of a LoRA scaling.

use super::pattern::PatternMap;
use crate::{
    checkpoint::read_text,
    error::{Error, Result},
};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use std::{fs, path::Path};

/// The name PEFT gives it.
pub const CONFIG_NAME: &str = "adapter_config.json";

/// A PEFT configuration, with the settings of LoRA as fields. What these do not name is kept in `other` and written back unchanged.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterConfig {
    /// `LORA`, `LOHA`, ...: what [`types`](super::types) knows by this name.
    pub peft_type: String,
    /// `CAUSAL_LM`, `SEQ_CLS`, ...
    pub task_type: Option<String>,
    /// What the adapter was trained on: a folder or a name on the Hub.
    pub base_model_name_or_path: Option<String>,
    /// Rank of modules that no key of `rank_pattern` matches.
    #[serde(deserialize_with = "null_is_default")]
    pub r: usize,
    /// Numerator of the scaling of modules that no key of `alpha_pattern` matches.
    #[serde(deserialize_with = "alpha")]
    pub lora_alpha: f64,
    /// Rank by module-name pattern.
    #[serde(deserialize_with = "null_is_default")]
    pub rank_pattern: PatternMap,
    /// `lora_alpha` by module-name pattern.
    #[serde(deserialize_with = "null_is_default")]
    pub alpha_pattern: PatternMap,
    /// Scale by `1 / sqrt(r)` instead of `1 / r` (arXiv:2312.03732).
    #[serde(deserialize_with = "null_is_default")]
    pub use_rslora: bool,
    /// Weight-decomposed updates (arXiv:2402.09353).
    #[serde(deserialize_with = "null_is_default")]
    pub use_dora: bool,
    /// The targeted weights are stored `[in, out]` (GPT-2's Conv1D).
    #[serde(deserialize_with = "null_is_default")]
    pub fan_in_fan_out: bool,
    /// `none`, `all` or `lora_only`.
    #[serde(deserialize_with = "null_is_none")]
    pub bias: String,
    /// Whether `lora_B` has a bias.
    #[serde(deserialize_with = "null_is_default")]
    pub lora_bias: bool,
    /// A list of names, or one regular expression.
    pub target_modules: Option<Value>,
    /// Expert parameters that are targeted by name instead of by module.
    pub target_parameters: Option<Vec<String>>,
    /// Modules trained in full.
    pub modules_to_save: Option<Vec<String>>,
    /// Token rows that are replaced: a list for the input embedding, or per embedding module.
    pub trainable_token_indices: Option<Value>,
    /// How A and B were initialised. Some methods change the base weights, too.
    pub init_lora_weights: Value,
    /// Everything else.
    #[serde(flatten)]
    pub other: Map<String, Value>,
    /// The whole object as it stands in the file, for types other than LoRA.
    #[serde(skip)]
    pub raw: Map<String, Value>,
}

impl Default for AdapterConfig {
    /// PEFT's defaults.
    fn default() -> Self {
        AdapterConfig {
            peft_type: "LORA".into(),
            task_type: None,
            base_model_name_or_path: None,
            r: 8,
            lora_alpha: 8.0,
            rank_pattern: PatternMap::default(),
            alpha_pattern: PatternMap::default(),
            use_rslora: false,
            use_dora: false,
            fan_in_fan_out: false,
            bias: "none".into(),
            lora_bias: false,
            target_modules: None,
            target_parameters: None,
            modules_to_save: None,
            trainable_token_indices: None,
            init_lora_weights: Value::Bool(true),
            other: Map::new(),
            raw: Map::new(),
        }
    }
}

fn null_is_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> std::result::Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

/// Without a value there is no scaling; PEFT raises an error, too.
fn alpha<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<f64, D::Error> {
    let found: Option<f64> = Option::deserialize(d)?;
    found.ok_or_else(|| serde::de::Error::custom("lora_alpha is null: the scaling of the update has no value"))
}

fn null_is_none<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<String, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_else(|| "none".to_owned()))
}

impl AdapterConfig {
    /// A configuration for `CAUSAL_LM` with the given rank and alpha, everything else as PEFT's defaults.
    pub fn new(r: usize, lora_alpha: f64, target_modules: &[&str]) -> Self {
        AdapterConfig {
            task_type: Some("CAUSAL_LM".into()),
            r,
            lora_alpha,
            target_modules: Some(target_modules.into()),
            ..Self::default()
        }
    }

    /// Reads `adapter_config.json`.
    pub fn open(path: &Path) -> Result<AdapterConfig> {
        let text = read_text(path)
            .map_err(|e| e.help("name a folder with adapter_config.json and adapter_model.safetensors"))?;
        Self::parse(&text).map_err(|e| {
            Error::request(format!("'{}' is not a valid adapter configuration: {e}", path.display()))
                .help("save the adapter again with PEFT's save_pretrained")
        })
    }

    fn parse(text: &[u8]) -> serde_json::Result<AdapterConfig> {
        let Ok(Value::Object(mut config)) = serde_json::from_slice(text) else { return serde_json::from_slice(text) };
        if matches!(config.get("peft_type"), None | Some(Value::String(_)))
            && config.get("peft_type").is_none_or(|kind| kind == "LORA")
        {
            return serde_json::from_slice(text);
        }
        // Other types give these names to other things: AdaLoRA's rank_pattern holds lists, some ranks are absent.
        let numbers = |value: &Value| value.as_object().is_some_and(|map| map.values().all(Value::is_number));
        for key in ["rank_pattern", "alpha_pattern"] {
            if config.get(key).is_some_and(|value| !numbers(value)) {
                config.remove(key);
            }
        }
        let own = config.clone();
        for (key, fits) in [
            ("r", Value::is_u64 as fn(&Value) -> bool),
            ("lora_alpha", Value::is_number),
            ("use_rslora", Value::is_boolean),
            ("use_dora", Value::is_boolean),
            ("fan_in_fan_out", Value::is_boolean),
            ("bias", Value::is_string),
            ("lora_bias", Value::is_boolean),
        ] {
            if config.get(key).is_some_and(|value| !fits(value)) {
                config.remove(key);
            }
        }
        let mut parsed: AdapterConfig = serde_json::from_value(Value::Object(config))?;
        parsed.raw = own;
        Ok(parsed)
    }

    /// The number under `key`, for settings of one type.
    pub fn number(&self, key: &str) -> Option<f64> {
        self.raw.get(key)?.as_f64()
    }

    /// The whole number under `key`.
    pub fn integer(&self, key: &str) -> Option<usize> {
        self.raw.get(key)?.as_u64().map(|n| n as usize)
    }

    /// The truth value under `key`; `false` where there is none.
    pub fn flag(&self, key: &str) -> bool {
        self.raw.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    /// The text under `key`.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.raw.get(key)?.as_str()
    }

    /// Writes it as PEFT does, whole numbers without a fraction.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut json = serde_json::to_value(self).map_err(|e| Error::environment(e.to_string()))?;
        json["inference_mode"] = true.into();
        if self.lora_alpha.fract() == 0.0 {
            json["lora_alpha"] = (self.lora_alpha as i64).into();
        }
        let text = serde_json::to_string_pretty(&json).map_err(|e| Error::environment(e.to_string()))?;
        fs::write(path, text + "\n").map_err(|e| Error::io("write", path, e))
    }

    /// Rank of `module` (its name inside the model, `model.layers.0.self_attn.q_proj`).
    pub fn rank_of(&self, module: &str) -> usize {
        self.rank_pattern.get(module).map_or(self.r, |r| r as usize)
    }

    /// `lora_alpha` of `module`.
    pub fn alpha_of(&self, module: &str) -> f64 {
        self.alpha_pattern.get(module).unwrap_or(self.lora_alpha)
    }

    /// What B @ A of `module` is multiplied with: `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA, with the
    /// module's own `lora_alpha` and `r`. The only place where this is defined.
    pub fn scaling_of(&self, module: &str) -> f64 {
        scaling(self.alpha_of(module), self.rank_of(module), self.use_rslora)
    }
}

/// `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA (arXiv:2106.09685, section 4.1; arXiv:2312.03732).
pub fn scaling(lora_alpha: f64, r: usize, use_rslora: bool) -> f64 {
    lora_alpha / if use_rslora { (r as f64).sqrt() } else { r as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_modules_own_rank_and_alpha_decide_the_scaling() {
        let config: AdapterConfig = serde_json::from_str(
            r#"{"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.*.o_proj": 3},
                "use_rslora": false, "bias": null}"#,
        )
        .unwrap();
        assert_eq!(config.scaling_of("model.layers.0.self_attn.k_proj"), 2.0);
        assert_eq!(config.scaling_of("model.layers.0.self_attn.q_proj"), 4.0);
        assert_eq!(config.scaling_of("model.layers.1.self_attn.o_proj"), 3.0 / 8.0);
        assert_eq!(AdapterConfig { use_rslora: true, ..config }.scaling_of("x.q_proj"), 8.0);
    }

    #[test]
    fn a_null_alpha_is_no_zero() {
        let error = serde_json::from_str::<AdapterConfig>(r#"{"r": 8, "lora_alpha": null}"#).unwrap_err();
        assert!(error.to_string().contains("lora_alpha is null"), "{error}");
    }

    #[test]
    fn unknown_keys_survive_a_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CONFIG_NAME);
        fs::write(&path, r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "revision": "main"}"#).unwrap();
        let config = AdapterConfig::open(&path).unwrap();
        config.write(&path).unwrap();
        let json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(json["revision"], "main");
        assert_eq!(json["lora_alpha"], 4);
    }
}
