//! Several processes that torchrun or Slurm started: they meet at MASTER_ADDR, share out the work, and end together.

use crate::common::{
    entries,
    processes::{Ended, as_rank, free_port, program, together},
    run,
    workshop::Workshop,
};
use std::{collections::BTreeMap, fs, path::Path, process::Command};

fn fixture(name: &str) -> String {
    format!("{}/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// All end well, and only the first says something.
#[track_caller]
fn result(ended: Vec<Ended>) -> String {
    let mut first = String::new();
    for (rank, (code, stdout, stderr)) in ended.into_iter().enumerate() {
        assert_eq!(code, Some(0), "rank {rank}: {stderr}");
        match rank {
            0 => first = stdout,
            _ => assert!(stdout.is_empty() && stderr.is_empty(), "rank {rank}: {stdout}{stderr}"),
        }
    }
    first
}

/// All end with this code, and one of them says why, once.
#[track_caller]
fn refused(ended: &[Ended], code: i32, parts: &[&str]) {
    let said: String = ended.iter().map(|(_, _, stderr)| stderr.as_str()).collect();
    assert!(ended.iter().all(|(found, _, _)| *found == Some(code)), "{ended:?}");
    assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    assert_eq!(said.matches("error: ").count(), 1, "{said}");
}

fn nothing(_: usize, _: &mut Command) {}

fn bytes(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    entries(folder).into_iter().map(|name| (name.clone(), fs::read(folder.join(&name)).unwrap())).collect()
}

#[test]
fn a_merge_of_several_processes_writes_the_bytes_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let (base, adapter) = (fixture("tiny_llama"), fixture("tiny_adapter"));
    for more in [&["--max-shard-size", "20KB"][..], &["--dtype", "bf16", "--rounding", "stochastic", "--seed", "7"]] {
        let args = |name: &str| {
            let out = folder.path().join(name).display().to_string();
            let fixed = ["merge", "--base", &base, "--adapter", &adapter, "-o", &out, "--force", "--format", "json"];
            fixed.iter().chain(more).map(|s| (*s).to_owned()).collect::<Vec<String>>()
        };
        let (code, one, stderr) = run(args("one"));
        assert_eq!(code, 0, "{stderr}");
        for world_size in [2, 5] {
            let ended = together(world_size, &args("several"), nothing);
            // One file is not enough for all.
            let few = ended[0].2.contains("fewer than the");
            assert_eq!(few, more[0] == "--dtype", "{}", ended[0].2);
            let several = result(ended);
            assert_eq!(several.replace("/several", "/one"), one);
            assert!(bytes(&folder.path().join("several")) == bytes(&folder.path().join("one")));
            assert_eq!(entries(folder.path()), ["one", "several"]);
        }
    }
    // What is there is not replaced; nothing is left of the attempt.
    let out = folder.path().join("one").display().to_string();
    let ended = together(2, &["merge", "--base", &base, "--adapter", &adapter, "-o", &out], nothing);
    refused(&ended, 2, &["exists", "--force"]);
    assert_eq!(entries(folder.path()), ["one", "several"]);
    let other = folder.path().join("other").display().to_string();
    let plan = ["merge", "--base", &base, "--adapter", &adapter, "-o", &other, "--dry-run"];
    // The time that it will take depends on the threads.
    let files = |text: String| text.split("Files").next().unwrap().to_owned();
    assert_eq!(files(result(together(2, &plan, nothing))), files(run(plan).1));
}

#[test]
fn a_spectrum_of_several_processes_is_that_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let (base, tuned) = (fixture("tiny_llama"), folder.path().join("tuned").display().to_string());
    assert_eq!(run(["merge", "--base", &base, "--adapter", &fixture("tiny_adapter"), "-o", &tuned]).0, 0);
    let page = |name: &str| folder.path().join(name).display().to_string();
    let args = |name: &str, more: &[&str]| {
        let page = page(name);
        let fixed = ["spectrum", "--base", &base, "--tuned", &tuned, "--report", &page, "--rank", "2"];
        fixed.iter().chain(more).map(|s| (*s).to_owned()).collect::<Vec<String>>()
    };
    let gate = ["--require", "numerical_rank <= 24 for all", "--sigma", "--format"];
    for format in ["json", "table", "csv", "markdown"] {
        let more = [&gate[..], &[format]].concat();
        let (code, one, stderr) = run(args("one.html", &more));
        assert_eq!(code, 0, "{stderr}");
        for world_size in [2, 3] {
            assert!(result(together(world_size, &args("several.html", &more), nothing)) == one, "{format}");
            assert!(fs::read(page("one.html")).unwrap() == fs::read(page("several.html")).unwrap());
            fs::remove_file(page("several.html")).unwrap();
        }
        fs::remove_file(page("one.html")).unwrap();
    }
    // A gate that fails says no; one about nothing is refused before anything is measured.
    let ended = together(2, &args("no.html", &["--require", "numerical_rank > 1000"]), nothing);
    assert!(ended[0].0 == Some(1) && ended[1].0 == Some(0), "{ended:?}");
    let ended = together(2, &args("nothing.html", &["--require", "numerical_rank > 1 on *nowhere*"]), nothing);
    refused(&ended, 2, &["*nowhere*"]);
    // The jobs of an array do not wait for each other, whoever started them.
    let mut alone = program();
    as_rank(alone.args(["spectrum", "--base", &base, "--tuned", &tuned, "--shard", "1/2"]), 1, 2, free_port());
    assert_eq!(alone.output().unwrap().status.code(), Some(0));
}

#[test]
fn an_error_of_one_process_is_that_of_all() {
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (fixture("tiny_llama"), folder.path().join("out").display().to_string());
    let args = ["merge", "--base", &base, "-o", &out, "--max-shard-size", "20KB", "--adapter"];
    let ended = together(3, &args, |rank, command| {
        command.arg(if rank == 1 { fixture("nowhere") } else { fixture("tiny_adapter") });
    });
    refused(&ended, 2, &["rank 1 (", "nowhere"]);
    assert_eq!(entries(folder.path()).iter().filter(|name| *name == "out").count(), 0);
}

#[test]
fn processes_that_do_not_find_each_other_end_with_a_sentence() {
    let (base, adapter) = (fixture("tiny_llama"), fixture("tiny_adapter"));
    let args = ["merge", "--base", &base, "--adapter", &adapter, "-o", "/nowhere/out"];
    let alone = |rank| {
        let mut command = program();
        as_rank(command.args(args), rank, 3, free_port());
        let output = command.env("RELORA_KIT_JOIN_SECONDS", "1").output().unwrap();
        (output.status.code(), String::new(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    refused(&[alone(2)], 3, &["rank 2 cannot reach rank 0 at 127.0.0.1:", "within 1 s", "MASTER_ADDR"]);
    refused(&[alone(0)], 3, &["rank", "within 1 s"]);
    // An address of a documentation's network, which nobody answers; and no address at all.
    let elsewhere = |variables: &[(&str, &str)]| {
        let mut command = program();
        as_rank(command.args(args), 1, 2, free_port());
        command.env("RELORA_KIT_JOIN_SECONDS", "1").envs(variables.iter().copied());
        let output = command.output().unwrap();
        (output.status.code(), String::new(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    refused(&[elsewhere(&[("MASTER_ADDR", "192.0.2.1")])], 3, &["rank 1 cannot reach rank 0 at 192.0.2.1"]);
    refused(&[elsewhere(&[("MASTER_ADDR", "")])], 2, &["MASTER_ADDR is not set"]);
    refused(&[elsewhere(&[("WORLD_SIZE", "one")])], 2, &["WORLD_SIZE is 'one', expected a whole number"]);
    refused(&[elsewhere(&[("RANK", "2")])], 2, &["RANK is 2, expected a number below WORLD_SIZE"]);
}

#[test]
fn a_world_size_that_does_not_match_is_refused() {
    let (base, adapter) = (fixture("tiny_llama"), fixture("tiny_adapter"));
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").display().to_string();
    let args = ["merge", "--base", &base, "--adapter", &adapter, "-o", &out];
    let ended = together(2, &args, |rank, command| {
        if rank == 1 {
            command.env("WORLD_SIZE", "3");
        }
    });
    assert!(ended.iter().all(|(code, _, _)| *code == Some(2)), "{ended:?}");
    assert!(ended[0].2.contains("has another number of ranks than rank 0") && ended[0].2.contains("3 instead of 2"));
    assert!(entries(folder.path()).is_empty());
}

#[test]
#[cfg(not(feature = "mpi"))]
fn a_build_without_mpi_says_so() {
    let workshop = Workshop::new();
    let args = workshop.train_args("run", &[]);
    let ended = together(2, &args, nothing);
    refused(&ended, 2, &["train on CPUs through MPI, which this relora-kit was built without", "--features mpi"]);
    let mut command = program();
    command.args(&args).envs([("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")]);
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("mpirun started 2 processes") && stderr.contains("MASTER_ADDR is not set"), "{stderr}");
    assert!(!Path::new(&workshop.path("run")).exists());
}

/// On the GPUs of the emulator, through its NCCL.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod gpus {
    use super::*;
    use crate::common::{
        cuda_emulator::folder,
        workshop::{apart, trajectory},
    };
    use relora_kit::ops::FOLDERS_VARIABLE;
    use std::path::PathBuf;

    fn two_gpus(_: usize, command: &mut Command) {
        command.env(FOLDERS_VARIABLE, folder()).env("XDG_CACHE_HOME", folder()).env("CUDA_EMULATOR_DEVICES", "2");
    }

    const SHORT: [&str; 4] =
        ["train.num_training_steps=14", "warm_start.num_training_steps=4", "relora.relora=5", "train.save_every=6"];

    fn arguments(workshop: &Workshop, output: &str, set: &[&str]) -> Vec<String> {
        let mut args = workshop.train_args(output, &[&SHORT[..], set].concat());
        args.extend(["--device".into(), "cuda".into()]);
        args
    }

    #[test]
    fn two_gpus_train_what_one_trains_and_twice_the_same() {
        let workshop = Workshop::new();
        let runs = ["one", "a", "b", "zero"].map(|name| PathBuf::from(workshop.path(name)));
        result(together(1, &arguments(&workshop, "one", &[]), two_gpus));
        let shown = result(together(2, &arguments(&workshop, "a", &[]), two_gpus));
        assert!(shown.contains("processes") && shown.contains("final checkpoint"), "{shown}");
        result(together(2, &arguments(&workshop, "b", &[]), two_gpus));
        result(together(2, &arguments(&workshop, "zero", &["train.optimizer=adam_zero"]), two_gpus));
        let [one, a, b, zero] = runs.each_ref().map(|run| trajectory(run));
        assert!(a == b && a == zero);
        assert!(apart(&one, &a) < 1e-5, "{one:?} {a:?}");
        let weights = |run: &PathBuf| fs::read(run.join("checkpoints/step-14/model.safetensors")).unwrap();
        assert!(weights(&runs[1]) == weights(&runs[2]) && weights(&runs[1]) == weights(&runs[3]));
        // The CPU goes on where two GPUs were.
        let state = |run: &PathBuf| fs::read(run.join("checkpoints/step-14/training_state/state.safetensors")).unwrap();
        assert!(state(&runs[1]) == state(&runs[3]));
    }

    #[test]
    fn a_gpu_that_two_processes_take_is_warned_about_and_one_that_is_not_there_refused() {
        let workshop = Workshop::new();
        let one = |_: usize, command: &mut Command| two_gpus(0, command.env("CUDA_VISIBLE_DEVICES", "1"));
        let ended = together(2, &arguments(&workshop, "run", &[]), one);
        assert!(ended[0].2.contains("have the same GPU (0000:00:00.0)"), "{}", ended[0].2);
        let ended = together(3, &arguments(&workshop, "other", &[]), two_gpus);
        refused(&ended, 3, &["rank 2 (", "there are 2 GPUs, cuda:0 to cuda:1"]);
        assert!(!Path::new(&workshop.path("other")).exists());
        let mut args = workshop.train_args("cpu", &[]);
        args.extend(["--collective".into(), "nccl".into()]);
        refused(&together(2, &args, nothing), 2, &["--collective nccl sums on GPUs, but --device is cpu"]);
    }
}
