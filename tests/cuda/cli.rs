//! `--device cuda`: the program on the CUDA emulator of CUDA's libraries, and on machines where something is missing.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use crate::common;
use crate::common::{
    cuda_emulator::{folder, set_environment},
    entries,
};
use relora_kit::{checkpoint::Checkpoint, ops::FOLDERS_VARIABLE};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A tiny model's text, configuration and runs.
struct Workshop(tempfile::TempDir);

impl Workshop {
    fn new() -> Workshop {
        let workshop = Workshop(tempfile::tempdir().unwrap());
        let text: String = (0..300).map(|i| format!("line {} of a text that repeats itself.\n", i % 7)).collect();
        fs::write(workshop.path("text.txt"), text).unwrap();
        let llama = serde_json::json!({
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 44, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 257, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false, "initializer_range": 0.02,
        });
        fs::write(workshop.path("model.json"), llama.to_string()).unwrap();
        let config = r#"
            [model]
            config = "model.json"
            [data]
            train = "tokens.safetensors"
            validation_fraction = 0.1
            max_length = 24
            [train]
            mode = "relora"
            seed = 5
            batch_size = 2
            gradient_accumulation = 2
            num_training_steps = 14
            lr = 3e-3
            scheduler = "cosine_restarts"
            warmup_steps = 2
            restart_warmup_steps = 2
            save_every = 3
            eval_every = 7
            eval_tokens = 100
            [warm_start]
            num_training_steps = 4
            warmup_steps = 2
            [relora]
            lora_r = 2
            lora_alpha = 4.0
            lora_dropout = 0.1
            relora = 5
            "#;
        fs::write(workshop.path("run.toml"), config).unwrap();
        let args = ["tokenize", "text.txt", "-o", "tokens.safetensors"];
        let (code, _, stderr) = workshop.run(&args, &[]);
        assert_eq!(code, 0, "{stderr}");
        workshop
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The program with the emulator; code, stdout and stderr.
    fn run(&self, args: &[&str], environment: &[(&str, &str)]) -> (i32, String, String) {
        let mut command = common::relora_kit();
        set_environment(&mut command);
        let output = command.current_dir(self.0.path()).args(args).envs(environment.iter().copied()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
    }

    fn train(&self, output: &str, more: &[&str], environment: &[(&str, &str)]) -> (i32, String, String) {
        self.run(&[&["train", "--config", "run.toml", "-o", output], more].concat(), environment)
    }

    #[track_caller]
    fn trains(&self, output: &str, more: &[&str], environment: &[(&str, &str)]) -> PathBuf {
        let (code, _, stderr) = self.train(output, more, environment);
        assert_eq!(code, 0, "{stderr}");
        self.path(output)
    }

    /// Training on the GPU ends with 3 and a sentence that holds each of `parts`.
    #[track_caller]
    fn fails(&self, output: &str, more: &[&str], environment: &[(&str, &str)], parts: &[&str]) {
        let (code, _, stderr) = self.train(output, &[&["--device", "cuda"], more].concat(), environment);
        assert_eq!(code, 3, "{stderr}");
        for part in ["error: ", "help: "].iter().chain(parts) {
            assert!(stderr.contains(part), "expected '{part}' in: {stderr}");
        }
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

/// Loss and gradient norm of every update.
fn updates(run: &Path) -> Vec<[f64; 2]> {
    let rows = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let rows = rows.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    rows.filter_map(|row| Some([row.get("loss")?.as_f64()?, row["grad_norm"].as_f64()?])).collect()
}

#[track_caller]
fn assert_close(what: &str, found: &[[f64; 2]], expected: &[[f64; 2]]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (step, (f, e)) in found.iter().zip(expected).enumerate() {
        let close = (f[0] / e[0] - 1.0).abs() < 1e-5 && (f[1] / e[1] - 1.0).abs() < 1e-3;
        assert!(close, "{what}, update {}: {f:?} instead of {e:?}", step + 1);
    }
}

/// Whether this machine has a driver of its own: then nothing is missing.
fn has_driver() -> bool {
    // SAFETY: loading NVIDIA's driver has no other effect.
    let found = unsafe { libloading::Library::new("libcuda.so.1") }.is_ok();
    if found {
        println!("skipped: this machine has libcuda.so.1");
    }
    found
}

const FINAL: &str = "checkpoints/step-14/model.safetensors";

#[test]
fn a_run_on_the_gpu_is_that_of_the_cpu() {
    let workshop = Workshop::new();
    let cpu = workshop.trains("cpu", &[], &[]);
    let gpu = workshop.trains("gpu", &["--device", "cuda:0", "--profile"], &[]);
    assert_eq!(updates(&cpu).len(), 14);
    assert_close("the GPU's", &updates(&gpu), &updates(&cpu));
    let [expected, found] = [&cpu, &gpu].map(|run| Checkpoint::open(&run.join("checkpoints/step-14")).unwrap());
    for tensor in expected.tensors() {
        let (a, b) = (tensor.to_f32().unwrap(), found.tensor(tensor.name()).unwrap().to_f32().unwrap());
        assert!(a.iter().zip(b.iter()).all(|(a, b)| (a - b).abs() < 2e-5), "{}", tensor.name());
    }
    assert!(fs::read_to_string(gpu.join("profile.json")).unwrap().contains("attention, backward"));
    let (code, _, stderr) = workshop.run(&["verify", "gpu"], &[]);
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn no_bit_depends_on_the_order_of_blocks_and_threads() {
    let workshop = Workshop::new();
    let run = |seed: &str| {
        let name = format!("seed{seed}");
        let run = workshop.trains(&name, &["--device", "cuda"], &[("CUDA_EMULATOR_SEED", seed)]);
        (updates(&run), fs::read(run.join(FINAL)).unwrap())
    };
    let first = run("1");
    assert!(run("2") == first && run("77") == first);
}

#[test]
fn graphs_that_cannot_be_had_are_not_needed() {
    let workshop = Workshop::new();
    let with = |graphs: &str, environment| {
        let more = ["--device", "cuda", "--set", &format!("train.cuda_graphs={graphs}")];
        fs::read(workshop.trains(&format!("{graphs} {environment:?}"), &more, environment).join(FINAL)).unwrap()
    };
    let plain = with("false", &[]);
    assert!(with("true", &[]) == plain && with("true", &[("CUDA_EMULATOR_NO_GRAPHS", "1")]) == plain);
}

#[test]
fn a_lost_gpu_ends_the_run_and_it_resumes_anywhere() {
    let workshop = Workshop::new();
    let whole = workshop.trains("whole", &["--device", "cuda"], &[]);
    let graphs = &["--set", "train.cuda_graphs=true"][..];
    for (output, device, launches, more) in [
        ("a", "cuda", "1500", &[][..]),
        ("b", "cpu", "2600", &[]),
        ("c", "cuda", "40", &[]),
        ("d", "cuda", "2000", graphs),
    ] {
        let lost = [("CUDA_EMULATOR_LOSE_AFTER", launches)];
        let parts = ["device 'cuda:0' (CUDA emulator) failed while it worked", "--resume", "--device cpu"];
        workshop.fails(output, more, &lost, &parts);
        let made = updates(&workshop.path(output)).len();
        assert!(made < 14, "the GPU was not lost in time");
        let (code, _, stderr) = workshop.run(&["train", "--resume", output, "--device", device], &[]);
        assert_eq!(code, 0, "{stderr}");
        let resumed = workshop.path(output);
        assert_close(output, &updates(&resumed), &updates(&whole));
        if device == "cuda" {
            assert_eq!(updates(&resumed), updates(&whole));
            assert!(fs::read(resumed.join(FINAL)).unwrap() == fs::read(whole.join(FINAL)).unwrap());
        }
    }
}

#[test]
fn out_of_memory_is_a_sentence() {
    let workshop = Workshop::new();
    let parts = ["is out of memory", "MiB were requested", "are free", "train.batch_size"];
    // Not even what cuBLAS wants for itself (8 MiB) fits, or not even the weights beside it: nothing is left behind.
    for memory in ["40000", "8430000"] {
        workshop.fails("none", &[], &[("CUDA_EMULATOR_MEMORY", memory)], &parts);
        assert!(!workshop.path("none").exists());
    }
    // The weights and their gradients fit, the activations do not.
    workshop.fails("some", &[], &[("CUDA_EMULATOR_MEMORY", "8520000")], &parts);
    let (code, _, stderr) = workshop.run(&["train", "--resume", "some"], &[]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(updates(&workshop.path("some")).len(), 14);
}

#[test]
fn a_gpu_that_is_not_there_is_a_sentence() {
    let workshop = Workshop::new();
    for (device, count, part) in [
        ("cuda:1", "1", "device 'cuda:1' is unavailable: there is one GPU, cuda:0"),
        ("cuda:7", "2", "there are 2 GPUs, cuda:0 to cuda:1"),
        ("cuda", "0", "device 'cuda:0' is unavailable: the NVIDIA driver finds no GPU"),
    ] {
        let (code, _, stderr) = workshop.train("run", &["--device", device], &[("CUDA_EMULATOR_DEVICES", count)]);
        assert!(code == 3 && stderr.contains(part), "{stderr}");
    }
    workshop.fails(
        "run",
        &[],
        &[("CUDA_EMULATOR_VERSION", "11040")],
        &["supports CUDA 11.4", "update the NVIDIA driver"],
    );
    assert!(!workshop.path("run").exists());
}

#[test]
fn a_library_that_is_not_there_is_a_sentence() {
    let workshop = Workshop::new();
    let some = workshop.path("libraries");
    fs::create_dir(&some).unwrap();
    let some = some.to_str().unwrap();
    let environment = [(FOLDERS_VARIABLE, some)];
    if has_driver() {
        return;
    }
    let missing = |what: &str| {
        let looked = format!("(looked in '{some}', LD_LIBRARY_PATH and the system's folders)");
        workshop.fails("run", &[], &environment, &["device 'cuda:0' is unavailable", what, &looked, "--device cpu"]);
    };
    missing("the NVIDIA driver library libcuda.so.1 was not found");
    let link = |name: &str| std::os::unix::fs::symlink(folder().join(name), Path::new(some).join(name)).unwrap();
    link("libcuda.so.1");
    missing("CUDA's run-time compiler libnvrtc.so.12 or .13 was not found");
    link("libnvrtc.so.12");
    missing("CUDA's matrix library libcublas.so.12 or .13 was not found");
    fs::write(Path::new(some).join("libcublas.so.12"), "no library").unwrap();
    workshop.fails("run", &[], &environment, &["cannot load", "libcublas.so.12", FOLDERS_VARIABLE]);
    assert!(!workshop.path("run").exists());
}

#[test]
fn a_library_without_a_function_is_a_sentence() {
    if has_driver() {
        return;
    }
    let workshop = Workshop::new();
    let source = workshop.path("empty.c");
    fs::write(&source, "int cuInit(unsigned flags) { return flags; }\n").unwrap();
    let library = workshop.path("libcuda.so.1");
    let mut compiler = std::process::Command::new("g++");
    compiler.args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so", "-x", "c"]).arg(&source).arg("-o").arg(&library);
    assert!(compiler.status().unwrap().success());
    let environment = [(FOLDERS_VARIABLE, workshop.0.path().to_str().unwrap())];
    workshop.fails("run", &[], &environment, &["libcuda.so.1) has no function cu", "too old"]);
}

#[test]
fn compiled_kernels_are_kept_and_damaged_ones_made_anew() {
    let workshop = Workshop::new();
    let cache = workshop.path("cache");
    let environment = [("XDG_CACHE_HOME", cache.to_str().unwrap())];
    let steps = ["--device", "cuda", "--set", "train.num_training_steps=9"];
    workshop.trains("first", &steps, &environment);
    let kernels = cache.join("relora-kit/kernels");
    let names = entries(&kernels);
    assert_eq!(names.len(), 14, "{names:?}");
    for name in &names {
        let mut bytes = fs::read(kernels.join(name)).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(kernels.join(name), &bytes[..bytes.len() - usize::from(name.starts_with('a'))]).unwrap();
    }
    workshop.trains("second", &steps, &environment);
    assert_eq!(entries(&kernels), names);
    assert_eq!(updates(&workshop.path("first")), updates(&workshop.path("second")));
    // A cache that cannot be written is none.
    workshop.trains("third", &steps, &[("XDG_CACHE_HOME", "/proc/nowhere")]);
}

#[test]
fn bf16_weights_and_activation_checkpointing_work_on_the_gpu() {
    let workshop = Workshop::new();
    let more =
        ["--set", "train.dtype=bf16", "--set", "train.activation_checkpointing=true", "--set", "train.tf32=true"];
    let gpu = workshop.trains("gpu", &[&["--device", "cuda"], &more[..]].concat(), &[]);
    let cpu = workshop.trains("cpu", &more, &[]);
    let (found, expected) = (updates(&gpu), updates(&cpu));
    // Rounding by chance takes the same numbers, but where a weight differs in its last bit, it may fall otherwise.
    assert!(found.iter().zip(&expected).all(|(f, e)| (f[0] / e[0] - 1.0).abs() < 0.01), "{found:?} {expected:?}");
    assert!(found[13][0] < found[0][0]);
}

#[test]
fn a_gpu_without_bf16_computes_in_f32_and_says_so() {
    let workshop = Workshop::new();
    let more = ["--set", "train.mixed_precision=bf16"];
    let warning = "the device has no bf16: frozen weights are rounded to it, everything is computed in f32";
    let old = [("CUDA_EMULATOR_CAPABILITY", "75")];
    let (code, _, stderr) = workshop.train("old", &[&["--device", "cuda"], &more[..]].concat(), &old);
    assert!(code == 0 && stderr.contains(warning), "{stderr}");
    let (code, _, stderr) = workshop.train("cpu", &more, &[]);
    assert!(code == 0 && stderr.contains(warning), "{stderr}");
    assert_close("old", &updates(&workshop.path("old")), &updates(&workshop.path("cpu")));
    let (code, _, stderr) = workshop.train("new", &[&["--device", "cuda"], &more[..]].concat(), &[]);
    assert!(code == 0 && !stderr.contains(warning), "{stderr}");
}

#[test]
fn eval_and_generate_agree_with_the_cpu() {
    let workshop = Workshop::new();
    workshop.trains("run", &[], &[]);
    let model = "run/checkpoints/step-14";
    let on = |device: &str, args: &[&str]| {
        let (code, stdout, stderr) = workshop.run(&[args, &["--device", device]].concat(), &[]);
        assert_eq!(code, 0, "{stderr}");
        stdout
    };
    let eval = ["eval", "--model", model, "--data", "tokens.safetensors", "--max-length", "24", "--format", "json"];
    let eval = [&eval[..], &["--max-predictions", "300"]].concat();
    let loss =
        |device| serde_json::from_str::<serde_json::Value>(&on(device, &eval)).unwrap()["loss"].as_f64().unwrap();
    let (cpu, gpu) = (loss("cpu"), loss("cuda"));
    assert!((gpu / cpu - 1.0).abs() < 1e-6, "{gpu} instead of {cpu}");
    let generate = ["generate", "--model", model, "--prompt", "line", "--max-new-tokens", "12"];
    assert_eq!(on("cuda", &generate), on("cpu", &generate));
}

#[test]
fn a_device_of_another_kind_is_refused() {
    let workshop = Workshop::new();
    let (code, _, stderr) = workshop.train("run", &["--device", "tpu"], &[]);
    assert!(code == 2 && stderr.contains("expected cpu, cuda or cuda:N"), "{stderr}");
    // The configuration is looked at before the GPU.
    let (code, _, stderr) =
        workshop.train("run", &["--device", "cuda", "--set", "train.unknown=1"], &[("CUDA_EMULATOR_DEVICES", "0")]);
    assert!(code == 2 && stderr.contains("unknown field"), "{stderr}");
}
