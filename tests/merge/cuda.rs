//! `relora-kit merge --device cuda`, on the CUDA emulator of CUDA's libraries.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use crate::common;
use crate::common::synthetic_run::noise;
use crate::common::{
    cuda_emulator::{folder, set_environment},
    entries, f32_bytes, write_tensors,
};
use relora_kit::{
    adapter::{self, AdapterConfig, NewModule},
    checkpoint::{Checkpoint, Dtype, dtype},
    ops::FOLDERS_VARIABLE,
};
use serde_json::Value;
use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

/// Module, shape, stored type of the weight, rank. With one thread a GPU takes ranks from 24 on.
const MODULES: [(&str, [usize; 2], &str, usize); 4] = [
    ("model.layers.0.self_attn.q_proj", [70, 70], "BF16", 30),
    ("model.layers.0.mlp.up_proj", [801, 703], "F32", 24),
    ("model.layers.0.mlp.down_proj", [70, 90], "BF16", 23),
    ("model.layers.1.mlp.up_proj", [33, 70], "F64", 30),
];

struct Workshop(tempfile::TempDir);

impl Workshop {
    fn new() -> Workshop {
        let workshop = Workshop(tempfile::tempdir().unwrap());
        let names: Vec<String> = MODULES.iter().map(|(name, ..)| format!("{name}.weight")).collect();
        let tensors: Vec<(&str, &str, &[usize], Vec<u8>)> = (MODULES.iter().zip(&names).enumerate())
            .map(|(i, ((_, shape, stored, _), name))| {
                let values = noise(i as u64, shape[0] * shape[1]);
                let bytes = match *stored {
                    "BF16" => dtype::encode_f32(Dtype::BF16, &values).unwrap().into_owned(),
                    "F64" => values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect(),
                    _ => f32_bytes(&values),
                };
                (name.as_str(), *stored, &shape[..], bytes)
            })
            .collect();
        write_tensors(&workshop.path("base.safetensors"), &tensors);
        // A in common; B and its bias differ.
        for (adapter, seed, use_dora) in [("one", 10, false), ("two", 20, false), ("dora", 30, true)] {
            workshop.write_adapter(adapter, seed, use_dora);
        }
        workshop
    }

    fn write_adapter(&self, folder: &str, seed: u64, use_dora: bool) {
        let folder = self.path(folder);
        std::fs::create_dir(&folder).unwrap();
        let factors: Vec<(Vec<f32>, Vec<f32>)> = (MODULES.iter().zip(seed..))
            .map(|((_, [m, n], _, r), seed)| (noise(seed, r * n), noise(100 + seed, m * r)))
            .collect();
        let modules: Vec<NewModule> = (MODULES.iter().zip(&factors))
            .map(|((name, [m, n], _, r), (a, b))| NewModule { name, r: *r, out_features: *m, in_features: *n, a, b })
            .collect();
        let mut config = AdapterConfig::new(30, 15.0, &["q_proj", "up_proj", "down_proj"]);
        config.rank_pattern.push("layers.0.mlp.up_proj", 24.0).unwrap();
        config.rank_pattern.push("down_proj", 23.0).unwrap();
        adapter::save(&folder, &config, &modules).unwrap();
        if use_dora {
            self.add_magnitudes(&folder);
        }
    }

    /// Makes it an adapter of DoRA: a magnitude per output.
    fn add_magnitudes(&self, folder: &Path) {
        let file = Checkpoint::open(&folder.join("adapter_model.safetensors")).unwrap();
        let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> =
            file.tensors().map(|t| (t.name().to_owned(), t.shape().to_vec(), t.bytes().to_vec())).collect();
        for (name, [m, _], ..) in MODULES {
            let magnitude: Vec<f32> = noise(7, m).iter().map(|x| 2.0 + x).collect();
            let name = format!("base_model.model.{name}.lora_magnitude_vector");
            tensors.push((name, vec![m], f32_bytes(&magnitude)));
        }
        let listed: Vec<(&str, &str, &[usize], Vec<u8>)> =
            tensors.iter().map(|(name, shape, bytes)| (name.as_str(), "F32", &shape[..], bytes.clone())).collect();
        write_tensors(&folder.join("adapter_model.safetensors"), &listed);
        let config = folder.join("adapter_config.json");
        let mut json: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        json["use_dora"] = true.into();
        std::fs::write(config, json.to_string()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `merge --base base.safetensors --threads 1` and more, with the emulator; code, stdout and stderr.
    fn run(&self, args: &[&str], environment: &[(&str, &str)]) -> (i32, String, String) {
        let mut command = common::relora_kit();
        set_environment(&mut command);
        let command =
            command.current_dir(self.0.path()).args(["merge", "--threads", "1", "--base", "base.safetensors"]);
        let output = command.args(args).envs(environment.iter().copied()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
    }

    #[track_caller]
    fn merge(&self, output: &str, more: &[&str]) -> Value {
        let (code, stdout, stderr) = self.run(&[&["-o", output, "--format", "json"], more].concat(), &[]);
        assert_eq!(code, 0, "{stderr}");
        serde_json::from_str(&stdout).unwrap()
    }
}

/// Where the products of each tensor were computed, in the order of [`MODULES`].
fn devices(report: &Value) -> Vec<Option<&str>> {
    let tensors = report["tensors"].as_array().unwrap();
    let of = |name: &str| tensors.iter().find(|t| t["name"] == format!("{name}.weight")).unwrap();
    MODULES.iter().map(|(name, ..)| of(name)["device"].as_str()).collect()
}

/// Within 4 units in the last place of each tensor's largest value, as the merges of PEFT are.
#[track_caller]
fn assert_close(found: &Path, expected: &Path) {
    let (found, expected) = (Checkpoint::open(found).unwrap(), Checkpoint::open(expected).unwrap());
    for tensor in expected.tensors() {
        let mut values = [(); 2].map(|()| vec![0f64; tensor.elements()]);
        tensor.read_f64(0, &mut values[0]).unwrap();
        found.tensor(tensor.name()).unwrap().read_f64(0, &mut values[1]).unwrap();
        let top = values[0].iter().fold(0f64, |top, x| top.max(x.abs()));
        let unit = match tensor.dtype() {
            Dtype::BF16 => 2f64.powi(-7),
            Dtype::F64 => 0.0,
            _ => 2f64.powi(-23),
        };
        for (a, b) in values[0].iter().zip(&values[1]) {
            assert!((a - b).abs() <= 4.0 * unit * top, "{}: {b} instead of {a}", tensor.name());
        }
    }
}

#[test]
fn a_gpu_takes_the_products_that_are_worth_it() {
    let workshop = Workshop::new();
    let cpu = workshop.merge("cpu", &["--adapter", "one"]);
    assert_eq!(devices(&cpu), [None; 4]);
    let gpu = workshop.merge("gpu", &["--adapter", "one", "--device", "cuda"]);
    assert_eq!(devices(&gpu), ["cuda:0", "cuda:0", "cpu", "cpu"].map(Some));
    assert_close(&workshop.path("gpu"), &workshop.path("cpu"));
    // Ranks add up: the sum is read back once.
    let args = ["--adapter", "one=0.5", "--adapter", "two=-2"];
    workshop.merge("cpu-both", &args);
    let both = workshop.merge("gpu-both", &[&args[..], &["--device", "cuda:0"]].concat());
    assert_eq!(devices(&both), ["cuda:0", "cuda:0", "cuda:0", "cpu"].map(Some));
    assert_close(&workshop.path("gpu-both"), &workshop.path("cpu-both"));
    // DoRA goes through the deltas twice.
    workshop.merge("cpu-dora", &["--adapter", "dora", "--dtype", "f32"]);
    workshop.merge("gpu-dora", &["--adapter", "dora", "--dtype", "f32", "--device", "cuda"]);
    assert_close(&workshop.path("gpu-dora"), &workshop.path("cpu-dora"));
}

#[test]
fn a_dry_run_says_what_would_go_where() {
    let workshop = Workshop::new();
    let args = ["-o", "out", "--adapter", "one", "--device", "cuda", "--dry-run"];
    let (code, stdout, stderr) = workshop.run(&args, &[]);
    assert_eq!(code, 0, "{stderr}");
    let says = "products of 2 of 4 tensors are computed on cuda:0; the others cost less than reading them back";
    assert!(stdout.contains(says), "{stdout}");
    let json = workshop.merge("out", &["--adapter", "one", "--device", "cuda", "--dry-run"]);
    assert_eq!(devices(&json), ["cuda:0", "cuda:0", "cpu", "cpu"].map(Some));
    assert!(json["estimate"]["compute_seconds"].as_f64().unwrap() > 0.0 && !workshop.path("out").exists());
}

#[test]
fn parts_of_a_gpu_join_to_the_whole_and_not_with_parts_of_the_cpu() {
    let workshop = Workshop::new();
    let shared = ["--adapter", "one", "--max-shard-size", "100kB"];
    let on_gpu = [&shared[..], &["--device", "cuda"]].concat();
    workshop.merge("whole", &on_gpu);
    for shard in ["1/2", "2/2"] {
        workshop.merge("joined", &[&on_gpu[..], &["--shard", shard]].concat());
    }
    let (code, _, stderr) = workshop.run(&[&shared[..], &["-o", "joined", "--combine"]].concat(), &[]);
    assert!(code == 2 && stderr.contains("--device") && stderr.contains("cuda from rank 24"), "{stderr}");
    workshop.merge("joined", &[&on_gpu[..], &["--combine"]].concat());
    for name in entries(&workshop.path("whole")) {
        let read = |folder: &str| std::fs::read(workshop.path(folder).join(&name)).unwrap();
        assert!(read("whole") == read("joined"), "{name}");
    }
}

#[test]
fn a_gpu_that_is_lost_or_full_or_absent_leaves_nothing_behind() {
    let workshop = Workshop::new();
    let before = entries(workshop.0.path());
    let fails = |environment: &[(&str, &str)], parts: &[&str]| {
        let (code, _, stderr) = workshop.run(&["-o", "out", "--adapter", "one", "--device", "cuda"], environment);
        assert_eq!(code, 3, "{stderr}");
        for part in ["error: ", "help: "].iter().chain(parts) {
            assert!(stderr.contains(part), "expected '{part}' in: {stderr}");
        }
        assert_eq!(entries(workshop.0.path()), before);
    };
    fails(&[("CUDA_EMULATOR_LOSE_AFTER_CALLS", "2")], &["failed while it worked", "--device cpu"]);
    fails(&[("CUDA_EMULATOR_MEMORY", "100000")], &["is out of memory", "--device cpu"]);
    fails(&[("CUDA_EMULATOR_DEVICES", "0")], &["device 'cuda:0' is unavailable"]);
}

/// Neither the compiler of kernels nor cuSOLVER is needed.
#[test]
fn the_libraries_of_merges_are_the_driver_and_cublas() {
    let workshop = Workshop::new();
    let some = workshop.path("libraries");
    std::fs::create_dir(&some).unwrap();
    for name in ["libcuda.so.1", "libcublas.so.12"] {
        symlink(folder().join(name), some.join(name)).unwrap();
    }
    let environment = [(FOLDERS_VARIABLE, some.to_str().unwrap())];
    let (code, _, stderr) = workshop.run(&["-o", "out", "--adapter", "one", "--device", "cuda"], &environment);
    assert_eq!(code, 0, "{stderr}");
}
