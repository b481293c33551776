//! Schedules and training trajectories against PyTorch in f64.

use crate::common;
use crate::common::cuda_emulator::on_both_devices;
use crate::common::fixtures::{assert_close, fixture, json, text, values};
use relora_kit::{
    checkpoint::{Checkpoint, TensorFile},
    model::{Model, ParamKind},
    ops::Device,
    train::{
        config::Config,
        schedule::{Schedule, Scheduler},
        tokens::TokenShard,
        trainer::Trainer,
    },
};
use serde_json::Value;

#[test]
fn schedules_match_the_formulas() {
    for table in json("schedules/schedules.json").as_array().unwrap() {
        let number = |key: &str| table[key].as_u64().unwrap_or(0);
        let schedule = Schedule {
            scheduler: scheduler(table),
            num_training_steps: number("num_training_steps"),
            warmup_steps: number("warmup_steps"),
            restart_warmup_steps: number("restart_warmup_steps"),
            cycle_length: number("cycle_length"),
            adjust_step: number("adjust_step"),
            min_lr_ratio: table["min_lr_ratio"].as_f64().unwrap(),
        };
        schedule.check().unwrap();
        let expected: Vec<f64> = serde_json::from_value(table["multipliers"].clone()).unwrap();
        let found: Vec<f64> = (0..expected.len() as u64).map(|s| schedule.multiplier(s)).collect();
        let name = format!("{schedule:?}");
        assert_close(&name, &[expected.len()], &found, &expected, |_| 1e-12);
    }
}

fn scheduler(settings: &Value) -> Scheduler {
    serde_json::from_value(settings["scheduler"].clone()).unwrap()
}

on_both_devices! {
    fn full_rank_training_follows_pytorch(device) {
        let trajectory = json("full/trajectory.json");
        let config = config(&trajectory, "full", "");
        let trainer = replay(device, config, &trajectory, |_, _| ());
        final_weights_match(&trainer, &trajectory);
    }
}

on_both_devices! {
    fn three_relora_cycles_follow_pytorch(device) {
        let trajectory = json("relora/trajectory.json");
        let config = config(&trajectory, "relora", "[relora]\nlora_r = 4\nlora_alpha = 8\nrelora = 8\n");
        let mut trainer = replay(device, config, &trajectory, |trainer, cycle| {
            let initial = TensorFile::open(&fixture(&format!("relora/initial_a_{cycle}.safetensors"))).unwrap();
            let (device, params) = trainer.model.device_and_params_mut();
            for param in params.iter_mut().filter(|p| p.kind == ParamKind::LoraA) {
                device.write(&mut param.value, &initial.tensor_named(&param.name).unwrap().to_f32().unwrap());
            }
        });
        assert_eq!(trainer.cycle, 3);
        trainer.finish_cycles();
        final_weights_match(&trainer, &trajectory);

        // And every weight against the f32 run: 2e-5 is one part in 5000 of what training moved.
        let expected = Checkpoint::open(&fixture("relora")).unwrap();
        for param in trainer.model.params() {
            let found: Vec<f64> = trainer.model.device().read(&param.value).into_iter().map(f64::from).collect();
            assert_close(&param.name, &param.shape, &found, &values(&expected, &param.name), |_| 2e-5);
        }
    }
}

/// The configuration of a trajectory; batches come in the order of the text.
fn config(trajectory: &Value, mode: &str, more: &str) -> Config {
    let schedule = &trajectory["schedule"];
    let text = format!(
        "[model]\ncheckpoint = {:?}\n[data]\ntrain = \"replaced\"\nmax_length = {}\nshuffle = false\n\
         [train]\nmode = \"{mode}\"\nbatch_size = {}\nlr = {}\nweight_decay = {}\nclip_grad_norm = {}\n{}{more}",
        fixture("tiny_llama"),
        trajectory["window"],
        trajectory["windows_per_batch"],
        trajectory["lr"],
        trajectory["weight_decay"],
        trajectory["clip_grad_norm"],
        schedule.as_object().unwrap().iter().map(|(key, value)| format!("{key} = {value}\n")).collect::<String>(),
    );
    let config: Config = toml::from_str(&text).unwrap();
    config.check().unwrap();
    config
}

/// Runs all updates; `begin(trainer, cycle)` is called as a cycle starts. Rate, loss and gradient norm must agree.
fn replay<D: Device>(
    device: D,
    config: Config,
    trajectory: &Value,
    begin: impl Fn(&mut Trainer<D>, u64),
) -> Trainer<D> {
    let dir = tempfile::tempdir().unwrap();
    let shard = shard(dir.path(), trajectory["first_batch"].as_u64().unwrap() as usize * 4 * 48);
    let model = Model::load(device, &Checkpoint::open(&fixture("tiny_llama")).unwrap()).unwrap();
    let mut trainer = Trainer::new(config, model, shard).unwrap();
    for expected in trajectory["updates"].as_array().unwrap() {
        if trainer.cycles_start_here() {
            trainer.start_cycles().unwrap();
            begin(&mut trainer, 1);
        }
        let update = trainer.update().unwrap();
        // f32 instead of f64 alone moves loss and norm by 4e-7 (`f32_against_f64`); the rest is room for the order of sums.
        for (what, found, relative) in
            [("lr", update.lr, 1e-12), ("loss", update.loss, 1e-5), ("grad_norm", update.grad_norm, 1e-4)]
        {
            let expected_value = expected[what].as_f64().unwrap();
            let name = format!("update {}: {what}", expected["step"]);
            assert_close(&name, &[1], &[found], &[expected_value], |_| relative * expected_value);
        }
        if trainer.restart_is_due() {
            trainer.restart();
            let cycle = trainer.cycle;
            begin(&mut trainer, cycle);
        }
    }
    assert!(trainer.is_finished());
    trainer
}

/// A token shard of the licence text from byte `first` on.
fn shard(dir: &std::path::Path, first: usize) -> TokenShard {
    let path = dir.join("tokens.safetensors");
    let tokens: Vec<u8> = text()[first..].iter().flat_map(|&byte| u16::from(byte).to_le_bytes()).collect();
    let header = format!(
        r#"{{"__metadata__":{{"tokenizer":"bytes","vocab_size":"128"}},"tokens":{{"dtype":"U16","shape":[{}],"data_offsets":[0,{}]}}}}"#,
        tokens.len() / 2,
        tokens.len()
    );
    common::write_raw(&path, &header, &tokens);
    TokenShard::open(&path).unwrap()
}

/// Sums over the final weights, the second one weighted by position, within 2e-6 per element of the f64 run.
fn final_weights_match<D: Device>(trainer: &Trainer<D>, trajectory: &Value) {
    let expected = trajectory["final_weights"].as_object().unwrap();
    assert_eq!(trainer.model.params().len(), expected.len(), "number of weights");
    for param in trainer.model.params() {
        let values: Vec<f64> = trainer.model.device().read(&param.value).into_iter().map(f64::from).collect();
        let sum: f64 = values.iter().sum();
        let cosine_sum: f64 = values.iter().enumerate().map(|(i, v)| v * (i as f64).cos()).sum();
        let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
        let expected = ["sum", "cosine_sum", "norm"].map(|key| expected[&param.name][key].as_f64().unwrap());
        let name = format!("{}: sum, cosine sum and norm", param.name);
        let allowed = 2e-6 * values.len() as f64;
        assert_close(&name, &[3], &[sum, cosine_sum, norm], &expected, |_| allowed);
    }
}
