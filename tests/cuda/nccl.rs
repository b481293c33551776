//! Sums over GPUs by NCCL, in processes of their own, on the CUDA emulator of CUDA's libraries.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use crate::common::cuda_emulator::{folder, open};
use relora_kit::{
    collective::{Alone, Collective, Job, Members, Nccl, OnEnding, Ranks},
    model::{LlamaConfig, LoraSpec, Model, Param, ParamKind},
    ops::{Cuda, Device},
};
use std::{
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

/// What a process started by a test has to do.
const PART: &str = "NCCL_TEST_PART";

/// Starts this test program once per rank, for [`one_process_of_several`].
fn start(part: &str, world_size: usize, environment: &[(&str, &str)]) -> Vec<Child> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    folder();
    let child = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["nccl::one_process_of_several", "--exact", "--nocapture"]).env(PART, part);
        command
            .envs([("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", rank)].map(|(k, v)| (k, v.to_string())));
        command.envs([("MASTER_ADDR", "127.0.0.1".to_owned()), ("MASTER_PORT", port.to_string())]);
        command.envs(environment.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    (0..world_size).map(child).collect()
}

fn end(children: Vec<Child>) -> Vec<(Option<i32>, String)> {
    let text = |o: Output| (o.status.code(), String::from_utf8_lossy(&[o.stdout, o.stderr].concat()).into_owned());
    children.into_iter().map(|c| text(c.wait_with_output().unwrap())).collect()
}

/// Values that differ from rank to rank, with sums that depend on their order.
fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 37 + rank * 101) % 1009) as f32 / 7.0 * [1.0, -1e4, 1e-3][(i + rank) % 3]).collect()
}

/// More than a piece of the emulator, a few, one, none.
const LENGTHS: [usize; 4] = [3 * 65536 + 11, 1003, 1, 0];

fn join(device: &Cuda) -> (Arc<Job>, impl Collective<Cuda>) {
    let on_ending: OnEnding = Arc::new(|ending| {
        println!("ended: {}", ending.error.message);
        std::process::exit(3);
    });
    let ranks = Ranks::from_env().unwrap().unwrap();
    let libraries = std::env::var_os("NCCL_TEST_FOLDER").map_or(folder().into(), PathBuf::from);
    let job = Arc::new(Job::join(ranks, Duration::from_secs(20), on_ending).unwrap());
    let nccl = Nccl::start(job.clone(), device, &[libraries]).unwrap_or_else(|e| {
        println!("failed: {} help: {}", e.message, e.help.clone().unwrap_or_default());
        std::process::exit(e.exit_code().into());
    });
    (job, nccl)
}

const WINDOWS: usize = 4;
const LEN: usize = 11;

/// Losses of some updates of a tiny model. Each process takes its share of the windows; gradients are on their way while the
/// backward goes on.
fn train(device: &Cuda, collective: &dyn Collective<Cuda>, low_rank: bool) -> Vec<f64> {
    let config = LlamaConfig::from_value(&serde_json::json!({"model_type": "llama", "hidden_size": 24,
        "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "vocab_size": 37, "tie_word_embeddings": false, "initializer_range": 0.3}));
    let mut model = Model::init(device.clone(), config.unwrap(), 3).unwrap();
    if low_rank {
        model.add_lora(LoraSpec::new(4, 8.0));
        model.set_trainable(|kind| *kind != ParamKind::Linear);
        model.reset_lora(5);
    }
    let share = WINDOWS / collective.world_size();
    let mut losses = Vec::new();
    for step in 0..6u32 {
        let first = collective.rank() * share * LEN;
        let tokens: Vec<u32> =
            (first..first + share * LEN).map(|i| (i as u32 * (i as u32 + step) * 31 + 7 * step) % 37).collect();
        let mut pending = Vec::new();
        let mut ready = |device: &Cuda, params: &mut [Param<Cuda>], places: &[usize]| {
            let places: Vec<usize> = places.iter().copied().filter(|&i| params[i].grad.is_some()).collect();
            let gradients = places.iter().filter_map(|&i| params[i].grad.take()).collect();
            pending.push((places, collective.begin_all_reduce(device, gradients)));
        };
        let scale = 1.0 / collective.world_size() as f32;
        let mut stats = model.device().step_stats();
        model.forward_backward_then(&tokens, share, LEN, scale, &mut stats, &mut ready).unwrap();
        for (places, sum) in pending {
            for (i, gradient) in places.into_iter().zip(sum(model.device()).unwrap()) {
                model.params_mut()[i].grad = Some(gradient);
            }
        }
        let (device, params) = model.device_and_params_mut();
        for param in params.iter_mut() {
            if let Some(gradient) = &param.grad {
                device.axpy(-0.3, gradient, &mut param.value);
            }
        }
        model.zero_grad();
        model.device().status().unwrap();
        let all = collective.gather(&model.device().read_step_stats(&stats).unwrap().loss.to_le_bytes()).unwrap();
        losses.push(all.iter().map(|bytes| f64::from_le_bytes(bytes[..].try_into().unwrap())).sum());
    }
    losses
}

/// What each process does; nothing, where the tests are run.
#[test]
fn one_process_of_several() {
    let Ok(part) = std::env::var(PART) else { return };
    let device = open();
    let (job, nccl) = join(&device);
    let (rank, world_size) = (nccl.rank(), nccl.world_size());
    if let Some(mode) = part.strip_prefix("train ") {
        println!("trajectory {:?}", train(&device, &nccl, mode == "low-rank"));
        return job.finish().unwrap();
    }
    let all = nccl.gather(format!("I am {rank}").as_bytes()).unwrap();
    assert_eq!(all, (0..world_size).map(|r| format!("I am {r}").into_bytes()).collect::<Vec<_>>());
    assert!(nccl.is_leader() == (rank == 0) && nccl.name(1).starts_with("rank 1 ("));
    for round in 0..3 {
        let mine = |len: usize| values(rank + 10 * round, len);
        // Made on the GPU just before: the sum has to wait for it.
        let buffers: Vec<_> = LENGTHS
            .iter()
            .map(|&len| {
                let mut buffer = device.upload(&vec![0.0; len]);
                device.axpy(1.0, &device.upload(&mine(len)), &mut buffer);
                buffer
            })
            .collect();
        let pending = nccl.begin_all_reduce(&device, buffers);
        // The kernels go on meanwhile, with memory of their own.
        let (x, mut y) = (device.upload(&[2.0; 5000]), device.upload(&[1.0; 5000]));
        device.axpy(0.5, &x, &mut y);
        if part == "killed" && round == 1 && rank == 1 {
            std::process::abort();
        }
        let sums = pending(&device).unwrap();
        if let Err(e) = device.status() {
            println!("failed: {} help: {}", e.message, e.help.unwrap_or_default());
            std::process::exit(3);
        }
        for (sum, len) in sums.iter().zip(LENGTHS) {
            let mut expected = values(10 * round, len);
            for other in 1..world_size {
                expected.iter_mut().zip(values(other + 10 * round, len)).for_each(|(sum, x)| *sum += x);
            }
            assert!(device.read(sum) == expected, "rank {rank}, {len} elements");
        }
        assert_eq!(device.read(&y), [2.0; 5000]);
        let mut buffer = device.upload(&values(rank, 70000));
        nccl.broadcast(&device, 1, &mut buffer).unwrap();
        assert!(device.read(&buffer) == values(1, 70000), "rank {rank}");
    }
    device.status().unwrap();
    job.finish().unwrap();
    println!("rank {rank} is done");
}

#[test]
fn sums_over_gpus_have_the_same_bits_everywhere() {
    for world_size in [2, 3] {
        for (rank, (code, text)) in end(start("sums", world_size, &[])).into_iter().enumerate() {
            assert!(code == Some(0) && text.contains(&format!("rank {rank} is done")), "{text}");
        }
    }
}

#[test]
fn two_gpus_train_as_one_does() {
    for mode in ["full", "low-rank"] {
        let expected = train(&open(), &Alone, mode == "low-rank");
        let ended = end(start(&format!("train {mode}"), 2, &[]));
        let again = end(start(&format!("train {mode}"), 2, &[]));
        let trajectory = |(code, text): &(Option<i32>, String)| -> Vec<f64> {
            assert!(*code == Some(0), "{text}");
            let line = text.lines().find_map(|l| l.split_once("trajectory ")).unwrap_or_else(|| panic!("{text}")).1;
            serde_json::from_str(line).unwrap()
        };
        let found = trajectory(&ended[0]);
        assert!(found.len() == expected.len() && expected[5] < expected[0], "{found:?} {expected:?}");
        for (f, e) in found.iter().zip(&expected) {
            assert!((f / e - 1.0).abs() < 1e-5, "{mode}: {found:?} instead of {expected:?}");
        }
        // The same on both, and in another run.
        assert!(ended.iter().chain(&again).all(|e| trajectory(e) == found), "{mode}");
    }
}

#[test]
fn a_process_that_dies_ends_the_others_while_they_wait_for_its_sum() {
    let began = Instant::now();
    let ended = end(start("killed", 2, &[]));
    assert!(ended[0].0 == Some(3) && ended[0].1.contains("ended: rank 1 ("), "{:?}", ended[0]);
    assert!(ended[1].0 != Some(0) && began.elapsed() < Duration::from_secs(20), "{:?}", ended[1]);
}

#[test]
fn a_network_that_fails_is_a_sentence() {
    let ended = end(start("sums", 2, &[("CUDA_EMULATOR_NCCL_FAIL_AFTER", "4")]));
    assert!(ended.iter().all(|(code, _)| *code == Some(3)), "{ended:?}");
    // The slower one may hear first that the other is gone.
    let parts = ["device 'cuda:0' (CUDA emulator): ncclAllReduce failed: remote process exited", "--resume"];
    assert!(ended.iter().any(|(_, text)| parts.iter().all(|part| text.contains(part))), "{ended:?}");
}

#[test]
fn without_the_library_there_is_a_sentence() {
    // SAFETY: loading NVIDIA's library has no other effect.
    if unsafe { libloading::Library::new("libnccl.so.2") }.is_ok() {
        println!("skipped: this machine has libnccl.so.2");
        return;
    }
    for (code, text) in end(start("sums", 2, &[("NCCL_TEST_FOLDER", "/nowhere")])) {
        let parts =
            ["libnccl.so.2 was not found (looked in '/nowhere', LD_LIBRARY_PATH", "pip install nvidia-nccl-cu12"];
        assert!(code == Some(3) && parts.iter().all(|part| text.contains(part)), "{text}");
    }
}
