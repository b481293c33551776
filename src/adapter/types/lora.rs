//! LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732) and DoRA (arXiv:2402.09353).
//!
//! Letters: A is `[r, in]`, B is `[out, r]`, the delta of a weight `[out, in]` is `scaling * B @ A`.

use super::{About, AdapterType, Layer, Parameter, Site, values};
use crate::{
    adapter::{Adapter, Module},
    checkpoint::Tensor,
    delta::{
        Effect, LowRank, Planned, Real, Stacked, Update, Weight,
        forms::{self, Boxed},
        unravel,
    },
    error::{Error, Result},
};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use serde_json::Value;
use std::{ops::Range, path::Path};

/// The type.
pub struct Lora;

/// The tensors of a module that was trained with LoRA.
#[derive(Clone, Copy)]
pub struct LoraModule<'a> {
    /// Name inside the model: `model.layers.0.self_attn.q_proj`.
    pub name: &'a str,
    /// Its weight is an embedding, `[vocabulary, dimension]`, whose delta is `scaling * (B @ A)ᵀ`.
    pub embedding: bool,
    /// `[r, in]`, or `[r, vocabulary]`.
    pub a: Tensor<'a>,
    /// `[out, r]`, or `[dimension, r]`.
    pub b: Tensor<'a>,
    /// DoRA's magnitude, one per output.
    pub magnitude: Option<Tensor<'a>>,
    /// The bias of B, one per output.
    pub bias: Option<Tensor<'a>>,
    /// KaSA's singular values, one per rank: `B @ diag @ A`.
    pub diag: Option<Tensor<'a>>,
    /// One factor is block diagonal, and stored as its blocks.
    pub blocks: Option<Blocks>,
    /// Rank (of one expert, where there are several).
    pub r: usize,
    /// How many pairs of factors A and B are stacked along the rank; 1 except for expert parameters.
    pub experts: usize,
    /// Rows of B.
    pub out_features: usize,
    /// Columns of A.
    pub in_features: usize,
    /// What `B @ A` is multiplied with.
    pub scaling: f64,
}

/// A block diagonal factor (BD-LoRA), stored as its blocks below each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// A is the factor, and not B.
    pub of_a: bool,
    /// Number of blocks.
    pub count: usize,
}

impl Blocks {
    fn of(module: &Module) -> Option<Blocks> {
        let settings = module.config().other.get("use_bdlora")?;
        let count = settings["nblocks"].as_u64()? as usize;
        let last = module.name().rsplit('.').next().unwrap_or_default();
        let targets = |key: &str| {
            let names = settings[key].as_array().map_or(&[][..], Vec::as_slice);
            names.iter().filter_map(Value::as_str).any(|name| last.contains(name))
        };
        let of_a = targets("target_modules_bd_a");
        (count > 1 && (of_a || targets("target_modules_bd_b"))).then_some(Blocks { of_a, count })
    }

    /// The factor of its stored blocks.
    fn dense<T: Real>(self, stored: Array2<T>) -> Array2<T> {
        let (rows, columns) = stored.dim();
        let height = rows / self.count;
        Array2::from_shape_fn((rows, columns * self.count), |(i, j)| match i / height == j / columns {
            true => stored[[i, j % columns]],
            false => T::zero(),
        })
    }
}

impl<'a> LoraModule<'a> {
    /// The tensors of `module`, checked against each other and the configuration.
    pub fn of(module: &Module<'a>) -> Result<LoraModule<'a>> {
        // A module of expert parameters gets its rank from the name of one of them.
        let targets = module.config().target_parameters.iter().flatten().filter_map(|target| target.rsplit('.').next());
        let owner = module.name().trim_end_matches(".base_layer");
        let own = Self::named(module, module.name());
        if own.is_ok() {
            return own;
        }
        let mut parameters = targets.map(|parameter| format!("{owner}.{parameter}"));
        parameters.find_map(|name| Self::named(module, &name).ok()).map_or(own, Ok)
    }

    /// [`LoraModule::of`] for the factors of the parameter `name`, whose own name decides rank and scaling; `None` if its rank
    /// is another.
    pub fn of_parameter(module: &Module<'a>, name: &str) -> Result<Option<LoraModule<'a>>> {
        Self::of(module)?;
        Ok(Self::named(module, name).ok())
    }

    fn named(module: &Module<'a>, name: &str) -> Result<LoraModule<'a>> {
        let bad = |what: String| module.damaged(&what);
        if module.adapter().kind().id() != Lora.id() {
            return Err(bad(format!("it is trained with {}, expected LoRA", module.adapter().kind().name())));
        }
        let get = |slot: &str| module.get(slot);
        let (a, b, embedding) = match (get("lora_A"), get("lora_B"), get("lora_embedding_A"), get("lora_embedding_B")) {
            (Some(a), Some(b), None, None) => (a, b, false),
            (None, None, Some(a), Some(b)) => (a, b, true),
            _ => return Err(bad("expected one A and one B factor, found only part of them".into())),
        };
        let (r, mut n, m, r_b) = match (a.shape(), b.shape()) {
            (&[r, n], &[m, r_b]) => (r, n, m, r_b),
            // A convolution: A has its kernel, B is 1 x 1.
            (&[r, ref patch @ ..], &[m, r_b, ref ones @ ..])
                if a.shape().len() == b.shape().len() && patch.len() > 1 && ones.iter().all(|n| *n == 1) =>
            {
                (r, patch.iter().product(), m, r_b)
            }
            (a, b) => return Err(bad(format!("expected matrices A and B, found shapes {a:?} and {b:?}"))),
        };
        let blocks_of_b = Blocks::of(module).filter(|blocks| !blocks.of_a).map_or(1, |blocks| blocks.count);
        if r != r_b * blocks_of_b || r == 0 {
            return Err(bad(format!("A {:?} and B {:?} do not share a rank above 0", a.shape(), b.shape())));
        }
        let vector = |slot, what: &str| match get(slot) {
            Some(v) if v.elements() != m => {
                Err(bad(format!("{what} has shape {:?}, expected {m} elements", v.shape())))
            }
            v => Ok(v),
        };
        let magnitude = vector("lora_magnitude_vector", "the DoRA magnitude")?;
        let bias = vector("lora_B.bias", "the bias of B")?;
        let config = module.config();
        let blocks = Blocks::of(module);
        if let Some(Blocks { of_a: true, count }) = blocks {
            n *= count;
        }
        if let Some(Blocks { count, .. }) = blocks
            && (r % count != 0 || m % count != 0)
        {
            return Err(bad(format!("rank {r} and {m} outputs are not {count} blocks")));
        }
        let diag = get("lora_diag");
        if diag.is_some_and(|diag| diag.elements() != r) {
            return Err(bad(format!("its lora_diag does not have the {r} elements of its rank")));
        }
        let configured = config.rank_of(name);
        if configured == 0 {
            return Err(bad("adapter_config.json gives it rank 0, expected at least 1".into()));
        }
        // Expert parameters stack one pair of factors per expert along the rank.
        let experts = match config.target_parameters.as_deref() {
            Some([_, ..]) if r % configured == 0 => r / configured,
            _ => 1,
        };
        if r != configured * experts {
            return Err(bad(format!("its factors have rank {r}, adapter_config.json says {configured}")));
        }
        Ok(LoraModule {
            name: module.name(),
            embedding,
            a,
            b,
            magnitude,
            bias,
            diag,
            blocks,
            r: configured,
            experts,
            out_features: m,
            in_features: n,
            scaling: config.scaling_of(name),
        })
    }

    /// The weight it changes, for models whose tensors are named as the adapter's: `NAME.weight`.
    pub fn tensor_name(&self) -> String {
        format!("{}.weight", self.name)
    }

    /// The delta in the layout of the stored weight. `fan_in_fan_out`: a linear weight is stored `[in, out]`.
    /// Expert parameters have one delta per expert, see [`LoraModule::experts`]; here their factors are taken as one pair.
    pub fn low_rank<T: Real>(&self, fan_in_fan_out: bool) -> Result<LowRank<T>> {
        let read = |what: &str, tensor: &Tensor, shape| {
            let mut values = vec![T::zero(); tensor.elements()];
            T::read(tensor, 0, &mut values)?;
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                return Err(Error::request(format!(
                    "factor {what} of '{}' is not finite: '{}' in '{}' holds {} at {:?}",
                    self.name,
                    tensor.name(),
                    tensor.file().path().display(),
                    values[i],
                    unravel(i, tensor.shape())
                ))
                .help("the adapter's training diverged or its file is damaged"));
            }
            let bad = |e| Error::environment(format!("factors of '{}': {e}", self.name));
            Array2::from_shape_vec(shape, values).map_err(bad)
        };
        let rank = self.r * self.experts;
        let [of_a, of_b] = [true, false].map(|of_a| self.blocks.filter(|blocks| blocks.of_a == of_a));
        let width = |of: Option<Blocks>, columns: usize| columns / of.map_or(1, |blocks| blocks.count);
        let mut a = read("A", &self.a, (rank, width(of_a, self.in_features)))?;
        let mut b = read("B", &self.b, (self.out_features, width(of_b, rank)))?;
        if let Some(blocks) = of_a {
            a = blocks.dense(a);
        }
        if let Some(blocks) = of_b {
            b = blocks.dense(b);
        }
        if let Some(diag) = &self.diag {
            let diag = values::vector::<T>(diag)?;
            b.columns_mut().into_iter().zip(diag).for_each(|(mut column, d)| column.mapv_inplace(|x| x * d));
        }
        let scaling = T::from_f64(self.scaling);
        let (left, right) =
            if fan_in_fan_out || self.embedding { (a.reversed_axes(), b.reversed_axes()) } else { (b, a) };
        Ok(LowRank { left, right, scaling })
    }

    /// One delta per expert, each with its first row, or the only one. PEFT stacks A expert by expert, `[experts * r, in]`, but
    /// interleaves B, `[out, r * experts]`.
    fn stacked<T: Real>(&self, transposed: bool, weight: f64) -> Result<Stacked<T>> {
        let scaling = T::from_f64(weight * self.scaling);
        if self.experts == 1 {
            return Ok(Stacked::new(vec![(0, LowRank { scaling, ..self.low_rank(transposed)? })]));
        }
        let all = self.low_rank::<T>(false)?;
        let (r, experts) = (self.r, self.experts);
        let one = |e: usize| {
            let a = all.right.slice(s![e * r..(e + 1) * r, ..]);
            let b = all.left.slice(s![.., e..;experts]);
            let (left, right) =
                if transposed { (a.t().to_owned(), b.t().to_owned()) } else { (b.to_owned(), a.to_owned()) };
            (e * left.nrows(), LowRank { left, right, scaling })
        };
        Ok(Stacked::new((0..experts).map(one).collect()))
    }

    /// Whether a weight of shape `stored` holds the delta transposed; an error says what was found.
    fn orientation(
        &self,
        stored: &[usize],
        fan_in_fan_out: bool,
        experts_in_out: bool,
    ) -> std::result::Result<bool, String> {
        let delta = [self.out_features, self.in_features];
        let wanted = self.embedding || fan_in_fan_out;
        if self.a.shape().len() > 2 {
            return match stored == [&[self.out_features], &self.a.shape()[1..]].concat() {
                true => Ok(false),
                false => Err(format!("shape {stored:?} but A {:?} and B {:?}", self.a.shape(), self.b.shape())),
            };
        }
        match *stored {
            [m, n] if self.experts == 1 => match (delta == [m, n], delta == [n, m]) {
                (true, true) => Ok(wanted),
                (true, false) if !self.embedding => Ok(false),
                (false, true) if wanted => Ok(true),
                _ => Err(format!("shape {stored:?} but B @ A gives {delta:?}")),
            },
            [e, m, n] if self.experts == e => match (delta == [m, n], delta == [n, m]) {
                (true, true) => Ok(experts_in_out),
                (true, false) => Ok(false),
                (false, true) => Ok(true),
                _ => Err(format!("shape {stored:?} but B @ A of an expert gives {delta:?}")),
            },
            _ => {
                let experts = if self.experts > 1 { format!(" for {} experts", self.experts) } else { String::new() };
                Err(format!("shape {stored:?} but B @ A gives {delta:?}{experts}"))
            }
        }
    }

    /// Plans the delta of a weight of shape `stored`; `file` is named in messages. An error says what was found.
    pub fn plan(
        self,
        file: &'a Path,
        stored: &[usize],
        fan_in_fan_out: bool,
        experts_in_out: bool,
        weight: f64,
    ) -> std::result::Result<Planned<'a>, String> {
        let transposed = self.orientation(stored, fan_in_fan_out, experts_in_out)?;
        let Some((&columns, rows)) = stored.split_last() else { return Err("no extents".into()) };
        let shape = match self.a.shape().len() {
            2 => (rows.iter().product(), columns),
            _ => (self.out_features, self.in_features),
        };
        if self.diag.is_some() {
            let mut planned = Planned::in_double(file, shape, move || self.kasa(transposed, weight));
            planned.tensors = vec![self.a, self.b];
            return Ok(planned);
        }
        let mut planned = Planned::new(
            file,
            shape,
            move || self.build::<f32>(transposed, weight),
            move || self.build::<f64>(transposed, weight),
        );
        planned.rank = self.r;
        planned.tensors = vec![self.a, self.b];
        planned.alone = self.magnitude.is_some();
        Ok(planned)
    }

    /// KaSA (arXiv:2412.06071): the r smallest singular parts of the weight make room for `B @ diag @ A`.
    fn kasa(&self, transposed: bool, weight: f64) -> Result<Boxed> {
        let product = LowRank { scaling: weight * self.scaling, ..self.low_rank::<f64>(transposed)? };
        let (shape, r) = (product.shape(), self.r);
        let kept = shape.0.min(shape.1).saturating_sub(r);
        Ok(forms::whole(shape, 8 * (product.left.len() + product.right.len()), move |weight| {
            Ok(values::largest_parts(weight, kept)? + product.dense())
        }))
    }

    fn build<T: Real>(&self, transposed: bool, weight: f64) -> Result<Box<dyn Update<T>>> {
        let product = Box::new(self.stacked(transposed, weight)?);
        let Some(magnitude) = &self.magnitude else { return Ok(product) };
        Ok(Box::new(Dora {
            name: self.tensor_name(),
            product,
            magnitude: values::vector(magnitude)?,
            factors: Vec::new(),
            by_column: transposed,
        }))
    }
}

/// DoRA (eq. 5): `W' = magnitude / ||W + dW|| * (W + dW)`, with one norm per output of the layer.
struct Dora<T: Real> {
    name: String,
    product: Box<dyn Update<T>>,
    magnitude: Vec<f64>,
    factors: Vec<T>,
    /// One factor per column of the stored weight instead of one per row.
    by_column: bool,
}

impl<T: Real> Update<T> for Dora<T> {
    fn shape(&self) -> (usize, usize) {
        self.product.shape()
    }

    fn bytes(&self) -> usize {
        self.product.bytes() + self.magnitude.len() * (size_of::<f64>() + size_of::<T>())
    }

    fn effect(&self) -> Effect {
        Effect::Rewrites
    }

    fn prepare(&mut self, weight: &dyn Weight<T>) -> Result<()> {
        let (rows, columns) = weight.shape();
        let mut squares = vec![0f64; if self.by_column { columns } else { rows }];
        let mut delta = Array2::zeros((0, columns));
        weight.blocks(&mut |block, weight| {
            if delta.nrows() < block.len() {
                delta = Array2::zeros((block.len(), columns));
            }
            self.product.rows(block.clone(), weight, delta.slice_mut(s![..block.len(), ..]))?;
            for (i, (w, d)) in weight.iter().zip(delta.iter()).enumerate() {
                let place = if self.by_column { i % columns } else { block.start + i / columns };
                squares[place] += (*w + *d).to_f64().powi(2);
            }
            Ok(())
        })?;
        if let Some(i) = squares.iter().position(|square| *square == 0.0) {
            return Err(Error::request(format!(
                "cannot merge '{}': base and delta add up to zero for output {i}, which DoRA cannot rescale",
                self.name
            ))
            .help("the base or the adapter is damaged"));
        }
        self.factors = self.magnitude.iter().zip(&squares).map(|(m, square)| T::from_f64(m / square.sqrt())).collect();
        Ok(())
    }

    fn rows(&self, rows: Range<usize>, weight: ArrayView2<T>, mut out: ArrayViewMut2<T>) -> Result<()> {
        self.product.rows(rows.clone(), weight, out.view_mut())?;
        for ((mut out, weight), row) in out.outer_iter_mut().zip(weight.outer_iter()).zip(rows) {
            for (j, (out, &w)) in out.iter_mut().zip(weight).enumerate() {
                *out = self.factors[if self.by_column { j } else { row }] * (w + *out);
            }
        }
        Ok(())
    }

    fn factors(&self) -> Option<&[(usize, LowRank<T>)]> {
        self.product.factors()
    }

    fn product_mut(&mut self) -> Option<&mut Box<dyn Update<T>>> {
        Some(&mut self.product)
    }
}

/// `factor * vector`, added to a bias.
struct Bias<T> {
    vector: Vec<T>,
    factor: T,
}

impl<T: Real> Update<T> for Bias<T> {
    fn shape(&self) -> (usize, usize) {
        (1, self.vector.len())
    }

    fn bytes(&self) -> usize {
        self.vector.len() * size_of::<T>()
    }

    fn rows(&self, _: Range<usize>, _: ArrayView2<T>, mut out: ArrayViewMut2<T>) -> Result<()> {
        out.iter_mut().zip(&self.vector).for_each(|(out, &v)| *out = self.factor * v);
        Ok(())
    }
}

fn bias<T: Real>(vector: &Tensor, factor: f64) -> Result<Box<dyn Update<T>>> {
    Ok(Box::new(Bias::<T> { vector: values::vector(vector)?, factor: T::from_f64(factor) }))
}

/// Initialisations that change the base's weights, too: the delta fits only the changed base.
const CHANGES_THE_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Settings that make the update something else than a delta of stored weights.
const NO_DELTA: [(&str, &str); 4] = [
    ("alora_invocation_tokens", "an activated LoRA works on some tokens only"),
    ("layer_replication", "it was trained on a model with replicated layers"),
    ("arrow_config", "Arrow routes each token to adapters of its own"),
    ("use_qalora", "QALoRA pools the layer's input"),
];

impl AdapterType for Lora {
    fn about(&self) -> About {
        let slots = &[
            "lora_A",
            "lora_B.bias",
            "lora_B",
            "lora_embedding_A",
            "lora_embedding_B",
            "lora_magnitude_vector",
            "lora_diag",
            // What training needed and the merge does not: VeLoRA's projections, MonteCLoRA's sampler.
            "lora_velora_embed",
            "lora_monteclora_sampler.*",
        ];
        About { id: "LORA", name: "LoRA", prefix: "lora_", slots }
    }

    fn check(&self, module: &Module) -> Result<()> {
        LoraModule::of(module).map(|_| ())
    }

    fn check_mergeable(&self, adapter: &Adapter) -> Result<()> {
        let refuse = |what: String, help: &str| {
            let path = adapter.path().display();
            Err(Error::request(format!("adapter '{path}' cannot be merged: {what}")).help(help))
        };
        let config = adapter.config();
        if let Value::String(init) = &config.init_lora_weights
            && let Some(method) = CHANGES_THE_BASE.iter().find(|m| init.to_lowercase().starts_with(**m))
        {
            let help =
                "save it with PEFT's path_initial_model_for_weight_conversion, which makes it fit the original base";
            return refuse(
                format!("init_lora_weights is '{init}': {method} changed the base's weights before training"),
                help,
            );
        }
        let set = |value: &&Value| !matches!(value, Value::Null | Value::Bool(false));
        if let Some((key, why)) = NO_DELTA.iter().find(|(key, _)| config.other.get(*key).filter(set).is_some()) {
            return refuse(format!("{key} is set: {why}"), "PEFT cannot merge it either: use it unmerged");
        }
        let kasa = config.other.get("kasa_config").filter(set).is_some();
        if let Some(odd) = adapter.lora_modules().flatten().find(|m| m.diag.is_some() != kasa) {
            let (has, sets) = if kasa { ("no lora_diag", "sets") } else { ("a lora_diag", "does not set") };
            let what = format!("'{}' has {has} but adapter_config.json {sets} kasa_config", odd.name);
            return refuse(what, "save the adapter again");
        }
        if config.use_dora {
            if let Some(module) = adapter.lora_modules().flatten().find(|m| m.magnitude.is_none()) {
                let what = format!("use_dora is set but '{}' has no magnitude", module.name);
                return refuse(what, "save the adapter again");
            }
        } else if let Some(tensor) = adapter.lora_modules().flatten().find_map(|m| m.magnitude) {
            let what = format!("it holds '{}' but use_dora is not set", tensor.name());
            return refuse(what, "correct adapter_config.json");
        }
        Ok(())
    }

    fn is_embedding(&self, module: &Module) -> bool {
        module.get("lora_embedding_A").is_some()
    }

    fn changes_bias<'a>(&self, module: &Module<'a>) -> Option<Tensor<'a>> {
        module.get("lora_B.bias")
    }

    fn shape(&self, module: &Module) -> Result<Option<(usize, usize)>> {
        let lora = LoraModule::of(module)?;
        if lora.magnitude.is_some() || lora.diag.is_some() || lora.experts > 1 {
            return Ok(None);
        }
        Ok(Some((lora.out_features, lora.in_features)))
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let lora = LoraModule::of(module)?;
        Ok((lora.out_features, lora.in_features) == layer.shape())
    }

    fn build(&self, module: &Module, _: &Layer, weight: f64) -> Result<Boxed> {
        LoraModule::of(module)?.build(false, weight)
    }

    fn plan<'a>(&'static self, module: &Module<'a>, site: &Site) -> Result<Option<Planned<'a>>> {
        let (mut lora, file) = (LoraModule::of(module)?, module.adapter().file().path());
        if let Some((r, scaling)) = site.of_parameter {
            lora = LoraModule { r, scaling, experts: lora.r * lora.experts / r.max(1), ..lora };
        }
        if site.parameter == Parameter::Bias {
            let Some(vector) = lora.bias else { return Ok(None) };
            if *site.shape != [lora.out_features] {
                return Err(Error::request(format!(
                    "cannot merge '{}': base '{}' has shape {:?}, '{}' in '{}' has {:?}",
                    site.name,
                    site.base.display(),
                    site.shape,
                    vector.name(),
                    file.display(),
                    vector.shape()
                ))
                .help(super::made_for(module.adapter())));
            }
            let factor = site.weight * lora.scaling;
            let shape = (1, lora.out_features);
            let mut planned =
                Planned::new(file, shape, move || bias::<f32>(&vector, factor), move || bias::<f64>(&vector, factor));
            planned.tensors = vec![vector];
            return Ok(Some(planned));
        }
        if lora.diag.is_some() {
            site.refuse_weight(module, "replaces some of its singular parts (KaSA)")?;
        }
        if lora.magnitude.is_some() {
            site.refuse_weight(module, "rescales it (DoRA)")?;
        }
        let fan_in_fan_out = site.stored_in_out.unwrap_or(module.config().fan_in_fan_out);
        lora.plan(file, site.shape, fan_in_fan_out, site.experts_in_out, site.weight)
            .map(Some)
            .map_err(|found| site.refuse(module, &found))
    }
}
