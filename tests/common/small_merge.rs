//! A merge of a few numbers that can be checked by hand.

use super::{entries, f32_bytes, refused, write_tensors};
use relora_kit::{
    adapter::{AdapterConfig, NewModule, save},
    checkpoint::Checkpoint,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The module that the adapter targets.
pub const Q: &str = "model.layers.0.self_attn.q_proj";

/// A temporary folder: `base/model.safetensors` with q_proj [4, 3] and a norm [3], and a rank 2 adapter for q_proj.
pub struct Small(pub tempfile::TempDir);

impl Small {
    /// Base of ones, factors of 0.5 and 0.25.
    pub fn new() -> Small {
        let small = Small(tempfile::tempdir().unwrap());
        small.write_base(&[1.0; 12]);
        small.write_adapter(Q, 2, 4, 3, &[0.5; 6], &[0.25; 8]);
        small
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Replaces the base.
    pub fn write_base(&self, q: &[f32]) {
        let base = self.path("base");
        fs::create_dir_all(&base).unwrap();
        fs::write(base.join("config.json"), "{\"model_type\": \"llama\"}").unwrap();
        write_tensors(
            &base.join("model.safetensors"),
            &[
                (&format!("{Q}.weight"), "F32", &[4, 3], f32_bytes(q)),
                ("model.norm.weight", "F32", &[3], f32_bytes(&[1.0, 2.0, 3.0])),
            ],
        );
    }

    /// Replaces the adapter, whose scaling is 2.
    pub fn write_adapter(&self, name: &str, r: usize, out: usize, inputs: usize, a: &[f32], b: &[f32]) {
        let folder = self.path("adapter");
        fs::create_dir_all(&folder).unwrap();
        let mut config = AdapterConfig::new(r, 2.0 * r as f64, &["q_proj"]);
        config.base_model_name_or_path = Some("some/other-model".into());
        save(&folder, &config, &[NewModule { name, r, out_features: out, in_features: inputs, a, b }]).unwrap();
    }

    /// `merge --base base --adapter adapter -o out` and more.
    pub fn args(&self, more: &[&str]) -> Vec<String> {
        let mut args = vec!["merge".to_owned()];
        for (flag, name) in [("--base", "base"), ("--adapter", "adapter"), ("-o", "out")] {
            args.extend([flag.to_owned(), self.path(name).display().to_string()]);
        }
        args.extend(more.iter().map(|s| (*s).to_owned()));
        args
    }

    /// Exit code 2, the sentence, and no output.
    #[track_caller]
    pub fn refuses(&self, parts: &[&str]) {
        let before = entries(self.0.path());
        refused(self.args(&[]), 2, parts);
        assert_eq!(entries(self.0.path()), before);
    }
}

/// Values of a tensor of a model.
pub fn values(model: &Path, name: &str) -> Vec<f32> {
    Checkpoint::open(model).unwrap().tensor(name).unwrap().to_f32().unwrap().into_owned()
}
