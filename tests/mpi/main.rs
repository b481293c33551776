//! Training in several processes over MPI, as mpirun starts them.
#![allow(missing_docs)]

#[path = "../common/mod.rs"]
mod common;

use common::{
    entries,
    processes::{Ended, mpirun, process_of, program, run_mpi, together},
    run,
    workshop::{Workshop, apart, trajectory},
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// f32 sums in another order, over 50 updates.
const REASSOCIATION: f64 = 1e-5;

fn train(workshop: &Workshop, world_size: usize, output: &str, set: &[&str]) -> PathBuf {
    let (code, _, stderr) = run_mpi(&mut mpirun(world_size, &workshop.train_args(output, set)));
    assert_eq!(code, Some(0), "{world_size} processes: {stderr}");
    workshop.path(output).into()
}

/// What a run leaves that must not depend on how it was computed: the bytes of its last checkpoint, and all losses.
fn bits(run: &Path) -> (Vec<Vec<u8>>, Vec<[f64; 3]>) {
    let checkpoint = run.join("checkpoints/step-50");
    let files = ["model.safetensors", "training_state/state.safetensors", "training_state/state.json"];
    (files.map(|file| fs::read(checkpoint.join(file)).unwrap()).to_vec(), trajectory(run))
}

#[test]
fn one_two_and_four_processes_train_alike_and_twice_the_same() {
    let workshop = Workshop::new();
    for (name, set) in [
        ("relora", &["relora.lora_dropout=0.1"][..]),
        ("bf16", &["train.dtype=bf16", "relora.train_scaling=true"]),
        ("full", &["train.mode=full", "train.clip_grad_norm=0.5"]),
    ] {
        if name == "full" {
            let config = fs::read_to_string(workshop.path("run.toml")).unwrap();
            fs::write(workshop.path("run.toml"), config.split("[warm_start]").next().unwrap()).unwrap();
        }
        let (code, _, stderr) = workshop.train(name, set);
        assert_eq!(code, 0, "{stderr}");
        let alone = trajectory(&PathBuf::from(workshop.path(name)));
        for world_size in [2, 4] {
            let runs =
                ["a", "b"].map(|again| train(&workshop, world_size, &format!("{name}-{world_size}{again}"), set));
            assert!(bits(&runs[0]) == bits(&runs[1]), "{name}, {world_size} processes");
            // Rounding by chance turns the last bit of a sum into one of a weight now and then.
            let tolerance = if name == "bf16" { 2e-2 } else { REASSOCIATION };
            let worst = apart(&alone, &trajectory(&runs[0]));
            assert!(worst < tolerance, "{name}, {world_size} processes: {worst}");
            let (code, _, stderr) = run(["verify", &workshop.path(&format!("{name}-{world_size}a"))]);
            assert_eq!(code, 0, "{name}: {stderr}");
        }
    }
}

/// 36 MB of gradients; the embedding alone is more than MPI's pieces.
const LARGE: &str = r#"
    [model]
    preset = "llama_9m"
    [data]
    train = "tokens.safetensors"
    max_length = 16
    [train]
    mode = "full"
    batch_size = 4
    num_training_steps = 4
    lr = 1e-3
    scheduler = "constant"
    "#;

#[test]
fn gradients_of_several_pieces_train_alike() {
    let workshop = Workshop::new();
    fs::write(workshop.path("run.toml"), LARGE).unwrap();
    assert_eq!(workshop.train("alone", &[]).0, 0);
    let runs = ["a", "b"].map(|name| train(&workshop, 2, name, &[]));
    let weights = |run: &Path| fs::read(run.join("checkpoints/step-4/model.safetensors")).unwrap();
    assert!(weights(&runs[0]) == weights(&runs[1]));
    let worst = apart(&trajectory(&PathBuf::from(workshop.path("alone"))), &trajectory(&runs[0]));
    assert!(worst < REASSOCIATION, "{worst}");
}

#[test]
fn shared_out_moments_change_no_bit() {
    let workshop = Workshop::new();
    for set in [&["relora.reset_optimizer_on_relora=true"][..], &["relora.optimizer_random_pruning=0.5"]] {
        let whole = train(&workshop, 2, "adam", set);
        let set = [set, &["train.optimizer=adam_zero"]].concat();
        assert!(bits(&train(&workshop, 2, "zero-2", &set)) == bits(&whole));
        assert!(apart(&trajectory(&train(&workshop, 4, "zero-4", &set)), &trajectory(&whole)) < REASSOCIATION);
        ["adam", "zero-2", "zero-4"].iter().for_each(|name| fs::remove_dir_all(workshop.path(name)).unwrap());
    }
}

/// Starts a longer run, and waits for its first checkpoint.
fn begin(workshop: &Workshop, output: &str, set: &[&str]) -> Child {
    let child = mpirun(2, &workshop.train_args(output, set)).spawn().unwrap();
    let (began, checkpoints) = (Instant::now(), PathBuf::from(workshop.path(output)).join("checkpoints"));
    while !checkpoints.is_dir() || entries(&checkpoints).iter().all(|name| !name.starts_with("step-")) {
        assert!(began.elapsed() < Duration::from_secs(60), "no checkpoint");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

fn signal(workshop: &Workshop, output: &str, rank: usize, signal: i32) {
    let pid = process_of(rank, &PathBuf::from(workshop.path(output))).expect("the process runs");
    // SAFETY: a signal to a process that this test started.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

fn wait(child: Child) -> Ended {
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

const LONG: [&str; 3] = ["train.num_training_steps=600", "train.save_every=50", "train.optimizer=adam_zero"];

#[test]
fn a_killed_process_ends_the_job_and_the_run_goes_on_with_any_number() {
    let workshop = Workshop::new();
    let whole = trajectory(&train(&workshop, 2, "whole", &LONG));
    for (rank, world_size) in [(1, 4), (0, 1)] {
        let output = format!("killed-{rank}");
        let child = begin(&workshop, &output, &LONG);
        // Some moment, another one each time: the clock draws it.
        let drawn = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos() % 500;
        println!("rank {rank} is killed {drawn} ms after the first checkpoint");
        std::thread::sleep(Duration::from_millis(drawn.into()));
        signal(&workshop, &output, rank, libc::SIGKILL);
        let began = Instant::now();
        let (code, _, stderr) = wait(child);
        assert!(began.elapsed() < Duration::from_secs(60) && code != Some(0), "{stderr}");
        assert!(stderr.contains(&format!("error: rank {rank} (")) && stderr.contains("is gone"), "{stderr}");
        assert!(stderr.contains("--resume"), "{stderr}");

        // With as many processes: as if nothing had happened. With more, or alone: as sums in another order have it, which is
        // far from the same after hundreds of updates.
        let saved = workshop.path(&format!("{output}-saved"));
        copy_folder(&PathBuf::from(workshop.path(&output)), &PathBuf::from(&saved));
        let (code, _, stderr) = run_mpi(&mut mpirun(2, &["train", "--resume", &workshop.path(&output)]));
        assert!(code == Some(0), "{stderr}");
        assert!(trajectory(&PathBuf::from(workshop.path(&output))) == whole, "rank {rank}");
        let (code, _, stderr) = run_mpi(&mut mpirun(world_size, &["train", "--resume", &saved]));
        assert!(code == Some(0), "{stderr}");
        let step: usize = stderr.split("after update ").nth(1).unwrap().lines().next().unwrap().parse().unwrap();
        assert!(step >= 50, "{stderr}");
        let found = trajectory(&PathBuf::from(saved));
        let worst = apart(&found[..step + 20], &whole[..step + 20]);
        assert!(worst < 1e-4 && found.len() == whole.len(), "after {step}: {worst}");
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for name in entries(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() {
            copy_folder(&from, &to);
        } else {
            fs::copy(from, to).map(drop).unwrap();
        }
    }
}

#[test]
fn a_signal_to_one_process_saves_a_checkpoint_and_stops_all() {
    let workshop = Workshop::new();
    let child = begin(&workshop, "stopped", &LONG);
    signal(&workshop, "stopped", 1, libc::SIGTERM);
    let (code, _, stderr) = wait(child);
    assert!(code == Some(3) && stderr.contains("interrupted after update"), "{stderr}");
    let step: u64 =
        stderr.split("interrupted after update ").nth(1).unwrap().split(';').next().unwrap().parse().unwrap();
    assert!(PathBuf::from(workshop.path(&format!("stopped/checkpoints/step-{step}"))).is_dir(), "{stderr}");
}

/// Runs one process with each list of arguments, the second in the folder `there`.
fn unlike(workshop: &Workshop, args: [&[String]; 2]) -> Ended {
    let mut command = mpirun(1, args[0]);
    command.current_dir(workshop.path(""));
    command
        .args([":", "-n", "1", "-wdir", &workshop.path("there")])
        .arg(program().get_program())
        .args(program().get_args())
        .args(args[1]);
    run_mpi(&mut command)
}

#[test]
fn processes_that_differ_are_refused_by_name_before_anything_is_written() {
    let workshop = Workshop::new();
    let mut text = fs::read_to_string(workshop.path("text.txt")).unwrap();
    text.push_str("more");
    fs::write(workshop.path("other.txt"), text).unwrap();
    run(["tokenize", &workshop.path("other.txt"), "-o", &workshop.path("other.safetensors")]);
    fs::create_dir(workshop.path("there")).unwrap();
    fs::rename(workshop.path("other.safetensors"), workshop.path("there/tokens.safetensors")).unwrap();

    let args = |set: &[&str]| workshop.train_args("run", set);
    let refused = |a: &[String], b: &[String], parts: &[&str]| {
        let (code, _, stderr) = unlike(&workshop, [a, b]);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(parts.iter().all(|part| stderr.contains(part)), "{stderr}");
        assert_eq!(stderr.matches("error: ").count(), 1, "{stderr}");
        assert!(!PathBuf::from(workshop.path("run")).exists());
    };
    refused(&args(&[]), &args(&["train.lr=1e-3"]), &["rank 1 (", "another configuration ('lr = 0.001' instead of"]);
    // The same name, another file: each process is in a folder of its own.
    let own = args(&["data.train=/proc/self/cwd/tokens.safetensors"]);
    refused(&own, &own, &["rank 1 (", "has other train data than rank 0"]);
    let three = args(&["train.batch_size=3", "train.gradient_accumulation=1"]);
    refused(&three, &three, &["3 sequences", "2 processes cannot divide"]);
}

#[test]
fn contradictions_of_launchers_are_refused() {
    let workshop = Workshop::new();
    let args = workshop.train_args("run", &[]);
    let (code, _, stderr) = run_mpi(mpirun(2, &args).envs([("RANK", "0"), ("WORLD_SIZE", "3")]));
    assert!(code == Some(2) && stderr.contains("the environment contradicts itself: WORLD_SIZE is 3"), "{stderr}");
    // Without mpirun, MPI knows of one process only.
    for (code, _, stderr) in together(2, &args, |_, _| {}) {
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.is_empty() || stderr.contains("MPI calls it rank 0 of 1"), "{stderr}");
    }
    assert!(!PathBuf::from(workshop.path("run")).exists());
}

#[test]
fn mpirun_spreads_merge_and_spectrum_without_changing_a_byte() {
    let folder = tempfile::tempdir().unwrap();
    let fixture = |name: &str| format!("{}/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
    let out = |name: &str| folder.path().join(name).display().to_string();
    let merge = |name: &str| {
        ["merge", "--base", &fixture("tiny_llama"), "--adapter", &fixture("tiny_adapter"), "--max-shard-size", "20KB"]
            .map(str::to_owned)
            .into_iter()
            .chain(["-o".into(), out(name)])
            .collect::<Vec<_>>()
    };
    assert_eq!(run(merge("one")).0, 0);
    let (code, stdout, stderr) = run_mpi(&mut mpirun(3, &merge("three")));
    assert!(code == Some(0) && stdout.contains("three"), "{stderr}");
    assert_eq!(entries(folder.path()), ["one", "three"]);
    let names = entries(&folder.path().join("one"));
    assert_eq!(names, entries(&folder.path().join("three")));
    for name in names {
        assert!(
            fs::read(folder.path().join("one").join(&name)).unwrap()
                == fs::read(folder.path().join("three").join(&name)).unwrap(),
            "{name}"
        );
    }
    let (base, tuned) = (fixture("tiny_llama"), out("one"));
    let spectrum = ["spectrum", "--base", &base, "--tuned", &tuned, "--format", "json", "--sigma"];
    let (code, one, stderr) = run(spectrum);
    assert_eq!(code, 0, "{stderr}");
    let (code, three, stderr) = run_mpi(&mut mpirun(3, &spectrum));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(one == three);
}

/// On GPUs of the CUDA emulator, whose memory is the host's: any MPI takes its addresses.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod gpus {
    use super::*;
    use common::cuda_emulator::folder;
    use relora_kit::ops::FOLDERS_VARIABLE;

    const SHORT: [&str; 6] = [
        "train.num_training_steps=14",
        "warm_start.num_training_steps=4",
        "relora.relora=5",
        "train.batch_size=3",
        "train.gradient_accumulation=2",
        "train.save_every=14",
    ];

    fn on_gpus(workshop: &Workshop, world_size: usize, output: &str, aware: &str, set: &[&str]) -> Ended {
        let mut args = workshop.train_args(output, set);
        args.extend(["--device", "cuda", "--collective", "mpi", "-v"].map(str::to_owned));
        let mut command = mpirun(world_size, &args);
        command.env(FOLDERS_VARIABLE, folder()).env("XDG_CACHE_HOME", folder());
        command.env("CUDA_EMULATOR_DEVICES", "3").env("RELORA_KIT_CUDA_AWARE_MPI", aware);
        run_mpi(&mut command)
    }

    #[test]
    fn sums_from_gpu_to_gpu_are_those_through_the_host() {
        let workshop = Workshop::new();
        let (code, _, stderr) = workshop.train("cpu", &SHORT);
        assert_eq!(code, 0, "{stderr}");
        let alone = trajectory(&PathBuf::from(workshop.path("cpu")));
        // Three processes do not share out 16 or 32 elements evenly.
        for (world_size, set) in [(2, &[][..]), (3, &["train.optimizer=adam_zero"])] {
            let found = both_ways(&workshop, world_size, &[&SHORT[..], set].concat());
            assert!(apart(&alone, &found) < REASSOCIATION, "{world_size}");
        }
        fs::write(workshop.path("run.toml"), LARGE).unwrap();
        both_ways(&workshop, 2, &["train.num_training_steps=1", "data.max_length=8"]);
    }

    /// Trains from GPU to GPU and through the host: the same bits. The trajectory.
    fn both_ways(workshop: &Workshop, world_size: usize, set: &[&str]) -> Vec<[f64; 3]> {
        let runs = ["1", "0"].map(|aware| {
            let output = format!("{world_size}-{aware}");
            let (code, _, stderr) = on_gpus(workshop, world_size, &output, aware, set);
            assert_eq!(code, Some(0), "{stderr}");
            assert_eq!(stderr.contains("it sends from GPU to GPU"), aware == "1", "{stderr}");
            let run = PathBuf::from(workshop.path(&output));
            let checkpoint = run.join("checkpoints").join(entries(&run.join("checkpoints")).pop().unwrap());
            let files = ["model.safetensors", "training_state/state.safetensors"];
            let saved = (files.map(|file| fs::read(checkpoint.join(file)).unwrap()), trajectory(&run));
            fs::remove_dir_all(run).unwrap();
            saved
        });
        assert!(runs[0] == runs[1], "{world_size}");
        runs[0].1.clone()
    }

    #[test]
    fn whether_mpi_takes_addresses_on_gpus_is_asked_or_said() {
        let workshop = Workshop::new();
        let (code, _, stderr) = on_gpus(&workshop, 2, "asked", "", &SHORT);
        assert!(
            code == Some(0) && !stderr.contains("from GPU to GPU"),
            "Debian's Open MPI is not CUDA-aware: {stderr}"
        );
        let (code, _, stderr) = on_gpus(&workshop, 2, "said", "yes", &[]);
        assert!(code == Some(2) && stderr.contains("RELORA_KIT_CUDA_AWARE_MPI is 'yes', expected 1 or 0"), "{stderr}");
    }
}
