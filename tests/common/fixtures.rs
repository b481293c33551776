//! Comparison with `fixtures/`: what PyTorch, PEFT and numpy computed (see `fixtures/README.md`).
#![allow(dead_code)]

use relora_kit::checkpoint::Checkpoint;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A file or folder below `fixtures/`.
pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// A JSON file below `fixtures/`.
pub fn json(path: &str) -> serde_json::Value {
    serde_json::from_slice(&fs::read(fixture(path)).unwrap()).unwrap()
}

/// The licence text: one token per byte.
pub fn text() -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("LICENSE")).unwrap()
}

/// All values of a tensor, exactly.
pub fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f64> {
    let tensor = checkpoint.tensor(name).unwrap();
    let mut out = vec![0.0; tensor.elements()];
    relora_kit::checkpoint::dtype::decode_f64(tensor.dtype(), tensor.bytes(), &mut out).unwrap();
    out
}

/// Fails with the name, the largest difference (in terms of what is allowed there) and its index.
#[track_caller]
pub fn assert_close(name: &str, shape: &[usize], found: &[f64], expected: &[f64], allowed: impl Fn(usize) -> f64) {
    assert_eq!(found.len(), expected.len(), "{name}: number of values");
    let excess = |i: usize| {
        let ratio = (found[i] - expected[i]).abs() / allowed(i);
        // 0 / 0: equal where nothing else is allowed. NaN in a result must not pass for close.
        if found[i] == expected[i] {
            0.0
        } else if ratio.is_nan() {
            f64::INFINITY
        } else {
            ratio
        }
    };
    let worst = (0..found.len()).max_by(|&a, &b| excess(a).total_cmp(&excess(b)));
    if let Some(i) = worst.filter(|&i| excess(i) > 1.0) {
        let index = relora_kit::delta::unravel(i, shape);
        let count = (0..found.len()).filter(|&i| excess(i) > 1.0).count();
        panic!(
            "{name}: {count} of {} values are too far off; largest difference {:.3e} at {index:?}: {} instead of {} (allowed: {:.3e})",
            found.len(),
            (found[i] - expected[i]).abs(),
            found[i],
            expected[i],
            allowed(i)
        );
    }
}
