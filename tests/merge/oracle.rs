//! Merges compared with PEFT's own, tensor by tensor, and both with a merge in f64.
//!
//! Ours equal PEFT's within 4 units in the last place of the larger of base and delta in f32, and within one of the stored
//! type in f16 and bf16. Where PEFT rounds more often and is itself further from the exact sum, ours are that close to it
//! instead. In no case are they less accurate than PEFT's.

use crate::common;
use relora_kit::{
    checkpoint::{Checkpoint, Dtype, TensorSpec, Writer, dtype},
    merge::{self, MAX_SHARD_SIZE, Options, Rounding},
    progress::Progress,
};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

fn merged(base: &Path, adapters: &[(PathBuf, f64)]) -> (tempfile::TempDir, Checkpoint) {
    merged_as(base, adapters, None)
}

fn merged_as(base: &Path, adapters: &[(PathBuf, f64)], dtype: Option<Dtype>) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        base: base.to_owned(),
        adapters: adapters.to_vec(),
        output: dir.path().join("out"),
        dtype,
        map: Vec::new(),
        rounding: Rounding::Nearest,
        max_shard_size: MAX_SHARD_SIZE,
        force: false,
        dry_run: false,
        gpu: None,
    };
    merge::run(&options, &Progress::hidden()).unwrap_or_else(|e| panic!("{}: {e}", base.display()));
    let model = Checkpoint::open(&options.output).unwrap();
    (dir, model)
}

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f64> {
    let tensor = checkpoint.tensor(name).unwrap();
    let mut values = vec![0.0; tensor.elements()];
    tensor.read_f64(0, &mut values).unwrap();
    values
}

/// Units in the last place that are allowed.
fn units(dtype: Dtype) -> f64 {
    if dtype == Dtype::F32 { 4.0 } else { 1.0 }
}

/// Compares every tensor with PEFT's file, element by element.
fn compare(case: &str, base: &Checkpoint, ours: &Checkpoint, theirs: &Checkpoint) {
    for tensor in theirs.tensors() {
        let name = tensor.name();
        let (mine, theirs) = (values(ours, name), values(theirs, name));
        let before = base.get(name).map_or_else(|| theirs.clone(), |_| values(base, name));
        for (i, ((x, y), w)) in mine.iter().zip(&theirs).zip(&before).enumerate() {
            let scale = w.abs().max((y - w).abs()).max(y.abs());
            let limit = units(tensor.dtype()) * dtype::ulp(tensor.dtype(), scale);
            assert!((x - y).abs() <= limit, "{case}: '{name}' at {i}: {x}, PEFT has {y}, limit {limit:e}");
        }
    }
}

/// Same names, types and shapes.
fn compare_headers(case: &str, ours: &Checkpoint, theirs: &Checkpoint) {
    let names = |c: &Checkpoint| c.tensors().map(|t| t.name().to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(names(ours), names(theirs), "{case}");
    for tensor in theirs.tensors() {
        let mine = ours.tensor(tensor.name()).unwrap();
        assert_eq!((mine.dtype(), mine.shape()), (tensor.dtype(), tensor.shape()), "{case}: {}", tensor.name());
    }
}

/// Distances of one tensor from the merge in f64.
struct Errors {
    max: f64,
    squares: f64,
}

impl Errors {
    fn of(found: &[f64], exact: &[f64]) -> Errors {
        let errors = || found.iter().zip(exact).map(|(x, y)| (x - y).abs());
        Errors { max: errors().fold(0.0, f64::max), squares: errors().map(|e| e * e).sum() }
    }
}

/// Compares both with the same merge in f64: ours is nowhere less accurate. `near`: ours is within the limit of the exact
/// sum, in units of the tensor's largest value, and PEFT's is beyond that limit or further away than ours.
fn compare_errors(
    case: &str,
    exact: &Checkpoint,
    ours: &Checkpoint,
    theirs: &Checkpoint,
    expected: &Value,
    near: bool,
) {
    let (mut largest_of_ours, mut largest_of_theirs) = (0f64, 0f64);
    for tensor in theirs.tensors() {
        let name = tensor.name();
        let sum = values(exact, name);
        let (mine, peft) = (Errors::of(&values(ours, name), &sum), Errors::of(&values(theirs, name), &sum));
        (largest_of_ours, largest_of_theirs) = (largest_of_ours.max(mine.max), largest_of_theirs.max(peft.max));
        let more = (mine.squares / peft.squares.max(f64::MIN_POSITIVE)).sqrt();
        assert!(mine.squares <= peft.squares * (1.0 + 1e-9), "{case}: error of '{name}' is {more} times PEFT's");
        if near {
            let scale = sum.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
            let limit = units(tensor.dtype()) * dtype::ulp(tensor.dtype(), scale);
            assert!(mine.max <= limit, "{case}: '{name}' is {:e} from the exact sum, limit {limit:e}", mine.max);
        }
        // The reference has compared PEFT's with an f64 merge of its own: ours in f64 is the same.
        if let Some(error) = expected["tensors"][name]["max_abs_err_vs_float64_merge"].as_f64() {
            assert!(
                (peft.max - error).abs() <= 1e-12 + 1e-6 * error,
                "{case}: '{name}': {:e}, not {error:e}",
                peft.max
            );
        }
    }
    assert!(largest_of_ours <= largest_of_theirs, "{case}: {largest_of_ours:e}, PEFT's {largest_of_theirs:e}");
    assert!(!near || largest_of_ours < largest_of_theirs, "{case}: PEFT's is as near, compare with it");
}

/// Merges a case of `merge_tiny` and compares it with `merged/`.
fn tiny(case: &str, adapters: &[(&str, f64)], near: bool) {
    let Some(oracles) = common::oracles() else { return };
    let folder = oracles.join("merge_tiny").join(case);
    let expected: Value = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let base = folder.join(expected["base"].as_str().unwrap());
    // What PEFT's own f64 merge is known of is the merge of the adapter of this name.
    let known = if adapters == ONE { &expected } else { &Value::Null };
    let adapters: Vec<_> = adapters.iter().map(|(name, weight)| (folder.join(name), *weight)).collect();
    let (dir, ours) = merged(&base, &adapters);
    let theirs = Checkpoint::open(&folder.join("merged")).unwrap();
    compare_headers(case, &ours, &theirs);
    if !near {
        compare(case, &Checkpoint::open(&base).unwrap(), &ours, &theirs);
    }
    let (double, _) = merged_as(&base, &[], Some(Dtype::F64));
    let adapters: Vec<_> = adapters.iter().map(|(path, weight)| (in_f64(path, double.path()), *weight)).collect();
    let (_dir, exact) = merged(&double.path().join("out"), &adapters);
    compare_errors(case, &exact, &ours, &theirs, known, near);
    let config = fs::read(dir.path().join("out/config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let tied = expected["merged_config_tie_word_embeddings"].as_bool().unwrap();
    let default = !theirs.tensors().any(|t| t.name() == "lm_head.weight");
    assert_eq!(config["tie_word_embeddings"].as_bool().unwrap_or(default), tied, "{case}: tie_word_embeddings");
}

/// A copy in `folder` of an adapter, its tensors in f64.
fn in_f64(adapter: &Path, folder: &Path) -> PathBuf {
    let copy = folder.join(adapter.file_name().unwrap());
    fs::create_dir(&copy).unwrap();
    fs::copy(adapter.join("adapter_config.json"), copy.join("adapter_config.json")).unwrap();
    let tensors = Checkpoint::open(&adapter.join("adapter_model.safetensors")).unwrap();
    let double = |t| TensorSpec { dtype: Dtype::F64, ..TensorSpec::like(&t) };
    let specs: Vec<_> = tensors.tensors().map(double).collect();
    let writer = Writer::create_file(&copy.join("adapter_model.safetensors"), &specs, &BTreeMap::new()).unwrap();
    for spec in &specs {
        let bytes: Vec<u8> = values(&tensors, &spec.name).iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.write(&spec.name, 0, &bytes).unwrap();
    }
    writer.finish().unwrap();
    copy
}

const ONE: &[(&str, f64)] = &[("adapter", 1.0)];

macro_rules! tiny_cases {
    ($($test:ident: $case:literal $(, $adapters:expr)? $(=> $near:ident)?;)*) => {
        $(#[test]
        fn $test() {
            #[allow(unused_mut, unused_assignments)]
            let (mut adapters, mut near) = (ONE, false);
            $(adapters = $adapters;)?
            $(near = stringify!($near) == "near_the_exact_sum";)?
            tiny($case, adapters, near);
        })*

        #[test]
        fn every_case_has_a_test() {
            let Some(oracles) = common::oracles() else { return };
            let tested = BTreeSet::from([$($case),*]);
            let mut cases = common::entries(&oracles.join("merge_tiny"));
            cases.retain(|name| oracles.join("merge_tiny").join(name).join("expected.json").exists());
            cases.retain(|name| !["05_embed_tied", "05_embed_lmhead_tied"].contains(&name.as_str()));
            assert_eq!(cases, tested.into_iter().collect::<Vec<_>>());
            assert_eq!(common::entries(&oracles.join("merge_real")).into_iter().filter(|n| n != "README.md").collect::<Vec<_>>(), REAL);
        }
    };
}

tiny_cases! {
    plain: "01_plain";
    plain_tied: "01_plain_tied";
    rslora: "02_rslora";
    patterns: "03_patterns";
    dora: "04_dora";
    // The norms run over columns here, and PEFT sums their squares one by one in f32; ours are summed in f64.
    dora_conv1d: "04_dora_conv1d" => near_the_exact_sum;
    dora_embedding: "04_dora_embed" => near_the_exact_sum;
    embedding: "05_embed";
    embedding_saved_without_its_base: "05_embed_nobase";
    embedding_with_another_base: "05_embed_other_base";
    // Not 05_embed_tied and 05_embed_lmhead_tied: PEFT adds to the shared matrix what training added to one side of it.
    modules_to_save: "06_modules_to_save";
    modules_to_save_bf16: "06_modules_to_save_bf16";
    modules_to_save_of_a_tied_model: "06_modules_to_save_tied";
    all_biases: "07_bias_all";
    biases_of_the_targets: "07_bias_lora_only";
    bias_of_b: "08_lora_bias";
    conv1d: "09_conv1d";
    dora_bf16: "10_dora_bf16";
    // PEFT rounds the delta of an embedding to the base's type before it adds, and then the sum.
    embedding_bf16: "10_embed_bf16" => near_the_exact_sum;
    expert_parameters: "12_moe_target_parameters";
    trainable_tokens: "13_trainable_tokens";
    bf16_base: "10_bf16_base";
    bf16_both: "10_bf16_both";
    f16_base: "10_f16_base";
    f32_base_bf16_adapter: "10_f32_base_bf16_adapter";
    weighted_linear_combined: "11a_weighted_linear";
    weighted_cat_combined: "11b_weighted_cat";
    // PEFT rounds `weight * scale * A` before it multiplies, and the two deltas partly cancel.
    weighted_cat: "11b_weighted_cat", &[("adapter_a", 0.7), ("adapter_b", -0.5)] => near_the_exact_sum;
    weighted_svd_combined: "11c_weighted_svd";
    two_adapters: "11d_two_active", &[("adapter_a", 1.0), ("adapter_b", 1.0)];
    layers_to_transform: "14_layers_to_transform";
    regex_targets: "15_regex_targets";
}

/// SplitMix64 over the hash of the name, as the reference's README defines it.
fn base_values(name: &str, count: usize, seed: u64) -> Vec<f32> {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let state = hash ^ seed.wrapping_mul(GOLDEN);
    (1..=count as u64)
        .map(|i| {
            let mut z = state.wrapping_add(i.wrapping_mul(GOLDEN));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            ((z >> 40) as f64 - 8_388_608.0) as f32 / 8_388_608.0
        })
        .collect()
}

#[test]
fn the_recipe_of_the_bases_gives_the_values_of_its_readme() {
    let expected: [f64; 4] = [0.34664249420166016, 0.962457537651062, -0.10923564434051514, 0.26694929599761963];
    let found: Vec<f64> = base_values("model.norm.weight", 4, 77).into_iter().map(f64::from).collect();
    assert_eq!(found, expected);
}

/// Builds the base that `spec` describes in `folder`.
fn build_base(spec: &Value, folder: &Path) {
    let stored = dtype::parse_float(spec["dtype"].as_str().unwrap()).unwrap();
    let seed = spec["seed"].as_u64().unwrap();
    let mut specs = Vec::new();
    for tensors in spec["shards"].as_object().unwrap().values() {
        for entry in tensors.as_array().unwrap() {
            let shape = entry[1].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
            specs.push(TensorSpec { name: entry[0].as_str().unwrap().into(), dtype: stored, shape });
        }
    }
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), serde_json::to_vec(&spec["config"]).unwrap()).unwrap();
    let writer = Writer::create(folder, &specs, u64::MAX, &BTreeMap::new()).unwrap();
    for spec in &specs {
        let norm = spec.shape.len() == 1 && spec.name.ends_with(".weight");
        let value = |x: f32| if norm { 1.0 + f64::from(x) / 8.0 } else { f64::from(x) / 16.0 };
        let count = spec.shape.iter().product();
        let values: Vec<f32> = base_values(&spec.name, count, seed).into_iter().map(|x| value(x) as f32).collect();
        writer.write_f32(&spec.name, stored, &values).unwrap();
    }
    writer.finish().unwrap();
}

/// Compares with the fingerprints of `expected`: the flat dot product, the norm, the first and last values.
fn compare_fingerprints(case: &str, ours: &Checkpoint, expected: &Value) {
    for (name, print) in expected["tensors"].as_object().unwrap() {
        let Some(tensor) = ours.get(name) else {
            let aliased = print["in_file"].as_bool() == Some(false)
                || expected["state_dict_aliases"].to_string().contains(&format!("\"{name}\""));
            assert!(aliased, "{case}: '{name}' is missing");
            continue;
        };
        let values = values(ours, name);
        let l2 = values.iter().map(|x| x * x).sum::<f64>().sqrt();
        let u = |i: usize| f64::from((i as u32).wrapping_mul(2_654_435_761)) / 4_294_967_296.0 - 0.5;
        let dot: f64 = values.iter().enumerate().map(|(i, x)| x * u(i)).sum();
        // Every element may be off by the units allowed; the errors add up like a random walk, with room.
        let units = if tensor.dtype() == Dtype::F32 { 4.0 } else { 1.0 };
        let unit = units * dtype::ulp(tensor.dtype(), l2 / (values.len() as f64).sqrt());
        let limit = 4.0 * unit * (values.len() as f64).sqrt();
        for (what, found) in [("l2", l2), ("dot", dot)] {
            let expected = print[what].as_f64().unwrap();
            assert!((found - expected).abs() <= limit, "{case}: {what} of '{name}' is {found}, expected {expected}");
        }
        let ends = values.len().min(8);
        for (what, found) in [("first8", &values[..ends]), ("last8", &values[values.len() - ends..])] {
            for (x, y) in found.iter().zip(print[what].as_array().unwrap()) {
                let y = y.as_f64().unwrap();
                let limit = units * dtype::ulp(tensor.dtype(), x.abs().max(y.abs()).max(1.0 / 16.0));
                assert!((x - y).abs() <= limit, "{case}: {what} of '{name}': {x}, expected {y}");
            }
        }
    }
}

#[test]
fn real_adapters_on_shortened_models() {
    let Some(oracles) = common::oracles() else { return };
    for case in REAL {
        for kind in ["f32", "bf16"] {
            let folder = oracles.join("merge_real").join(case).join("mini");
            let base = folder.join(format!("base_{kind}"));
            let (_dir, ours) = merged(&base, &[(folder.join("adapter"), 1.0)]);
            // With `safe_merge` PEFT rounds the delta to bf16 before it adds: never the nearer one.
            for merge in [format!("merged_{kind}"), format!("merged_{kind}_safe")] {
                let Some(theirs) = Some(folder.join(&merge)).filter(|path| path.exists()) else { continue };
                let theirs = Checkpoint::open(&theirs).unwrap();
                compare_headers(&merge, &ours, &theirs);
                compare(&format!("{case} {merge}"), &Checkpoint::open(&base).unwrap(), &ours, &theirs);
            }
        }
    }
}

#[test]
fn real_adapters_on_two_layers() {
    let Some(oracles) = common::oracles() else { return };
    for case in REAL {
        for kind in ["f32", "bf16"] {
            let folder = oracles.join("merge_real").join(case).join("trunc2");
            let read = |name: String| serde_json::from_slice::<Value>(&fs::read(folder.join(name)).unwrap()).unwrap();
            let base = tempfile::tempdir().unwrap();
            build_base(&read(format!("base_spec_{kind}.json")), base.path());
            let (_dir, ours) = merged(base.path(), &[(folder.join("adapter"), 1.0)]);
            compare_fingerprints(case, &ours, &read(format!("expected_{kind}.json")));
        }
    }
}

const REAL: [&str; 3] = ["bert_hareshjethani", "gpt2_anirudh_ak", "opt_guilhermmeabreu"];
