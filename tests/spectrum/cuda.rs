//! `relora-kit spectrum --device cuda`, on the CUDA emulator of CUDA's libraries.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use crate::common;
use crate::common::synthetic_run::noise;
use crate::common::{
    cuda_emulator::{folder, set_environment},
    f32_bytes, write_tensors,
};
use relora_kit::{
    adapter::{self, AdapterConfig, NewModule},
    ops::FOLDERS_VARIABLE,
};
use serde_json::Value;
use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

/// Wide, tall, and one that is too small for a GPU. Multiples of nothing.
const SHAPES: [(usize, usize); 3] = [(271, 403), (530, 259), (48, 64)];

struct Workshop(tempfile::TempDir);

impl Workshop {
    /// `base.safetensors`, `tuned.safetensors`, and `huge.safetensors`, whose update is a million times as large.
    fn new() -> Workshop {
        let workshop = Workshop(tempfile::tempdir().unwrap());
        let write = |file: &str, step: f32| {
            let names: Vec<String> =
                (0..SHAPES.len()).map(|i| format!("model.layers.{i}.mlp.up_proj.weight")).collect();
            let shapes: Vec<[usize; 2]> = SHAPES.iter().map(|&(m, n)| [m, n]).collect();
            let values = |i: usize, n: usize| -> Vec<f32> {
                noise(i as u64, n).iter().zip(noise(100 + i as u64, n)).map(|(w, d)| w + step * d).collect()
            };
            let tensors: Vec<(&str, &str, &[usize], Vec<u8>)> = (names.iter().zip(&shapes).enumerate())
                .map(|(i, (name, shape))| {
                    (name.as_str(), "F32", &shape[..], f32_bytes(&values(i, shape.iter().product())))
                })
                .collect();
            write_tensors(&workshop.path(file), &tensors);
        };
        write("base.safetensors", 0.0);
        write("tuned.safetensors", 0.1);
        write("huge.safetensors", 1e5);
        workshop
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The program with the emulator; code, stdout and stderr.
    fn run(&self, args: &[&str], environment: &[(&str, &str)]) -> (i32, String, String) {
        let mut command = common::relora_kit();
        set_environment(&mut command);
        let command = command.current_dir(self.0.path()).arg("spectrum").args(args);
        let output = command.envs(environment.iter().copied()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
    }

    fn measure(&self, args: &[&str]) -> Value {
        let (code, stdout, stderr) = self.run(&[args, &["--format", "json", "--sigma"]].concat(), &[]);
        assert_eq!(code, 0, "{stderr}");
        serde_json::from_str(&stdout).unwrap()
    }

    /// It ends with 3, a sentence that holds each of `parts`, and no output.
    #[track_caller]
    fn fails(&self, environment: &[(&str, &str)], parts: &[&str]) {
        let args = [&PAIR[..], &["--device", "cuda", "-o", "result.json", "--format", "json"]].concat();
        let (code, _, stderr) = self.run(&args, environment);
        assert_eq!(code, 3, "{stderr}");
        for part in ["error: ", "help: ", "--device cpu"].iter().chain(parts) {
            assert!(stderr.contains(part), "expected '{part}' in: {stderr}");
        }
        assert!(!stderr.contains("panicked") && !self.path("result.json").exists(), "{stderr}");
    }
}

const PAIR: [&str; 4] = ["--base", "base.safetensors", "--tuned", "tuned.safetensors"];

fn numbers(values: &Value) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// Singular values within 1e-6 of the largest, counts alike; `devices` is where each matrix was measured.
#[track_caller]
fn assert_same(found: &Value, expected: &Value, devices: &[&str]) {
    let matrices = |v: &Value| v["matrices"].as_array().unwrap().clone();
    assert_eq!(matrices(found).len(), devices.len());
    for ((f, e), device) in matrices(found).iter().zip(matrices(expected)).zip(devices) {
        assert_eq!((&f["name"], &f["device"], &e["device"]), (&e["name"], &(*device).into(), &Value::Null));
        let (a, b) = (numbers(&f["sigma"]), numbers(&e["sigma"]));
        assert_eq!(a.len(), b.len());
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() <= 1e-6 * e["spectral_norm"].as_f64().unwrap(), "{}: {a} {b}", f["name"]);
        }
        for key in ["numerical_rank", "rank_above_noise", "noise_edge", "energy_rank_90", "below_0_1"] {
            assert_eq!(f[key], e[key], "{} {key}", f["name"]);
        }
    }
}

#[test]
fn a_gpu_measures_what_the_cpu_measures() {
    let workshop = Workshop::new();
    let gpu = workshop.measure(&[&PAIR[..], &["--device", "cuda"]].concat());
    assert_same(&gpu, &workshop.measure(&PAIR), &["cuda:0", "cuda:0", "cpu"]);
    let (_, stdout, stderr) = workshop.run(&[&PAIR[..], &["--device", "cuda", "-v"]].concat(), &[]);
    assert!(stdout.contains("singular values of 2 of 3 updates were computed on cuda:0; the others"), "{stdout}");
    assert!(stderr.contains("device cuda:0 is CUDA emulator"), "{stderr}");
}

/// 0.1 lies below what squares can resolve of a huge matrix: those go to the SVD, on the CPU, and the result says so.
#[test]
fn what_needs_the_svd_is_measured_on_the_cpu() {
    let workshop = Workshop::new();
    let args = ["--base", "base.safetensors", "--tuned", "huge.safetensors"];
    let gpu = workshop.measure(&[&args[..], &["--device", "cuda"]].concat());
    assert_same(&gpu, &workshop.measure(&args), &["cpu"; 3]);
    let (code, _, stderr) = workshop.run(&[&PAIR[..], &["--device", "cuda", "--dense"]].concat(), &[]);
    assert!(code == 2 && stderr.contains("--dense takes LAPACK's SVD"), "{stderr}");
}

/// The core of factors of rank 270 is large enough for a GPU; their QR stays on the CPU.
#[test]
fn factors_of_high_rank_take_the_gpu_for_their_core() {
    let workshop = Workshop::new();
    let (r, m, n) = (270, 301, 310);
    let (a, b) = (noise(7, r * n), noise(8, m * r));
    std::fs::create_dir(workshop.path("adapter")).unwrap();
    let modules = ["large", "low"].map(|name| {
        let r = if name == "low" { 5 } else { r };
        NewModule { name, r, out_features: m, in_features: n, a: &a[..r * n], b: &b[..m * r] }
    });
    let mut config = AdapterConfig::new(r, 2.0 * r as f64, &["large", "low"]);
    config.rank_pattern.push("low", 5.0).unwrap();
    adapter::save(&workshop.path("adapter"), &config, &modules).unwrap();
    let args = ["--adapter", "adapter"];
    let gpu = workshop.measure(&[&args[..], &["--device", "cuda:0"]].concat());
    assert_same(&gpu, &workshop.measure(&args), &["cuda:0", "cpu"]);
}

#[test]
fn parts_of_a_gpu_join_to_the_whole_and_not_with_parts_of_the_cpu() {
    let workshop = Workshop::new();
    let part = |device: &str, index: usize| {
        let (shard, file) = (format!("{index}/2"), format!("{device}-{index}.json"));
        let (code, _, stderr) =
            workshop.run(&[&PAIR[..], &["--device", device, "--shard", &shard, "-o", &file]].concat(), &[]);
        assert_eq!(code, 0, "{stderr}");
        file
    };
    let (one, two, other) = (part("cuda", 1), part("cuda", 2), part("cpu", 2));
    let (code, stdout, stderr) = workshop.run(&["--combine", &one, &two, "--format", "json"], &[]);
    assert_eq!(code, 0, "{stderr}");
    let whole = workshop.run(&[&PAIR[..], &["--device", "cuda", "--format", "json"]].concat(), &[]).1;
    assert_eq!(stdout, whole);
    let (code, _, stderr) = workshop.run(&["--combine", &one, &other], &[]);
    assert!(code == 2 && stderr.contains("--device is cuda in the first and cpu in the second"), "{stderr}");
}

#[test]
fn a_gpu_that_is_lost_or_full_or_absent_is_a_sentence() {
    let workshop = Workshop::new();
    for calls in ["0", "1", "3"] {
        let part = "device 'cuda:0' (CUDA emulator) failed while it worked";
        workshop.fails(&[("CUDA_EMULATOR_LOSE_AFTER_CALLS", calls)], &[part]);
    }
    workshop.fails(&[("CUDA_EMULATOR_MEMORY", "600000")], &["is out of memory", "MiB were requested"]);
    // One matrix at a time fits, and the workspace in place of its panel.
    let args = [&PAIR[..], &["--device", "cuda"]].concat();
    let (code, _, stderr) = workshop.run(&args, &[("CUDA_EMULATOR_MEMORY", "1150000")]);
    assert_eq!(code, 0, "{stderr}");
    let parts = ["device 'cuda:0' is unavailable", "finds no GPU"];
    let (code, _, stderr) = workshop.run(&args, &[("CUDA_EMULATOR_DEVICES", "0")]);
    assert!(code == 3 && parts.iter().all(|p| stderr.contains(p)), "{stderr}");
    // What is wrong with the request is said before a GPU is opened.
    let (code, _, stderr) =
        workshop.run(&[&args[..], &["--filter", "nothing"]].concat(), &[("CUDA_EMULATOR_DEVICES", "0")]);
    assert!(code == 2 && stderr.contains("there is no matrix to measure"), "{stderr}");
}

/// The compiler of kernels is not needed, the eigenvalue library is, with each of its functions.
#[test]
fn the_libraries_of_spectra_are_the_driver_cublas_and_cusolver() {
    // SAFETY: loading NVIDIA's driver has no other effect.
    if unsafe { libloading::Library::new("libcuda.so.1") }.is_ok() {
        println!("skipped: this machine has libcuda.so.1");
        return;
    }
    let workshop = Workshop::new();
    let some = workshop.path("libraries");
    std::fs::create_dir(&some).unwrap();
    let environment = [(FOLDERS_VARIABLE, some.to_str().unwrap())];
    let missing = |what: &str| workshop.fails(&environment, &["device 'cuda:0' is unavailable", what]);
    let link = |name: &str| symlink(folder().join(name), some.join(name)).unwrap();
    missing("the NVIDIA driver library libcuda.so.1 was not found");
    link("libcuda.so.1");
    missing("CUDA's matrix library libcublas.so.12 or .13 was not found");
    link("libcublas.so.12");
    missing("CUDA's eigenvalue library libcusolver.so.11 or .12 was not found");
    build_without_functions(&workshop.path("empty.c"), &some.join("libcusolver.so.11"));
    let (code, _, stderr) = workshop.run(&[&PAIR[..], &["--device", "cuda"]].concat(), &environment);
    assert!(code == 3 && stderr.contains("libcusolver.so.11 or .12) has no function cusolverDnCreate"), "{stderr}");
    std::fs::remove_file(some.join("libcusolver.so.11")).unwrap();
    link("libcusolver.so.11");
    let (code, _, stderr) = workshop.run(&[&PAIR[..], &["--device", "cuda"]].concat(), &environment);
    assert_eq!(code, 0, "{stderr}");
}

fn build_without_functions(source: &Path, library: &Path) {
    std::fs::write(source, "int nothing;\n").unwrap();
    let mut compiler = std::process::Command::new("g++");
    compiler.args(["-shared", "-fPIC", "-Wl,-soname,libcusolver.so", "-x", "c"]).arg(source).arg("-o").arg(library);
    assert!(compiler.status().unwrap().success());
}
