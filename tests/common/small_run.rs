//! A ReLoRA run that takes a second: the licence text, two narrow blocks, cycles of ten updates.

use std::path::{Path, PathBuf};

/// A temporary folder with `tokens.safetensors` and `run.toml`.
pub struct SmallRun(pub tempfile::TempDir);

impl SmallRun {
    /// Ten updates of warm start, then `cycles` of ten.
    pub fn new(cycles: u64) -> SmallRun {
        let small = SmallRun(tempfile::tempdir().unwrap());
        let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("LICENSE");
        let (code, _, stderr) = super::run([
            "tokenize".as_ref(),
            text.as_os_str(),
            "-o".as_ref(),
            small.path("tokens.safetensors").as_os_str(),
        ]);
        assert_eq!(code, 0, "{stderr}");
        let config = format!(
            r#"
            [model]
            preset = "llama_9m"
            [model.overrides]
            vocab_size = 257
            hidden_size = 32
            intermediate_size = 48
            num_hidden_layers = 2
            max_position_embeddings = 32
            [data]
            train = "tokens.safetensors"
            max_length = 32
            [train]
            mode = "relora"
            seed = 3
            batch_size = 4
            num_training_steps = {}
            lr = 1e-2
            scheduler = "cosine_restarts"
            warmup_steps = 2
            restart_warmup_steps = 2
            [warm_start]
            num_training_steps = 10
            [relora]
            lora_r = 2
            lora_alpha = 4
            relora = 10
            "#,
            10 + 10 * cycles
        );
        std::fs::write(small.path("run.toml"), config).unwrap();
        small
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Trains into `run/`, which must work.
    pub fn train(&self) -> PathBuf {
        let (config, output) = (self.path("run.toml"), self.path("run"));
        let (code, _, stderr) =
            super::run(["train".as_ref(), "--config".as_ref(), config.as_os_str(), "-o".as_ref(), output.as_os_str()]);
        assert_eq!(code, 0, "{stderr}");
        output
    }
}
