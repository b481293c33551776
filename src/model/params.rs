//! The table of parameters: name, kind, shape; their initial values and how they are read from a checkpoint.

use super::{
    config::LlamaConfig,
    init,
    linear::{Factors, Linear, Scaling, extents},
    lora::LoraSpec,
    product::Product,
};
use crate::{
    checkpoint::{Checkpoint, EMBEDDING_NAME, HEAD_NAME, Tensor},
    error::{Error, Result},
    ops::{Device, Element, Quantisation, Quantised, Rounding},
};
use std::{borrow::Cow, collections::HashSet, path::PathBuf};

/// What a parameter is for. Decides how it starts and which of them train.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// `model.embed_tokens.weight` (V, C); with tied embeddings the head, too.
    Embedding,
    /// RMSNorm weights (C).
    Norm,
    /// `lm_head.weight` (V, C).
    Head,
    /// The seven projections of a block (out, in).
    Linear,
    /// The inner LoRA factor A (r, in).
    LoraA,
    /// The outer LoRA factor B (out, r).
    LoraB,
    /// p (1) of a trained LoRA scaling `tanh(p)`.
    LoraScaling,
}

impl ParamKind {
    /// Whether it belongs to a low-rank delta.
    pub fn is_lora(self) -> bool {
        matches!(self, ParamKind::LoraA | ParamKind::LoraB | ParamKind::LoraScaling)
    }
}

/// Storage format of a parameter's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageFormat {
    /// Single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// A few bits each.
    Quantised(Quantisation),
}

/// One named tensor, and its gradient while it trains.
pub struct Param<D: Device> {
    /// Hugging Face's name; for LoRA factors `....q_proj.lora_A.weight`.
    pub name: String,
    /// What it is for.
    pub kind: ParamKind,
    /// Extents, row-major.
    pub shape: Vec<usize>,
    /// Whether it has a gradient.
    pub trainable: bool,
    /// The values; f32, but for frozen ones in bf16 on a device that has it. Empty, if they are quantised.
    pub value: D::Buffer,
    /// What they may be.
    pub store: StorageFormat,
    /// The values, if they are quantised.
    pub(super) quantised: Option<D::Quantised>,
    /// A bf16 copy that products read: see [`super::Model::set_mixed_precision`].
    pub(super) working: Option<D::Buffer>,
    /// Accumulated gradient, if `trainable`. That of a projection is there from a backward until [`super::Model::zero_grad`].
    pub grad: Option<D::Buffer>,
}

impl<D: Device> Param<D> {
    pub(super) fn new(name: String, kind: ParamKind, shape: Vec<usize>, value: D::Buffer) -> Self {
        Param {
            name,
            kind,
            shape,
            trainable: false,
            value,
            store: StorageFormat::F32,
            quantised: None,
            working: None,
            grad: None,
        }
    }

    /// What products read.
    pub(super) fn operand(&self) -> &D::Buffer {
        self.working.as_ref().unwrap_or(&self.value)
    }

    pub(super) fn set_trainable(&mut self, device: &D, trainable: bool) {
        self.trainable = trainable;
        match (trainable, &self.grad) {
            (true, None) if self.kind != ParamKind::Linear => self.grad = Some(device.zeros(self.elements())),
            (false, _) => self.grad = None,
            _ => {}
        }
    }

    /// The values, on the host.
    pub fn values(&self, device: &D) -> Cow<'_, [f32]> {
        if self.quantised.is_none() {
            return device.view(&self.value);
        }
        let mut values = device.zeros(self.elements());
        self.read(device, &mut values);
        Cow::Owned(device.read(&values))
    }

    /// The values as they are kept, if they are quantised.
    pub fn read_quantised(&self, device: &D) -> Option<Quantised> {
        self.quantised.as_ref().map(|quantised| device.read_quantised(quantised))
    }

    /// Replaces quantised values by others that are kept in the same way.
    pub fn write_quantised(&mut self, device: &D, values: &Quantised) {
        assert_eq!(self.store, StorageFormat::Quantised(values.how), "quantised values take the place of their like");
        self.quantised = Some(device.upload_quantised(values));
    }

    /// Copies the values to a buffer of f32 or bf16.
    pub(super) fn read(&self, device: &D, to: &mut D::Buffer) {
        match &self.quantised {
            Some(quantised) => device.dequantise(quantised, to),
            None => device.copy(&self.value, to),
        }
    }

    /// Replaces the values by others that `store` can be: `values` (f32) are rounded first, and hold what was kept. bf16 is in
    /// buffers of these elements.
    pub(super) fn set_storage(
        &mut self,
        device: &D,
        store: StorageFormat,
        element: Element,
        rounding: Rounding,
        values: &mut D::Buffer,
    ) {
        self.store = store;
        match store {
            StorageFormat::F32 => device.copy(values, &mut self.value),
            StorageFormat::Bf16 => {
                device.round_to_bf16(rounding, values);
                self.value = device.zeros_of(element, self.elements());
                device.copy(values, &mut self.value);
            }
            StorageFormat::Quantised(how) => {
                let quantised = device.quantise(how, self.shape[0], self.shape[1], values);
                device.dequantise(&quantised, values);
                self.quantised = Some(quantised);
                self.value = device.zeros(0);
            }
        }
    }

    /// Brings the copy that products read up to date, or drops it where they read the values themselves.
    pub(super) fn refresh(&mut self, device: &D, narrow: bool) {
        if !narrow || self.store != StorageFormat::F32 {
            self.working = None;
            return;
        }
        let len = self.elements();
        let working = self.working.get_or_insert_with(|| device.zeros_of(Element::Bf16, len));
        device.copy(&self.value, working);
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Name, kind and shape of every parameter but the LoRA factors, in Hugging Face's order.
pub(super) fn table(config: &LlamaConfig) -> Vec<(String, ParamKind, Vec<usize>)> {
    let (c, f, v) = (config.hidden_size, config.intermediate_size, config.vocab_size);
    let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let mut table = vec![(EMBEDDING_NAME.to_owned(), ParamKind::Embedding, vec![v, c])];
    for i in 0..config.num_hidden_layers {
        let linears = [[q, c], [kv, c], [kv, c], [c, q], [f, c], [f, c], [c, f]];
        for (module, shape) in TARGETS.iter().zip(linears) {
            table.push((format!("model.layers.{i}.{module}.weight"), ParamKind::Linear, shape.to_vec()));
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            table.push((format!("model.layers.{i}.{norm}.weight"), ParamKind::Norm, vec![c]));
        }
    }
    table.push(("model.norm.weight".to_owned(), ParamKind::Norm, vec![c]));
    if !config.tie_word_embeddings {
        table.push((HEAD_NAME.to_owned(), ParamKind::Head, vec![v, c]));
    }
    table
}

/// The linear modules of a block, in the order of [`table`]. LoRA factors are added to all of them.
pub(super) const TARGETS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// Parameters of one block in [`table`].
const PER_BLOCK: usize = TARGETS.len() + 2;

/// Where each parameter is in the list.
pub(super) struct Layout {
    layers: usize,
    tied: bool,
}

impl Layout {
    pub fn new(config: &LlamaConfig) -> Self {
        Layout { layers: config.num_hidden_layers, tied: config.tie_word_embeddings }
    }

    pub fn embedding(&self) -> usize {
        0
    }

    /// The `which`-th of [`TARGETS`] in block `layer`, with the way its product takes for `rows` rows. `dims` are its
    /// `(out, in)`; `exact` is whether it is of f32.
    pub fn linear(
        &self,
        layer: usize,
        which: usize,
        lora: Option<&LoraSpec>,
        dims: (usize, usize),
        rows: usize,
        exact: bool,
    ) -> Linear {
        let factors = |spec: &LoraSpec| {
            let per_target = if spec.train_scaling { 3 } else { 2 };
            let a = self.len() + per_target * (layer * TARGETS.len() + which);
            let scaling = if spec.train_scaling { Scaling::Tanh(a + 2) } else { Scaling::Fixed(spec.scaling as f32) };
            let extents = extents(dims, rows, spec.r);
            let product = Product::choose(spec, extents, exact);
            Factors { a, b: a + 1, scaling, product }
        };
        Linear { weight: self.weight(layer, which), lora: lora.map(factors) }
    }

    /// The weight of the `which`-th of [`TARGETS`] in block `layer`.
    pub fn weight(&self, layer: usize, which: usize) -> usize {
        1 + layer * PER_BLOCK + which
    }

    /// The norm before attention (`which` 0) or before the MLP (1) of block `layer`.
    pub fn norm(&self, layer: usize, which: usize) -> usize {
        1 + layer * PER_BLOCK + TARGETS.len() + which
    }

    pub fn final_norm(&self) -> usize {
        1 + self.layers * PER_BLOCK
    }

    pub fn head(&self) -> usize {
        if self.tied { self.embedding() } else { self.final_norm() + 1 }
    }

    /// Parameters before the first LoRA factor.
    pub fn len(&self) -> usize {
        self.final_norm() + if self.tied { 1 } else { 2 }
    }
}

pub(super) fn init<D: Device>(device: &D, config: &LlamaConfig, seed: u64) -> Vec<Param<D>> {
    let fill = |(name, kind, shape): (String, ParamKind, Vec<usize>)| {
        let len = shape.iter().product();
        let values = match kind {
            ParamKind::Norm => vec![1.0; len],
            _ => init::normal(seed, &name, config.initializer_range, len),
        };
        Param::new(name, kind, shape, device.upload(&values))
    };
    table(config).into_iter().map(fill).collect()
}

/// `config.json` in the checkpoint's folder, or beside the file.
pub(super) fn config_path(checkpoint: &Checkpoint) -> PathBuf {
    let folder = checkpoint.folder().or(checkpoint.path().parent());
    folder.map(|f| f.join("config.json")).unwrap_or_else(|| "config.json".into())
}

/// The parameters in a checkpoint; the projections as `keep` says, so that a large model never exists as a whole in f32.
pub(super) fn load<D: Device>(
    device: &D,
    config: &LlamaConfig,
    checkpoint: &Checkpoint,
    (store, element): (StorageFormat, Element),
) -> Result<Vec<Param<D>>> {
    let table = table(config);
    check_names(config, checkpoint, &table)?;
    let mut params = Vec::with_capacity(table.len());
    for (name, kind, shape) in table {
        let tensor = checkpoint.tensor(&name)?;
        if tensor.shape() != shape {
            return Err(Error::request(format!(
                "tensor '{name}' in '{}' has shape {:?}, but config.json calls for {shape:?}",
                tensor.file().path().display(),
                tensor.shape()
            )));
        }
        let values = tensor.to_f32()?;
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            return Err(Error::request(format!(
                "tensor '{name}' in '{}' holds {} at element {at}",
                tensor.file().path().display(),
                values[at]
            ))
            .help("a model with such weights cannot be trained or evaluated; look at it with `relora-kit inspect --stats`"));
        }
        let mut value = device.upload(&values);
        if kind != ParamKind::Linear || store == StorageFormat::F32 {
            params.push(Param::new(name, kind, shape, value));
            continue;
        }
        let mut param = Param::new(name, kind, shape, device.zeros(0));
        param.set_storage(device, store, element, Rounding::Nearest, &mut value);
        params.push(param);
    }
    Ok(params)
}

/// Every name of the table is in the checkpoint, and nothing else is, but what older writers added without need.
fn check_names(config: &LlamaConfig, checkpoint: &Checkpoint, table: &[(String, ParamKind, Vec<usize>)]) -> Result<()> {
    let path = checkpoint.path().display();
    let known: HashSet<&str> = table.iter().map(|(name, ..)| name.as_str()).collect();
    let missing: Vec<&str> = known.iter().copied().filter(|name| checkpoint.get(name).is_none()).collect();
    if let Some(first) = table.iter().map(|t| t.0.as_str()).find(|name| missing.contains(name)) {
        return Err(Error::request(format!(
            "'{path}' lacks {} of the {} tensors of this LLaMA model (first: '{first}')",
            missing.len(),
            known.len()
        ))
        .help("check that config.json belongs to these weights"));
    }
    let embedding = checkpoint.get(EMBEDDING_NAME);
    let harmless = |tensor: &Tensor| {
        let copy_of_tied = config.tie_word_embeddings
            && tensor.name() == HEAD_NAME
            && embedding.is_some_and(|e| e.dtype() == tensor.dtype() && e.bytes() == tensor.bytes());
        copy_of_tied || tensor.name().ends_with("rotary_emb.inv_freq")
    };
    let surplus: Vec<&str> =
        checkpoint.tensors().filter(|t| !known.contains(t.name()) && !harmless(t)).map(|t| t.name()).collect();
    if let Some(first) = surplus.first() {
        return Err(Error::request(format!(
            "'{path}' holds {} tensors that are not part of this LLaMA model (first: '{first}')",
            surplus.len()
        ))
        .help("check that config.json belongs to these weights"));
    }
    Ok(())
}
