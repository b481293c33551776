//! The run of `examples/tiny.toml` on the licence text: it takes a second.

use std::path::{Path, PathBuf};

/// A temporary folder with `tokens.safetensors` and `run.toml`.
pub struct SmallRun(pub tempfile::TempDir);

impl SmallRun {
    /// Ten updates of warm start, then `cycles` of ten.
    pub fn new(cycles: u64) -> SmallRun {
        let small = SmallRun(tempfile::tempdir().unwrap());
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let text = root.join("LICENSE");
        let (code, _, stderr) = super::run([
            "tokenize".as_ref(),
            text.as_os_str(),
            "-o".as_ref(),
            small.path("tokens.safetensors").as_os_str(),
        ]);
        assert_eq!(code, 0, "{stderr}");
        let config = std::fs::read_to_string(root.join("examples/tiny.toml")).unwrap();
        let three_cycles = "num_training_steps = 40";
        assert!(config.contains(three_cycles));
        let config = config.replace(three_cycles, &format!("num_training_steps = {}", 10 + 10 * cycles));
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
