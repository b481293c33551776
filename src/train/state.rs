//! Checkpoints of a run: a Hugging Face folder, and beside it everything else that resuming bit for bit needs.
//!
//! ```text
//! step-N/model.safetensors, config.json     the model with the current delta merged
//! step-N/training_state/state.json          counters
//! step-N/training_state/state.safetensors   exp_avg.NAME and exp_avg_sq.NAME; inside a cycle also param.NAME of the
//!                                           frozen weights, A and B (the merged model has lost them), or codes.NAME,
//!                                           scales.NAME, nested.NAME and offset.NAME of quantised ones
//! step-N/training_state/sha256.json         hashes of all the above
//! ```

use super::{config::WeightDtype, optim::Moments, quantised, trainer::Trainer};
use crate::{
    adapter::{AdapterConfig, CYCLE_KEY, FullTensor, NewModule, save_with},
    checkpoint::{
        Checkpoint, Dtype, HEAD_NAME, TensorFile, TensorSpec, Writer,
        roundings::{self, Step},
    },
    error::{Error, Result},
    model::{Model, Param, ParamKind, StorageFormat},
    ops::Device,
    run::{sha256_file, sha256_folder},
};
use ndarray::{ArrayView2, ArrayViewMut2, linalg::general_mat_mul};
use serde::{Deserialize, Serialize};
use std::{borrow::Cow, collections::BTreeMap, fs, path::Path};

const STATE_FOLDER: &str = "training_state";
const COUNTERS: &str = "state.json";
const TENSORS: &str = "state.safetensors";
const HASHES: &str = "sha256.json";

/// `training_state/state.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Counters {
    step: u64,
    cycle: u64,
    cycle_start: u64,
    skipped: u64,
    /// Seen so far.
    #[serde(default)]
    tokens: u64,
    /// Whether A and B exist.
    low_rank: bool,
    /// Updates since the bias correction began, by parameter.
    adam_steps: BTreeMap<String, u64>,
}

/// Updates made before the checkpoint in `folder` was saved.
pub fn step_of(folder: &Path) -> Result<u64> {
    counters(folder).map(|counters| counters.step)
}

/// Writes the model as a Hugging Face folder, the current delta merged.
/// `roundings`: how its weights were rounded since which checkpoint, which goes into the metadata.
pub fn save_model<D: Device>(model: &Model<D>, dtype: WeightDtype, roundings: &[Step], folder: &Path) -> Result<()> {
    let dtype_name = if dtype == WeightDtype::Bf16 { "bfloat16" } else { "float32" };
    let stored = || model.params().iter().filter(|p| !p.kind.is_lora());
    let spec = |p: &Param<D>| TensorSpec { name: p.name.clone(), dtype: kept_as(p, dtype), shape: p.shape.clone() };
    let specs: Vec<TensorSpec> = stored().map(spec).collect();
    let mut metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    if !roundings.is_empty() {
        metadata.extend(roundings::metadata(roundings));
    }
    let writer = Writer::create(folder, &specs, 5_000_000_000, &metadata)?;
    for param in stored() {
        let mut values = param.values(model.device());
        if param.kind == ParamKind::Linear && model.lora().is_some() {
            add_delta(model, &param.name, &param.shape, values.to_mut());
        }
        writer.write_f32(&param.name, kept_as(param, dtype), &values)?;
    }
    model.device().status()?;
    writer.finish()?;
    let mut json = model.config().to_json();
    json["torch_dtype"] = dtype_name.into();
    write_json(&folder.join("config.json"), &json)
}

/// The type that a parameter is stored as: that of its values, so that `verify` reads from it how they were rounded.
fn kept_as<D: Device>(param: &Param<D>, dtype: WeightDtype) -> Dtype {
    if dtype == WeightDtype::Bf16 || param.store == StorageFormat::Bf16 { Dtype::BF16 } else { Dtype::F32 }
}

/// `values += scaling * B @ A` for the projection called `name`, on the host.
fn add_delta<D: Device>(model: &Model<D>, name: &str, shape: &[usize], values: &mut [f32]) {
    let module = name.trim_end_matches(".weight");
    let factor = |which: &str| model.param(&format!("{module}.{which}.weight")).map(|p| model.device().view(&p.value));
    let (Some(spec), Some(a), Some(b)) = (model.lora(), factor("lora_A"), factor("lora_B")) else { return };
    let (out, r, inputs) = (shape[0], spec.r, shape[1]);
    let a = ArrayView2::from_shape((r, inputs), &a);
    let b = ArrayView2::from_shape((out, r), &b);
    let w = ArrayViewMut2::from_shape((out, inputs), values);
    if let (Ok(a), Ok(b), Ok(mut w)) = (a, b, w) {
        general_mat_mul(model.scaling_of(module) as f32, &b, &a, 1.0, &mut w);
    }
}

/// Writes A and B of the current cycle as a PEFT adapter, and along with them the parameters that are trained in full, as
/// they are at its end: the base with all cycles merged is the final checkpoint. A trained scaling goes into B, so that PEFT
/// merges the same delta with `lora_alpha / r`.
pub fn save_cycle<D: Device>(model: &Model<D>, cycle: u64, base: &Path, folder: &Path) -> Result<()> {
    let spec = model.lora().ok_or_else(|| Error::request("the model has no low-rank factors to save"))?;
    let mut factors = Vec::new();
    for a in model.params().iter().filter(|p| p.kind == ParamKind::LoraA) {
        let module = a.name.trim_end_matches(".lora_A.weight");
        let b = model.param(&format!("{module}.lora_B.weight"));
        let b = b.ok_or_else(|| Error::request(format!("'{module}' has lora_A but no lora_B")))?;
        let scaled_b = model.scaled_b(module).map_or_else(|| model.device().view(&b.value), Cow::Owned);
        factors.push((module, a.shape[1], b.shape[0], model.device().view(&a.value), scaled_b));
    }
    let mut targets: Vec<&str> = factors.iter().filter_map(|f| f.0.rsplit('.').next()).collect();
    targets.sort_unstable();
    targets.dedup();
    let mut config = AdapterConfig::new(spec.r, spec.lora_alpha, &targets);
    config.base_model_name_or_path = Some(base.to_string_lossy().into_owned());
    let modules: Vec<NewModule> = factors
        .iter()
        .map(|(name, in_features, out_features, a, b)| NewModule {
            name,
            r: spec.r,
            out_features: *out_features,
            in_features: *in_features,
            a,
            b,
        })
        .collect();
    let is_full = |kind| matches!(kind, ParamKind::Embedding | ParamKind::Norm | ParamKind::Head);
    let values: Vec<_> =
        model.params().iter().filter(|p| is_full(p.kind)).map(|p| (p, model.device().view(&p.value))).collect();
    let mut full: Vec<FullTensor> =
        values.iter().map(|(p, values)| FullTensor { name: &p.name, shape: &p.shape, values }).collect();
    if model.config().tie_word_embeddings {
        // PEFT looks for the head's values under its own name, too.
        let embedding = values.iter().zip(&full).find(|((p, _), _)| p.kind == ParamKind::Embedding);
        full.extend(embedding.map(|(_, tensor)| FullTensor { name: HEAD_NAME, ..*tensor }));
        config.other.insert("ensure_weight_tying".into(), true.into());
    }
    let metadata = BTreeMap::from([(CYCLE_KEY.to_owned(), cycle.to_string())]);
    model.device().status()?;
    save_with(folder, &config, &modules, &full, &metadata)
}

/// Writes a checkpoint into `folder`, which exists and is staged. Where several processes share out the moments, the others
/// call [`send_moments`] meanwhile.
pub fn save_checkpoint<D: Device>(trainer: &Trainer<D>, roundings: &[Step], folder: &Path) -> Result<()> {
    let model = &trainer.model;
    save_model(model, trainer.config().train.dtype, roundings, folder)?;
    let folder = folder.join(STATE_FOLDER);
    fs::create_dir(&folder).map_err(|e| Error::io("create", &folder, e))?;
    let counters = Counters {
        step: trainer.step,
        cycle: trainer.cycle,
        cycle_start: trainer.cycle_start,
        skipped: trainer.skipped,
        tokens: trainer.tokens_after(trainer.step),
        low_rank: model.lora().is_some(),
        adam_steps: trainer.optimizer.moments.iter().map(|(name, m)| (name.clone(), m.t)).collect(),
    };
    let json = serde_json::to_value(&counters).map_err(|e| Error::environment(e.to_string()))?;
    write_json(&folder.join(COUNTERS), &json)?;

    let (mut tensors, mut quantised) = (Vec::new(), Vec::new());
    for param in model.params() {
        if let Some(values) = param.read_quantised(model.device()) {
            quantised.extend(quantised::tensors(&param.name, values));
        } else if model.lora().is_some()
            && !matches!(param.kind, ParamKind::Embedding | ParamKind::Norm | ParamKind::Head)
        {
            tensors.push((format!("param.{}", param.name), kept_as(param, trainer.config().train.dtype), param));
        }
    }
    let spec = |name: String, dtype, shape: &[usize]| TensorSpec { name, dtype, shape: shape.to_vec() };
    let moments = model.params().iter().filter(|p| trainer.optimizer.moments.contains_key(&p.name));
    let specs: Vec<_> = (tensors.iter().map(|(name, dtype, param)| spec(name.clone(), *dtype, &param.shape)))
        .chain(moments.flat_map(|p| MOMENTS.map(|which| spec(format!("{which}.{}", p.name), Dtype::F32, &p.shape))))
        .chain(quantised.iter().map(|(spec, _)| spec.clone()))
        .collect();
    let writer = Writer::create_file(&folder.join(TENSORS), &specs, &BTreeMap::new())?;
    for (name, dtype, param) in &tensors {
        writer.write_f32(name, *dtype, &model.device().view(&param.value))?;
    }
    each_moment(trainer, |name, values| writer.write_f32(name, Dtype::F32, &model.device().view(values)))?;
    for (spec, bytes) in &quantised {
        writer.write(&spec.name, 0, bytes)?;
    }
    model.device().status()?;
    writer.finish()
}

/// Takes part in another process's [`save_checkpoint`], with the moments that are here.
pub fn send_moments<D: Device>(trainer: &Trainer<D>) -> Result<()> {
    if trainer.optimizer.holders().world_size() > 1 {
        each_moment(trainer, |_, _| Ok(()))?;
    }
    Ok(())
}

/// The names of the moments in a checkpoint, before those of the parameters.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// Calls `see` with the name and values of all moments, also of those that other processes have: all do this together.
fn each_moment<D: Device>(trainer: &Trainer<D>, mut see: impl FnMut(&str, &D::Buffer) -> Result<()>) -> Result<()> {
    let (device, params, optimizer) = (trainer.model.device(), trainer.model.params(), &trainer.optimizer);
    let holders = optimizer.holders();
    for (param, owner) in params.iter().zip(optimizer.owners(params)) {
        let Some(moments) = optimizer.moments.get(&param.name) else { continue };
        for (which, values) in MOMENTS.into_iter().zip([&moments.m, &moments.v]) {
            let name = format!("{which}.{}", param.name);
            if holders.world_size() == 1 {
                see(&name, values)?;
                continue;
            }
            let mut travelling = device.zeros(param.elements());
            if owner == holders.rank() {
                device.copy(values, &mut travelling);
            }
            holders.broadcast(device, owner, &mut travelling)?;
            see(&name, &travelling)?;
        }
    }
    Ok(())
}

/// Notes the hash of every file of the checkpoint in `folder` inside it; call it last.
pub fn seal(folder: &Path) -> Result<BTreeMap<String, String>> {
    let mut files = sha256_folder(folder)?;
    let path = folder.join(STATE_FOLDER).join(HASHES);
    write_json(&path, &serde_json::json!(files))?;
    files.insert(format!("{STATE_FOLDER}/{HASHES}"), sha256_file(&path)?);
    Ok(files)
}

/// Checks the checkpoint in `folder` against the hashes inside it.
pub fn check_seal(folder: &Path) -> Result<()> {
    let path = folder.join(STATE_FOLDER).join(HASHES);
    let bytes = crate::checkpoint::read_text(&path)?;
    let expected: BTreeMap<String, String> = serde_json::from_slice(&bytes)
        .map_err(|e| Error::request(format!("'{}' is not a list of hashes: {e}", path.display())))?;
    for (name, expected) in expected {
        let file = folder.join(&name);
        let found = sha256_file(&file)?;
        if found != expected {
            return Err(Error::request(format!(
                "'{}' is damaged: its sha256 is {found}, {expected} when it was written",
                file.display()
            )));
        }
    }
    Ok(())
}

fn counters(folder: &Path) -> Result<Counters> {
    let path = folder.join(STATE_FOLDER).join(COUNTERS);
    let bytes = crate::checkpoint::read_text(&path)?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::request(format!("'{}' is not a training state: {e}", path.display())))
}

/// Whether the checkpoint in `folder` lies inside a cycle.
pub fn is_low_rank(folder: &Path) -> Result<bool> {
    Ok(counters(folder)?.low_rank)
}

/// Restores a fresh trainer, whose model was loaded from the checkpoint in `folder`, to the moment of saving.
pub fn restore<D: Device>(trainer: &mut Trainer<D>, folder: &Path) -> Result<()> {
    let counters = counters(folder)?;
    let tokens = trainer.tokens_after(counters.step);
    // Runs of 0.1.0 wrote no configuration into their manifest, but the tokens into every checkpoint.
    if counters.tokens > 0 && counters.tokens != tokens {
        return Err(Error::request(format!(
            "'{}' had seen {} tokens after update {}, but config.toml makes that {tokens}: batch size, gradient accumulation or \
             max_length were changed",
            folder.display(),
            counters.tokens,
            counters.step
        ))
        .help("write their old values again, or start a new run"));
    }
    let folder = folder.join(STATE_FOLDER);
    if counters.low_rank {
        trainer.freeze_projections();
        trainer.start_cycles()?;
    }
    trainer.step = counters.step;
    trainer.cycle = counters.cycle;
    trainer.cycle_start = counters.cycle_start;
    trainer.skipped = counters.skipped;

    let (owners, rank) = (trainer.optimizer.owners(trainer.model.params()), trainer.optimizer.holders().rank());
    let path = folder.join(TENSORS);
    let state = Checkpoint::from_files(&path, vec![TensorFile::open(&path)?])?;
    let (device, params) = trainer.model.device_and_params_mut();
    for (param, owner) in params.iter_mut().zip(owners) {
        let read = |prefix: &str| -> Result<Option<Vec<f32>>> {
            let Some(tensor) = state.get(&format!("{prefix}.{}", param.name)) else { return Ok(None) };
            if tensor.shape() != param.shape {
                return Err(Error::request(format!(
                    "'{}': tensor '{}' has shape {:?}, expected {:?}",
                    path.display(),
                    tensor.name(),
                    tensor.shape(),
                    param.shape
                )));
            }
            Ok(Some(tensor.to_f32()?.into_owned()))
        };
        let (value, m, v) = (read("param")?, read(MOMENTS[0])?, read(MOMENTS[1])?);
        if let StorageFormat::Quantised(how) = param.store {
            let values = quantised::read(&state, &param.name, how, [param.shape[0], param.shape[1]])?;
            param.write_quantised(device, &values);
        } else if let Some(value) = value {
            device.write(&mut param.value, &value);
        }
        if let (Some(m), Some(v)) = (m, v) {
            let t = counters.adam_steps.get(&param.name).copied().unwrap_or(0);
            let upload = |values: &[f32]| device.upload(if owner == rank { values } else { &[] });
            let moments = Moments { m: upload(&m), v: upload(&v), t };
            trainer.optimizer.moments.insert(param.name.clone(), moments);
        }
    }
    Ok(())
}

fn write_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_string_pretty(json).map_err(|e| Error::environment(e.to_string()))? + "\n";
    fs::write(path, text).map_err(|e| Error::io("write", path, e))
}
