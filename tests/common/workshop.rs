//! A tiny model to train.
#![allow(dead_code, missing_docs)]

use super::run;
use std::{fs, path::Path};

/// A folder with a text, its token shard, a tiny model's configuration and a run's.
pub struct Workshop(pub tempfile::TempDir);

impl Workshop {
    pub fn new() -> Workshop {
        let dir = tempfile::tempdir().unwrap();
        let text: String = (0..400).map(|i| format!("line {} of a text that repeats itself.\n", i % 7)).collect();
        fs::write(dir.path().join("text.txt"), text).unwrap();
        let llama = serde_json::json!({
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 44, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 257, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false, "initializer_range": 0.02,
        });
        fs::write(dir.path().join("model.json"), llama.to_string()).unwrap();
        fs::write(
            dir.path().join("run.toml"),
            r#"
            [model]
            config = "model.json"
            [data]
            train = "tokens.safetensors"
            validation_fraction = 0.1
            max_length = 32
            [train]
            mode = "relora"
            seed = 5
            batch_size = 2
            gradient_accumulation = 2
            num_training_steps = 50
            lr = 3e-3
            scheduler = "cosine_restarts"
            warmup_steps = 2
            restart_warmup_steps = 2
            save_every = 7
            keep_checkpoints = 2
            eval_every = 20
            [warm_start]
            num_training_steps = 10
            warmup_steps = 2
            [relora]
            lora_r = 2
            lora_alpha = 4.0
            relora = 10
            "#,
        )
        .unwrap();
        let workshop = Workshop(dir);
        let (code, _, stderr) =
            run(["tokenize", &workshop.path("text.txt"), "-o", &workshop.path("tokens.safetensors")]);
        assert_eq!(code, 0, "{stderr}");
        workshop
    }

    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_string_lossy().into_owned()
    }

    pub fn train(&self, output: &str, set: &[&str]) -> (i32, String, String) {
        run(self.train_args(output, set))
    }

    /// What follows the program's name.
    pub fn train_args(&self, output: &str, set: &[&str]) -> Vec<String> {
        let mut args =
            vec!["train".to_owned(), "--config".into(), self.path("run.toml"), "-o".into(), self.path(output)];
        args.extend(set.iter().flat_map(|s| ["--set".to_owned(), (*s).to_owned()]));
        args
    }
}

/// Losses of all updates, as text: bit for bit.
pub fn losses(run: &Path) -> Vec<String> {
    let rows = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let rows = rows.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    rows.filter_map(|row| Some(format!("{} {} {}", row["step"], row.get("loss")?, row["grad_norm"]))).collect()
}

/// Loss, norm of the gradient and validation loss of all updates, as numbers.
pub fn trajectory(run: &Path) -> Vec<[f64; 3]> {
    let rows = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let rows = rows.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    rows.map(|row| ["loss", "grad_norm", "eval_loss"].map(|key| row[key].as_f64().unwrap_or(1.0))).collect()
}

/// The largest relative difference of two trajectories.
pub fn apart(a: &[[f64; 3]], b: &[[f64; 3]]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.as_flattened().iter().zip(b.as_flattened()).fold(0.0, |worst, (a, b)| f64::max(worst, (a / b - 1.0).abs()))
}
