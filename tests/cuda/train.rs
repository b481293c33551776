//! Training on the CUDA emulator, seen from inside: how often the host waits, what memory is taken, and what mixed precision
//! changes.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use crate::common;
use crate::common::cuda_emulator::{folder, open};
use relora_kit::{
    collective::{Alone, Collective},
    model::Model,
    ops::{Cpu, Cuda, Device, LaunchQueue},
    progress::Progress,
    run::RunDir,
    train::{architecture, config::Config, session::Session, summary::Summary, tokens::TokenShard, trainer::Trainer},
};
use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

/// The emulator counts for the whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// One of the emulator's counters.
fn counter(name: &str) -> u64 {
    // SAFETY: the double is loaded already; the function takes nothing and returns its number.
    unsafe {
        let driver = libloading::Library::new(folder().join("libcuda.so.1")).unwrap();
        let count: libloading::Symbol<unsafe extern "C" fn() -> u64> = driver.get(name.as_bytes()).unwrap();
        count()
    }
}

const MODEL: &str = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 257, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false, "initializer_range": 0.05}"#;

const RUN: &str = r#"
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
num_training_steps = 16
lr = 1e-2
scheduler = "cosine_restarts"
warmup_steps = 2
restart_warmup_steps = 2
save_every = 7
[warm_start]
num_training_steps = 4
warmup_steps = 2
[relora]
lora_r = 4
lora_alpha = 8.0
relora = 6
"#;

/// A folder with a model, tokens and `run.toml`.
fn workshop() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..300).map(|i| format!("line {} of a text that repeats itself.\n", i % 7)).collect();
    fs::write(folder.path().join("text.txt"), text).unwrap();
    fs::write(folder.path().join("model.json"), MODEL).unwrap();
    fs::write(folder.path().join("run.toml"), RUN).unwrap();
    let args =
        ["tokenize".into(), folder.path().join("text.txt"), "-o".into(), folder.path().join("tokens.safetensors")];
    assert_eq!(common::run(args).0, 0);
    folder
}

fn config(workshop: &Path, set: &[&str]) -> Config {
    let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
    Config::read(&workshop.join("run.toml"), &set).unwrap()
}

fn trainer(device: Cuda, config: Config) -> Trainer<Cuda> {
    let shard = TokenShard::open(&config.data.train).unwrap();
    let model = Model::init(device, architecture(&config).unwrap(), 3).unwrap();
    Trainer::new(config, model, shard).unwrap()
}

fn alone<D: Device>() -> Arc<dyn Collective<D>> {
    Arc::new(Alone)
}

fn train<D: Device>(device: D, workshop: &Path, name: &str, set: &[&str]) -> Summary {
    let run = workshop.join(name);
    Session::create(device, config(workshop, set), &run, &alone(), &Progress::hidden()).unwrap().run().unwrap()
}

/// Loss of every update.
fn losses(run: &Path) -> Vec<f64> {
    let rows = fs::read_to_string(RunDir(run.into()).metrics_path()).unwrap();
    let rows = rows.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    rows.filter_map(|row| row.get("loss")?.as_f64()).collect()
}

const MIXED: &str = "train.mixed_precision=bf16";

#[test]
fn the_host_waits_once_per_update() {
    let _one = ONE_AT_A_TIME.lock();
    let workshop = workshop();
    for set in [
        &["relora.lora_dropout=0.1"][..],
        &["relora.lora_dropout=0.1", "train.cuda_graphs=true"],
        &[MIXED],
        &["train.tf32=true"],
        &["relora.train_scaling=true"],
        &["relora.train_scaling=true", "train.activation_checkpointing=true", "train.dtype=bf16"],
    ] {
        let device: Cuda = open();
        let mut trainer = trainer(device, config(workshop.path(), set));
        while !trainer.is_finished() {
            if trainer.cycles_start_here() {
                trainer.freeze_projections();
                trainer.start_cycles().unwrap();
            }
            let before = counter("cuda_emulator_waits");
            trainer.update().unwrap();
            assert_eq!(counter("cuda_emulator_waits") - before, 1, "{set:?}, update {}", trainer.step);
            if trainer.restart_is_due() {
                trainer.restart();
            }
        }
    }
}

#[test]
fn what_the_plan_reserves_is_enough() {
    let _one = ONE_AT_A_TIME.lock();
    let workshop = workshop();
    let wide = ["train.batch_size=8", "train.gradient_accumulation=1", "data.max_length=48"];
    for (name, set) in [
        ("plain", &[][..]),
        ("mixed", &[MIXED]),
        ("tf32", &["train.tf32=true"]),
        ("graphs", &[MIXED, "train.cuda_graphs=true"]),
        ("checkpointing", &["train.activation_checkpointing=true"]),
        ("few bits", FEW_BITS[0]),
        ("mixed, few bits", FEW_BITS[1]),
    ] {
        let device = open();
        let before = counter("cuda_emulator_growths");
        let summary = train(device, workshop.path(), name, &[&wide[..], set].concat());
        // The reservation itself, and nothing after it.
        assert_eq!(counter("cuda_emulator_growths") - before, 1, "{name}");
        assert!(summary.device_peak_memory.unwrap() > 1 << 20, "{name}");
    }
}

#[test]
fn mixed_precision_trains_as_f32_does_within_its_rounding() {
    let _one = ONE_AT_A_TIME.lock();
    let workshop = workshop();
    let exact = train(Cpu, workshop.path(), "f32", &[]);
    for (name, set) in [("nearest", &[MIXED, "train.rounding=nearest"][..]), ("chance", &[MIXED])] {
        let mixed = train(open(), workshop.path(), name, set);
        let (found, expected) = (losses(&mixed.run), losses(&exact.run));
        assert_eq!(found.len(), 16);
        for (step, (f, e)) in found.iter().zip(&expected).enumerate() {
            // Activations and factors carry 2^-9 on average; on losses of 5.5 and less this adds up to 1% after 16 updates.
            assert!((f / e - 1.0).abs() < 0.01, "{name}, update {}: {f} instead of {e}", step + 1);
        }
        assert!(found != expected && found[15] < 0.9 * found[0], "{found:?}");
        // Merges into bf16 are noted, and hold.
        let manifest = RunDir(mixed.run.clone()).manifest().unwrap();
        assert!(manifest.cycles.len() == 2 && manifest.stochastic_rounding == (name == "chance"));
        assert!(manifest.cycles.iter().all(|c| c.retention.is_some_and(|r| r > 0.9)), "{:?}", manifest.cycles);
        let (code, stdout, stderr) = common::run(["verify".as_ref(), mixed.run.as_os_str()]);
        assert_eq!(code, 0, "{stdout}{stderr}");
    }
}

/// Runs that died after an update resume to the bits of the whole one, on any device that it is asked to.
fn resumes(device: &dyn Fn() -> Cuda, workshop: &Path, set: &[&str]) {
    let whole = train(device(), workshop, "whole", set);
    let last = |run: &Path| fs::read(run.join("checkpoints/step-16/model.safetensors")).unwrap();
    for step in [7, 14] {
        let copy = workshop.join(format!("cut after {step}"));
        let cut = || {
            // As if it had died right after this checkpoint.
            let status = std::process::Command::new("cp").arg("-r").arg(&whole.run).arg(&copy).status().unwrap();
            assert!(status.success());
            let manifest = fs::read_to_string(copy.join("manifest.json")).unwrap();
            fs::write(copy.join("manifest.json"), manifest.replace("\"finished\": true", "\"finished\": false"))
                .unwrap();
            for later in [7, 14, 16].into_iter().filter(|later| *later > step) {
                fs::remove_dir_all(copy.join(format!("checkpoints/step-{later}"))).unwrap();
            }
        };
        cut();
        let resumed = Session::resume(device(), &copy, &alone(), &Progress::hidden()).unwrap().run().unwrap();
        assert_eq!(losses(&resumed.run), losses(&whole.run), "{set:?}");
        assert!(last(&resumed.run) == last(&whole.run), "{set:?}");
        fs::remove_dir_all(&copy).unwrap();
        cut();
        let resumed = Session::resume(Cpu, &copy, &alone(), &Progress::hidden()).unwrap().run().unwrap();
        for (f, e) in losses(&resumed.run).iter().zip(losses(&whole.run)) {
            assert!((f / e - 1.0).abs() < 0.01, "{set:?}: {f} instead of {e}");
        }
    }
}

#[test]
fn a_mixed_run_resumes_to_the_same_bits_and_on_the_cpu() {
    let _one = ONE_AT_A_TIME.lock();
    resumes(&open, workshop().path(), &[MIXED]);
}

const FEW_BITS: [&[&str]; 3] = [
    &["relora.quantize=4bit"],
    &["relora.quantize=4bit", "relora.use_double_quant=false", MIXED],
    &["relora.quantize=8bit", MIXED, "train.activation_checkpointing=true"],
];

#[test]
fn quantised_runs_resume_to_the_same_bits_and_on_the_cpu() {
    let _one = ONE_AT_A_TIME.lock();
    for set in FEW_BITS {
        resumes(&open, workshop().path(), set);
    }
}

#[test]
fn quantised_weights_train_as_on_the_cpu() {
    let _one = ONE_AT_A_TIME.lock();
    let workshop = workshop();
    for (i, set) in FEW_BITS.into_iter().enumerate() {
        let gpu = train(open(), workshop.path(), &format!("gpu{i}"), set);
        let cpu = train(Cpu, workshop.path(), &format!("cpu{i}"), set);
        let (found, expected) = (losses(&gpu.run), losses(&cpu.run));
        // In f32 the two differ by the order of sums, until one of 22,016 weights falls to another number at a merge.
        let within = if set.contains(&MIXED) { 0.01 } else { 1e-4 };
        assert!(
            found.iter().zip(&expected).all(|(f, e)| (f / e - 1.0).abs() < within),
            "{set:?} {found:?} {expected:?}"
        );
        assert!(found[15] < 0.9 * found[0], "{found:?}");
        for run in [&gpu.run, &cpu.run] {
            let manifest = RunDir(run.clone()).manifest().unwrap();
            assert_eq!(manifest.quantised.as_deref(), Some(if i == 2 { "int8" } else { "nf4" }));
            assert!(manifest.cycles.len() == 2 && manifest.cycles.iter().all(|c| c.retention.is_some()));
            let (code, stdout, stderr) = common::run(["verify".as_ref(), run.as_os_str()]);
            assert_eq!(code, 0, "{stdout}{stderr}");
        }
        // A delta that was not merged is noticed all the same.
        let adapter = cpu.run.join("cycles/cycle-001/adapter_model.safetensors");
        let mut bytes = fs::read(&adapter).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
        fs::write(&adapter, bytes).unwrap();
        assert_eq!(common::run(["verify".as_ref(), cpu.run.as_os_str()]).0, 1);
    }
}

/// Ways to train that differ in what they ask the GPU for.
const WAYS: [(&str, &[&str]); 8] = [
    ("dropout", &["relora.lora_dropout=0.1"]),
    ("mixed", &[MIXED, "relora.lora_dropout=0.1"]),
    ("tf32", &["train.tf32=true", "train.gradient_accumulation=1"]),
    ("scaling", &["relora.train_scaling=true"]),
    ("checkpointing", &["train.activation_checkpointing=true", "train.dtype=bf16", "train.gradient_accumulation=3"]),
    ("few bits", FEW_BITS[0]),
    ("mixed, few bits", FEW_BITS[1]),
    ("full rank", &["warm_start.num_training_steps=14", "relora.relora=2", MIXED]),
];

#[test]
fn graphs_change_no_bit() {
    let _one = ONE_AT_A_TIME.lock();
    let workshop = workshop();
    let weights = |run: &Path| fs::read(run.join("checkpoints/step-16/model.safetensors")).unwrap();
    for (name, set) in WAYS {
        let with = |graphs: &str| {
            let before = counter("cuda_emulator_graphs");
            let own = format!("train.cuda_graphs={graphs}");
            let run = train(open(), workshop.path(), &format!("{name} {graphs}"), &[set, &[&own]].concat()).run;
            (run, counter("cuda_emulator_graphs") - before)
        };
        let ((plain, none), (graphs, started)) = (with("false"), with("true"));
        assert_eq!(losses(&graphs), losses(&plain), "{name}");
        assert!(weights(&graphs) == weights(&plain), "{name}");
        assert!(none == 0 && started > 16, "{name}: {started} graphs started");
    }
}

/// What one update of a cycle asks the GPU for: requests (kernels, products, copies, fills), and memory taken and given back.
fn asked(workshop: &Path, layers: usize, passes: usize, windows: usize, set: &[&str]) -> [i64; 2] {
    let model = MODEL.replace("\"num_hidden_layers\": 2", &format!("\"num_hidden_layers\": {layers}"));
    let model = model.replace("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 4");
    fs::write(workshop.join("model.json"), model).unwrap();
    let sizes = [format!("train.gradient_accumulation={passes}"), format!("train.batch_size={windows}")];
    let config = config(workshop, &[&["relora.lora_dropout=0.1", &sizes[0], &sizes[1]][..], set].concat());
    let mut trainer = trainer(open(), config);
    // Graphs come from the third update of a cycle on.
    while trainer.step < 9 {
        if trainer.cycles_start_here() {
            trainer.freeze_projections();
            trainer.start_cycles().unwrap();
        }
        trainer.update().unwrap();
    }
    let counters = || ["cuda_emulator_requests", "cuda_emulator_memory_requests"].map(|name| counter(name) as i64);
    let before = counters();
    trainer.update().unwrap();
    std::array::from_fn(|i| counters()[i] - before[i])
}

/// The numbers of docs/gpu.md: each request costs the host some microseconds, and a fast GPU must not wait for them.
#[test]
fn an_update_asks_the_gpu_for_little() {
    let _one = ONE_AT_A_TIME.lock();
    let workshop = workshop();
    // Per layer and pass, per pass, per layer, and once: requests, and memory taken and given back.
    for (set, expected) in [
        (&[][..], [[100, 18, 64, 15], [10, 14, 32, 8]]),
        (&["train.tf32=true"], [[113, 18, 64, 15], [36, 14, 32, 8]]),
        (&[MIXED], [[113, 18, 78, 16], [36, 14, 32, 8]]),
        (&[MIXED, "relora.quantize=4bit"], [[141, 18, 78, 16], [64, 14, 32, 8]]),
    ] {
        let asked = |layers, passes, windows| asked(workshop.path(), layers, passes, windows, set);
        let [a, b, c, d] = [(2, 2), (3, 2), (2, 3), (3, 3)].map(|(layers, passes)| asked(layers, passes, 2));
        let found: [[i64; 4]; 2] = std::array::from_fn(|i| {
            let both = (d[i] - c[i]) - (b[i] - a[i]);
            let (pass, layer) = (c[i] - a[i] - 2 * both, b[i] - a[i] - 2 * both);
            [both, pass, layer, a[i] - 4 * both - 2 * pass - 2 * layer]
        });
        assert_eq!(found, expected, "{set:?}");
        assert_eq!(asked(2, 2, 3), a, "{set:?}: windows are taken together");
    }
}

/// As graphs, all of them ask for: per layer and pass, per pass, per layer, and once. What is left are mostly kernels that are
/// given something else than last time: the keys of dropout, the factors of AdamW.
#[test]
fn graphs_ask_the_gpu_for_less() {
    let _one = ONE_AT_A_TIME.lock();
    let workshop = workshop();
    for set in [&[][..], &["train.tf32=true"], &[MIXED], &[MIXED, "relora.quantize=4bit"]] {
        let set = [&["train.cuda_graphs=true"], set].concat();
        let asked = |layers, passes| asked(workshop.path(), layers, passes, 2, &set);
        let found = [(2, 2), (3, 2), (2, 3), (3, 3)].map(|(layers, passes)| asked(layers, passes));
        let expected = [(2, 2), (3, 2), (2, 3), (3, 3)].map(|(l, p)| [21 * l * p + 7 * p + 16 * l + 6, 0]);
        assert_eq!(found, expected, "{set:?}");
    }
    let full_rank = ["train.cuda_graphs=true", "warm_start.num_training_steps=14", "relora.relora=2", MIXED];
    for (layers, passes) in [(2, 1), (2, 2), (3, 3)] {
        let asked = asked(workshop.path(), layers as usize, passes as usize, 2, &full_rank);
        assert_eq!(asked, [7 * passes + 9 * layers + 6, 0], "full rank, {layers} layers, {passes} passes");
    }
}

#[test]
fn memory_kept_for_held_requests_goes_back_when_it_runs_out() {
    let _one = ONE_AT_A_TIME.lock();
    let device = open();
    let gib = 1 << 28;
    assert!(device.begin_capture());
    drop(device.zeros(gib));
    let ones = device.upload(&[1.0; 100]);
    // Of 2 GiB. From here on, nothing is held back.
    let zeros = device.zeros(gib + gib / 2);
    device.status().unwrap();
    assert!(device.read(&ones) == [1.0; 100] && device.len(&zeros) == gib + gib / 2);
    assert!(!device.begin_capture());
    device.end_capture();
}
