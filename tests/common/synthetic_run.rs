//! A small run directory, written with the library's own writers: what `train` would leave behind.
#![allow(dead_code, reason = "each test file uses its own part")]

use relora_kit::{
    adapter::{self, AdapterConfig, NewModule},
    checkpoint::{Dtype, TensorSpec, Writer},
    run::{BaseRecord, CheckpointRecord, CycleRecord, Hashed, Manifest, RunDir, sha256_file, sha256_folder},
};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The adapted modules and their weights' shapes.
pub const MODULES: [(&str, usize, usize); 3] = [
    ("model.layers.0.self_attn.q_proj", 24, 24),
    ("model.layers.0.mlp.up_proj", 40, 24),
    ("model.layers.0.mlp.down_proj", 24, 40),
];
/// Trained in full.
pub const FULL: [(&str, &[usize]); 2] = [("model.embed_tokens.weight", &[16, 24]), ("model.norm.weight", &[24])];

/// What to write.
#[derive(Clone, Copy)]
pub struct Spec {
    pub cycles: u64,
    pub r: usize,
    pub lora_alpha: f64,
    pub steps_per_cycle: u64,
    pub dtype: Dtype,
    pub with_data: bool,
}

impl Default for Spec {
    fn default() -> Self {
        Spec { cycles: 3, r: 4, lora_alpha: 6.0, steps_per_cycle: 10, dtype: Dtype::F32, with_data: true }
    }
}

/// Reproducible values, uniform in -1..1 (SplitMix64).
pub fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..count).map(|_| (next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
}

/// Values as `dtype` stores them.
pub fn rounded(dtype: Dtype, values: &[f32]) -> Vec<f32> {
    let bytes = relora_kit::checkpoint::dtype::encode_f32(dtype, values).unwrap();
    let mut back = vec![0.0; values.len()];
    relora_kit::checkpoint::dtype::decode_f32(dtype, &bytes, &mut back).unwrap();
    back
}

type Weights = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Writes a checkpoint folder.
pub fn write_checkpoint(folder: &Path, dtype: Dtype, weights: &Weights) {
    fs::create_dir_all(folder).unwrap();
    let specs: Vec<TensorSpec> = weights
        .iter()
        .map(|(name, (shape, _))| TensorSpec { name: name.clone(), dtype, shape: shape.clone() })
        .collect();
    let writer = Writer::create(folder, &specs, u64::MAX, &BTreeMap::new()).unwrap();
    for (name, (_, values)) in weights {
        writer.write_f32(name, dtype, values).unwrap();
    }
    writer.finish().unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
}

/// Writes a whole run below `root` and returns its folder.
pub fn write_run(root: &Path, spec: Spec) -> PathBuf {
    let run = root.join("run");
    fs::create_dir_all(&run).unwrap();
    let steps = spec.cycles * spec.steps_per_cycle + 5;
    let config =
        format!("[train]\nmode = \"relora\"\nnum_training_steps = {steps}\nseed = 0\n[relora]\nlora_r = {}\n", spec.r);
    fs::write(run.join("config.toml"), config).unwrap();
    write_metrics(&run, spec, steps);
    let mut weights = Weights::new();
    for (i, (module, m, n)) in MODULES.into_iter().enumerate() {
        weights.insert(format!("{module}.weight"), (vec![m, n], rounded(spec.dtype, &noise(i as u64, m * n))));
    }
    for (i, (name, shape)) in FULL.into_iter().enumerate() {
        let values = noise(50 + i as u64, shape.iter().product());
        weights.insert(name.into(), (shape.to_vec(), rounded(spec.dtype, &values)));
    }
    write_checkpoint(&run.join("base"), spec.dtype, &weights);
    let mut cycles = Vec::new();
    for cycle in 1..=spec.cycles {
        cycles.push(write_cycle(&run, spec, cycle, &mut weights));
    }
    for (name, _) in FULL {
        let (_, values) = weights.get_mut(name).unwrap();
        values.iter_mut().for_each(|x| *x = rounded(spec.dtype, &[*x + 0.25])[0]);
    }
    let last = spec.cycles * spec.steps_per_cycle + 5;
    let folder = RunDir::checkpoint_folder(last);
    write_checkpoint(&run.join(&folder), spec.dtype, &weights);
    fs::write(run.join(&folder).join("state.json"), "{}").unwrap();
    let data = root.join("data.safetensors");
    fs::write(&data, "tokens").unwrap();
    let hashed = Hashed { path: data.clone(), sha256: sha256_file(&data).unwrap() };
    if !spec.with_data {
        fs::remove_file(&data).unwrap();
    }
    let manifest = Manifest {
        first_step: 0,
        stochastic_rounding: false,
        quantised: None,
        schema: 1,
        tool: "relora-kit test".into(),
        mode: "relora".into(),
        seed: 0,
        configuration: Default::default(),
        changes: Vec::new(),
        data: BTreeMap::from([("train".into(), hashed)]),
        base: Some(BaseRecord { step: 5, files: sha256_folder(&run.join("base")).unwrap() }),
        cycles,
        checkpoint: Some(CheckpointRecord { step: last, files: sha256_folder(&run.join(&folder)).unwrap(), folder }),
        finished: true,
    };
    write_manifest(&run, &manifest);
    run
}

/// Writes `metrics.jsonl` of so many updates: five of the warm start, then the cycles.
pub fn write_metrics(run: &Path, spec: Spec, steps: u64) {
    let cycle = |step: u64| if step <= 5 { 0 } else { (step - 6) / spec.steps_per_cycle + 1 };
    let row = |step| format!("{{\"step\":{step},\"cycle\":{}}}\n", cycle(step));
    fs::write(run.join("metrics.jsonl"), (1..=steps).map(row).collect::<String>()).unwrap();
}

/// Writes one cycle's adapter and merges it into `weights`, in f32 and rounded once.
fn write_cycle(run: &Path, spec: Spec, cycle: u64, weights: &mut Weights) -> CycleRecord {
    let factors: Vec<(Vec<f32>, Vec<f32>)> = (0u64..)
        .zip(MODULES)
        .map(|(i, (_, m, n))| {
            let small = |v: Vec<f32>| v.into_iter().map(|x| x * 0.2).collect();
            (noise(1000 * cycle + i, spec.r * n), small(noise(2000 * cycle + i, m * spec.r)))
        })
        .collect();
    let modules: Vec<NewModule> = MODULES
        .iter()
        .zip(&factors)
        .map(|(&(name, m, n), (a, b))| NewModule { name, r: spec.r, out_features: m, in_features: n, a, b })
        .collect();
    let folder = RunDir::cycle_folder(cycle);
    fs::create_dir_all(run.join(&folder)).unwrap();
    let config = AdapterConfig::new(spec.r, spec.lora_alpha, &["q_proj", "up_proj", "down_proj"]);
    adapter::save(&run.join(&folder), &config, &modules).unwrap();
    let scaling = (spec.lora_alpha / spec.r as f64) as f32;
    for ((module, _, n), (a, b)) in MODULES.into_iter().zip(&factors) {
        let (_, values) = weights.get_mut(&format!("{module}.weight")).unwrap();
        let delta = |i: usize| (0..spec.r).map(|k| b[i / n * spec.r + k] * a[k * n + i % n]).sum::<f32>();
        let merged: Vec<f32> = values.iter().enumerate().map(|(i, w)| w + scaling * delta(i)).collect();
        *values = rounded(spec.dtype, &merged);
    }
    CycleRecord {
        retention: None,
        cycle,
        first_step: 5 + (cycle - 1) * spec.steps_per_cycle,
        last_step: 5 + cycle * spec.steps_per_cycle,
        r: spec.r,
        scaling: spec.lora_alpha / spec.r as f64,
        files: sha256_folder(&run.join(&folder)).unwrap(),
        folder,
    }
}

/// Replaces `manifest.json`.
pub fn write_manifest(run: &Path, manifest: &Manifest) {
    fs::write(run.join("manifest.json"), serde_json::to_vec_pretty(manifest).unwrap()).unwrap();
}

/// Reads `manifest.json`.
pub fn read_manifest(run: &Path) -> Manifest {
    RunDir(run.to_owned()).manifest().unwrap()
}
