//! The noise edge of what people really bring: every rounding counts, and no gate holds on what was not measured.

use crate::common::{f32_bytes, refused, run, small_run::SmallRun, synthetic_run::noise, write_tensors};
use relora_kit::{
    adapter::{self, AdapterConfig, NewModule},
    checkpoint::{Dtype, dtype},
};
use serde_json::Value;
use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

const MODULE: &str = "model.layers.0.self_attn.q_proj";
const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const R: usize = 4;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Seeded values of a bell shape.
fn bell(seed: u64, n: usize) -> Vec<f32> {
    let parts: Vec<Vec<f32>> = (0..4).map(|i| noise(seed + 1000 * i, n)).collect();
    (0..n).map(|i| parts.iter().map(|p| p[i]).sum::<f32>() / 4.0).collect()
}

/// The update of rank [`R`] that all checkpoints here are tuned by, a tenth of the weights' size.
fn factors(m: usize, n: usize) -> (Vec<f32>, Vec<f32>) {
    (bell(7, m * R), bell(8, R * n).into_iter().map(|x| 0.05 * x).collect())
}

fn tuned(weight: &[f32], (m, n): (usize, usize)) -> Vec<f32> {
    let (b, a) = factors(m, n);
    let delta = |i: usize| (0..R).map(|k| b[i / n * R + k] * a[k * n + i % n]).sum::<f32>();
    weight.iter().enumerate().map(|(i, w)| w + delta(i)).collect()
}

fn bf16(values: &[f32]) -> Vec<f32> {
    let mut rounded = vec![0.0; values.len()];
    dtype::decode_f32(Dtype::BF16, &dtype::encode_f32(Dtype::BF16, values).unwrap(), &mut rounded).unwrap();
    rounded
}

fn write(path: &Path, dtype_name: &str, shape: (usize, usize), values: &[f32]) {
    let dtype = if dtype_name == "BF16" { Dtype::BF16 } else { Dtype::F32 };
    let bytes = dtype::encode_f32(dtype, values).unwrap().into_owned();
    write_tensors(path, &[(Q, dtype_name, &[shape.0, shape.1], bytes)]);
}

/// The result of `spectrum ARGS`, which must measure, whatever its gates say.
fn measured(args: &[&str]) -> (i32, Value) {
    let (code, stdout, stderr) = run(["spectrum"].into_iter().chain(args.iter().copied()).chain(["--format", "json"]));
    assert!(code < 2, "{stderr}");
    (code, serde_json::from_str(&stdout).unwrap())
}

fn rank(result: &Value) -> u64 {
    result["matrices"][0]["rank_above_noise"].as_u64().unwrap()
}

const GATE: [&str; 4] = ["--rank", "4", "--require", "rank_above_noise > 2*r for 90%"];

#[test]
fn merges_say_how_they_rounded_and_a_low_rank_update_stays_of_low_rank() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut edges = HashMap::new();
    // Above and below the size from which the Gram matrix is taken.
    for shape in [(300, 280), (96, 80)] {
        let base = at(&format!("base-{}", shape.0));
        fs::create_dir(&base).unwrap();
        fs::write(base.join("config.json"), "{\"model_type\":\"llama\"}").unwrap();
        write(&base.join("model.safetensors"), "BF16", shape, &bf16(&bell(1, shape.0 * shape.1)));
        let (b, a) = factors(shape.0, shape.1);
        let module = NewModule { name: MODULE, r: R, out_features: shape.0, in_features: shape.1, a: &a, b: &b };
        let lora = at(&format!("lora-{}", shape.0));
        fs::create_dir(&lora).unwrap();
        adapter::save(&lora, &AdapterConfig::new(R, R as f64, &["q_proj"]), &[module]).unwrap();
        let mut before = base.clone();
        for (name, rounding, kinds, count) in [
            ("nearest", "nearest", vec!["nearest"], 1),
            ("stochastic", "stochastic", vec!["stochastic"], 1),
            ("twice", "stochastic", vec!["stochastic"], 2),
        ] {
            let merged = at(&format!("{name}-{}", shape.0));
            let from = if name == "twice" { &before } else { &base };
            let args =
                ["merge", "--base", text(from), "--adapter", text(&lora), "--rounding", rounding, "-o", text(&merged)];
            assert_eq!(run(args).0, 0);
            for more in [&[][..], &["--dense"]] {
                let pair = ["--base", text(&base), "--tuned", text(&merged)];
                let (code, result) = measured(&[&pair[..], &GATE, more].concat());
                assert_eq!((code, rank(&result)), (1, 4), "{name} {shape:?} {more:?}");
                // Merged twice with one seed, both errors are drawn from the same numbers and add up: 4 as large a variance.
                let edge = result["matrices"][0]["noise_edge"].as_f64().unwrap();
                let once = *edges.entry((shape, kinds.join(""))).or_insert(edge);
                assert!(count == 1 || (1.8..2.2).contains(&(edge / once)), "{edge} {once}");
                let roundings = &result["sources"][0]["roundings"];
                assert_eq!(roundings["origin"], "metadata");
                assert_eq!((&roundings["count"], &roundings["kinds"]), (&count.into(), &serde_json::json!(kinds)));
                assert!(result["matrices"][0]["numerical_rank"].as_u64().unwrap() > 60);
            }
            before = merged;
        }
        // From the merge in between only one rounding remains.
        let merged = |name: &str| at(&format!("{name}-{}", shape.0));
        let (_, result) = measured(&["--base", text(&merged("stochastic")), "--tuned", text(&before)]);
        assert_eq!((&result["sources"][0]["roundings"]["count"], rank(&result)), (&1.into(), 4));
        // Another base is not what the metadata are about.
        let (_, result) = measured(&["--base", text(&merged("nearest")), "--tuned", text(&before)]);
        assert_eq!(result["sources"][0]["roundings"]["origin"], "assumed");
    }
}

#[test]
fn values_coarser_than_their_type_count_as_what_they_are_on_either_side() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for shape in [(300, 280), (96, 80), (280, 600)] {
        let exact = bell(1, shape.0 * shape.1);
        let rounded = bf16(&exact);
        let after = bf16(&tuned(&rounded, shape));
        write(&at("a_bf16"), "BF16", shape, &rounded);
        write(&at("b_bf16"), "BF16", shape, &after);
        write(&at("a_f32"), "F32", shape, &rounded);
        write(&at("b_f32"), "F32", shape, &after);
        write(&at("fine"), "F32", shape, &tuned(&exact, shape));
        let of = |base: &str, tuned: &str, more: &[&str]| {
            let (base, tuned) = (at(base), at(tuned));
            measured(&[&["--base", text(&base), "--tuned", text(&tuned), "--roundings", "1"][..], more].concat())
        };
        for more in [&[][..], &["--dense"]] {
            for (base, tuned) in
                [("a_bf16", "b_bf16"), ("a_f32", "b_f32"), ("a_bf16", "b_f32"), ("a_bf16", "fine"), ("a_f32", "fine")]
            {
                let (code, result) = of(base, tuned, &[more, &GATE].concat());
                assert_eq!((code, rank(&result)), (1, 4), "{base} {tuned} {shape:?} {more:?}");
            }
        }
        let edge = |base, tuned| of(base, tuned, &[]).1["matrices"][0]["noise_edge"].as_f64().unwrap();
        assert_eq!(edge("a_bf16", "b_bf16"), edge("a_f32", "b_f32"), "the same numbers, the same edge");
    }
}

#[test]
fn gates_on_the_edge_need_to_know_the_roundings() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let shape = (64, 48);
    let weight = bf16(&bell(1, 64 * 48));
    write(&at("a"), "BF16", shape, &weight);
    write(&at("b"), "BF16", shape, &bf16(&tuned(&weight, shape)));
    let pair = ["spectrum", "--base", text(&at("a")), "--tuned", text(&at("b"))].map(str::to_owned);
    let with = |more: &[&'static str]| pair.iter().map(String::as_str).chain(more.iter().copied()).collect::<Vec<_>>();
    for gate in ["rank_above_noise > 2", "noise_edge < 1 for any"] {
        refused(with(&["--require", gate]), 2, &["how often the weights of 'b' were rounded", "--roundings K"]);
    }
    // Nothing depends on them here.
    assert_eq!(run(with(&["--require", "effective_rank > 1"])).0, 0);
    let (_, stdout, _) = run(with(&[]));
    assert!(
        stdout.contains("noise edge of 'b': 1 rounding is assumed") && stdout.contains("--roundings K"),
        "{stdout}"
    );
    let (code, exact) = measured(&[&with(&["--roundings", "0", "--require", "rank_above_noise > 40"])[1..]].concat());
    assert_eq!((code, &exact["matrices"][0]["noise_edge"]), (0, &0.0.into()));
    let edge = |k| {
        let result = measured(&with(&["--roundings", k])[1..]).1;
        assert_eq!(result["sources"][0]["roundings"]["origin"], "option");
        result["matrices"][0]["noise_edge"].as_f64().unwrap()
    };
    assert!((edge("4") - 2.0 * edge("1")).abs() < 1e-12);
    // Parts know what they measured; the gate is judged when they are joined.
    for (i, more) in [(1, vec![]), (2, vec!["--roundings", "1"])] {
        let part = at(&format!("part-{i}.json"));
        assert_eq!(run(with(&[]).into_iter().chain(more).chain(["--part", "1/1", "-o", text(&part)])).0, 0);
        let joined = ["spectrum", "--join", text(&part), "--require", "rank_above_noise > 2"];
        if i == 1 {
            refused(joined, 2, &["--roundings K"]);
        } else {
            assert_eq!(run(joined).0, 0);
        }
    }
}

/// Two cycles of rank 4, in the storage that `set` chooses: whatever it rounds to, no projection has more than rank 8.
fn run_of(set: &[&str], kinds: &[&str]) {
    let small = SmallRun::new(2);
    let output = small.path("run");
    let config = small.path("run.toml");
    let args = ["train", "--config", text(&config), "-o", text(&output)];
    let (code, _, stderr) = run(args.into_iter().chain(set.iter().flat_map(|s| ["--set", s])));
    assert_eq!(code, 0, "{stderr}");
    let r = fs::read_to_string(&config).unwrap();
    let r: u64 = r.split("lora_r = ").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    let checkpoint = output.join("checkpoints/step-30");
    let base = output.join("base");
    let pair = ["--base", text(&base), "--tuned", text(&checkpoint), "--filter", "*proj*"];
    let gate = ["--rank", &r.to_string(), "--require", "rank_above_noise > 2*r for 10%"];
    let check = |args: &[&str], origin: &str| {
        let (code, result) = measured(&[args, &gate].concat());
        for matrix in result["matrices"].as_array().unwrap() {
            assert!(matrix["rank_above_noise"].as_u64().unwrap() <= 2 * r, "{set:?}: {matrix}");
        }
        assert_eq!(code, 1, "{set:?}");
        let roundings = &result["sources"][0]["roundings"];
        assert_eq!((&roundings["origin"], &roundings["kinds"]), (&origin.into(), &serde_json::json!(kinds)), "{set:?}");
        assert_eq!(roundings["count"], 2);
    };
    check(&pair, "metadata");
    check(&[&pair[..], &["--roundings", "2"]].concat(), "option");
    // The factors of the run, against what its merges can add.
    check(&["--run", text(&output)], "manifest");
    // A copy of the weights without the metadata still lies in the run.
    let model = checkpoint.join("model.safetensors");
    let mut bytes = fs::read(&model).unwrap();
    let key = bytes.windows(11).position(|w| w == b"\"roundings\"").unwrap();
    bytes[key + 1..key + 10].copy_from_slice(b"forgotten");
    fs::remove_file(&model).unwrap();
    fs::write(&model, bytes).unwrap();
    check(&pair, "manifest");
}

#[test]
fn a_run_in_bf16_rounds_stochastically() {
    run_of(&["train.dtype=bf16"], &["stochastic"]);
}

#[test]
fn a_run_in_nf4_rounds_to_the_levels_of_its_blocks() {
    run_of(&["relora.quantize=4bit"], &["nf4"]);
}

#[test]
fn a_run_in_int8_rounds_to_the_levels_of_its_rows() {
    run_of(&["relora.quantize=8bit"], &["int8"]);
}

/// FP8 projections that change by rank 2 beside an embedding that changes by noise.
fn fp8(folder: &Path) -> [PathBuf; 2] {
    let names = ["model.layers.0.self_attn.k_proj.weight", Q];
    [("base", 0.0f32), ("tuned", 0.01)].map(|(name, step)| {
        let path = folder.join(name);
        let embedding: Vec<f32> = bell(1, 100 * 64).iter().zip(bell(2, 100 * 64)).map(|(e, d)| e + step * d).collect();
        let codes =
            |seed: u64| -> Vec<u8> { noise(seed, 64 * 64).iter().map(|x| 0x20 + (x.abs() * 16.0) as u8).collect() };
        let seed = u64::from(step > 0.0);
        write_tensors(
            &path,
            &[
                ("model.embed_tokens.weight", "F32", &[100, 64], f32_bytes(&embedding)),
                (names[0], "F8_E4M3", &[64, 64], codes(10 + seed)),
                (names[1], "F8_E4M3", &[64, 64], codes(20 + seed)),
                ("ids", "I64", &[2, 2], vec![0; 32]),
            ],
        );
        path
    })
}

#[test]
fn a_gate_does_not_hold_on_less_than_it_names() {
    let folder = tempfile::tempdir().unwrap();
    let [base, tuned] = fp8(folder.path());
    let pair = ["spectrum", "--base", text(&base), "--tuned", text(&tuned), "--roundings", "1", "--rank", "2"];
    let with = |more: &[&'static str]| run(pair.into_iter().chain(more.iter().copied()));
    for gate in ["rank_above_noise > 4*r for 90%", "rank_above_noise > 4*r", "rank_above_noise > 4*r for median"] {
        let (code, stdout, stderr) = with(&["--require", gate]);
        assert_eq!(code, 1, "{stdout}{stderr}");
        for part in [
            "1 of 3 (2 not measured)",
            "2 weights were not measured",
            "k_proj",
            "verdict: 1 of 1 gate failed; 2 weights not measured",
        ] {
            assert!(stdout.contains(part), "expected '{part}' in {stdout}");
        }
        assert!(!stdout.contains("skipped 2 tensors: not floating point"), "{stdout}");
    }
    // On what was measured, on a third, on nothing measured.
    assert_eq!(with(&["--require", "rank_above_noise > 4*r on *embed*"]).0, 0);
    assert_eq!(with(&["--require", "rank_above_noise > 4*r for 33%"]).0, 0);
    assert_eq!(with(&["--require", "rank_above_noise > 4*r for any on *_proj*"]).0, 1);
    // Left out by the user.
    assert_eq!(with(&["--filter", "*embed*", "--require", "rank_above_noise > 4*r"]).0, 0);
    let page = folder.path().join("page.html");
    assert_eq!(run(pair.into_iter().chain(["--report", text(&page), "--require", "rank_above_noise > 8"])).0, 1);
    assert!(fs::read_to_string(&page).unwrap().contains("1 of 3 (2 not measured)"));
    let only = ["--filter", "*_proj*"];
    let message = refused(pair.into_iter().chain(only), 2, &["no matrix to measure", "F8_E4M3"]);
    assert!(!message.contains("no matrices"), "{message}");
}

#[test]
fn other_ways_to_leave_a_weight_out_satisfy_no_gate_either() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let w = |seed| f32_bytes(&bell(seed, 64 * 48));
    let experts = || f32_bytes(&bell(5, 2 * 8 * 8));
    let mut broken = bell(3, 64 * 48);
    broken[5] = f32::NAN;
    write_tensors(
        &at("a"),
        &[
            ("p.weight", "F32", &[64, 48], w(1)),
            ("e.experts", "F32", &[2, 8, 8], experts()),
            ("q.weight", "F32", &[64, 48], w(2)),
        ],
    );
    write_tensors(
        &at("b"),
        &[
            ("p.weight", "F32", &[64, 48], w(4)),
            ("e.experts", "F32", &[2, 8, 8], experts()),
            ("q.weight", "F32", &[64, 48], f32_bytes(&broken)),
        ],
    );
    write_tensors(&at("c"), &[("p.weight", "F32", &[64, 48], w(4)), ("norm", "F32", &[4], vec![0; 16])]);
    let args = |tuned: &str, more: &[&str]| {
        let pair =
            ["spectrum", "--base", text(&at("a")), "--tuned", text(&at(tuned)), "--skip-nonfinite", "--common-only"]
                .map(str::to_owned);
        pair.into_iter().chain(more.iter().map(|s| (*s).to_owned())).collect::<Vec<_>>()
    };
    let gate = |tuned: &str, gate: &str| run(args(tuned, &["--require", gate]));
    // NaN, one side only, a stack of experts: each is a weight that the gate names.
    assert_eq!(gate("b", "effective_rank > 2 on p*").0, 0);
    for (tuned, on) in [("b", "[pq]*"), ("b", "[pe]*"), ("c", "[pq]*")] {
        let (code, stdout, _) = gate(tuned, &format!("effective_rank > 2 on {on}"));
        assert!(code == 1 && stdout.contains("1 of 2 (1 not measured)"), "{tuned} {on}: {stdout}");
    }
    assert_eq!(gate("c", "effective_rank > 2 on [pn]*").0, 0, "a vector is no weight matrix");
    refused(args("b", &["--filter", "p*", "--filter", "typo*"]), 2, &["--filter 'typo*' matches no tensor"]);
    refused(args("b", &["--require", "effective_rank > 2 for 0%"]), 2, &["above 0%"]);
}
