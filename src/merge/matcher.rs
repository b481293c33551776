//! Finds the target of every tensor of an adapter, or names those that have none.

use super::{
    checks, expert_parameters,
    names::{Mapping, Tied, Wanted},
    plan::{Output, Plan, TokenRows},
    relora_checkpoint,
    sidecar_files::{self, ConfigChanges},
};
use crate::{
    adapter::{
        Adapter, Module, Stored,
        types::{Parameter, Site},
    },
    architecture::{Architecture, LayerKind},
    checkpoint::{Checkpoint, Dtype, Tensor, dtype, read_text},
    error::{Error, Result},
};
use serde_json::Value;
use std::collections::HashMap;

/// Matches every tensor of every adapter with its target in `base`. Everything that can be refused is refused here, before
/// anything is written. `rules` rename the adapters' tensors, FROM -> TO at the beginning of names.
pub(super) fn plan<'a>(
    base: &'a Checkpoint,
    adapters: &'a [(Adapter, f64)],
    to: Option<Dtype>,
    rules: &[(String, String)],
) -> Result<Plan<'a>> {
    let mut matcher = Matcher::new(base, to)?;
    matcher.rules = rules.to_vec();
    for (adapter, weight) in adapters {
        matcher.add(adapter, *weight)?;
    }
    matcher.plan.config.tokenizer = sidecar_files::tokenizer(base, adapters, &mut matcher.plan.warnings)?;
    matcher.finish()
}

/// The plan in the making.
pub(super) struct Matcher<'a> {
    pub base: &'a Checkpoint,
    /// The base's `config.json`, empty where there is none.
    pub config: Value,
    pub architecture: Architecture,
    pub to: Option<Dtype>,
    pub places: HashMap<String, usize>,
    pub tied: Option<Tied>,
    pub plan: Plan<'a>,
    rules: Vec<(String, String)>,
    /// The adapter being added leaves the orientation of square weights open: a layer that shows that its flag is not all layers'.
    unlike_flag: Option<String>,
}

impl<'a> Matcher<'a> {
    pub(super) fn new(base: &'a Checkpoint, to: Option<Dtype>) -> Result<Matcher<'a>> {
        let config = base.folder().map(|f| f.join("config.json")).and_then(|path| read_text(&path).ok());
        let config: Value = config.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        if to.is_some()
            && let Some(how) = checks::quantisation(base, &config)
        {
            return Err(checks::quantised(
                base,
                &how,
                "cannot apply --dtype, which would round scales and packed weights",
            ));
        }
        let architecture = Architecture::of(&config);
        let own = relora_checkpoint::find(base)?;
        let kept = base.tensors().filter(|t| !own.belongs(t.name()));
        let outputs: Vec<_> = kept.map(|t| Output::new(t.name(), t, to)).collect();
        let places = outputs.iter().enumerate().map(|(i, o)| (o.spec.name.clone(), i)).collect();
        let changes = ConfigChanges { dtype: to, ..ConfigChanges::default() };
        let plan = Plan { outputs, config: changes, warnings: Vec::new() };
        let tied = Tied::find(base, &architecture);
        let (rules, unlike_flag) = (Vec::new(), None);
        let mut matcher = Matcher { base, config, architecture, to, places, tied, plan, rules, unlike_flag };
        for module in own.modules {
            let name = module.tensor_name();
            let place = matcher.places.get(&name).copied().ok_or_else(|| relora_checkpoint::homeless(base, &module))?;
            let output = &mut matcher.plan.outputs[place];
            let planned = module.plan(base.path(), output.source.shape(), false, false, 1.0).map_err(|found| {
                let (base, file) = (output.source.file().path().display(), base.path().display());
                Error::request(format!("cannot merge '{name}': base '{base}' has {found} ('{file}')"))
                    .help("the checkpoint is damaged")
            })?;
            output.updates.push(planned);
        }
        Ok(matcher)
    }

    pub(super) fn finish(mut self) -> Result<Plan<'a>> {
        self.plan.outputs.iter().try_for_each(checks::ambiguous_dora)?;
        self.untie_if_they_differ();
        self.check_vocabulary()?;
        Ok(self.plan)
    }

    /// Adds one adapter, or refuses it as a whole.
    pub(super) fn add(&mut self, adapter: &'a Adapter, weight: f64) -> Result<()> {
        adapter.kind().check_mergeable(adapter)?;
        let modules: Vec<Module> = adapter.modules().collect();
        let shape = |m: &Module| adapter.kind().shape(m).ok().flatten();
        let wanted: Vec<Wanted> =
            modules.iter().map(|m| (m.tensor_name(), shape(m))).chain(full_names(adapter).map(|n| (n, None))).collect();
        let shown = adapter.path().display().to_string();
        let trained = adapter.config().other.get("auto_mapping").and_then(|m| m["base_model_class"].as_str());
        let mapping = Mapping::find(self.base, &self.architecture, &wanted, &self.rules, (&shown, trained))?;
        if !mapping.is_identity() {
            let rule = mapping.describe();
            self.plan.warnings.push(format!("the adapter '{shown}' names tensors unlike the base: {rule}"));
        }
        self.unlike_flag = self.unlike_flag(adapter, &mapping, &modules);
        let mut orphans = Vec::new();
        // Replacements come first: deltas are added to what replaces the base.
        for (name, part, tensor) in adapter.others().filter(|(_, part, _)| *part != Stored::TokenRows) {
            checks::empty(adapter, &tensor)?;
            if !self.replace(adapter, &mapping, name, part, tensor, weight)? {
                orphans.push(tensor.name());
            }
        }
        let places = modules.iter().filter_map(|m| self.place(&mapping, &m.tensor_name()));
        let shapes: Vec<&[usize]> = places.map(|place| self.plan.outputs[place].source.shape()).collect();
        for module in &modules {
            orphans.extend(self.add_module(adapter, &mapping, module, (&modules, &shapes), weight)?);
        }
        for (name, _, rows) in adapter.others().filter(|(_, part, _)| *part == Stored::TokenRows) {
            match self.place(&mapping, &format!("{name}.weight")) {
                Some(place) => self.replace_rows(place, adapter, name, rows, weight)?,
                None => orphans.push(rows.name()),
            }
        }
        self.warn_of_nothing(adapter, &modules);
        checks::orphans(self.base, &self.config, &self.architecture, adapter, orphans)
    }

    /// Warns of an adapter whose factors are zero: a merge of it looks like any other.
    fn warn_of_nothing(&mut self, adapter: &Adapter, modules: &[Module]) {
        // PEFT starts with B = 0; bytes of -0.0 do not come from there.
        let zero = |m: &Module| {
            let factor = |slots: [&str; 2]| slots.iter().find_map(|slot| m.get(slot));
            let factors = [factor(["lora_A", "lora_embedding_A"]), factor(["lora_B", "lora_embedding_B"])];
            let magnitude = m.get("lora_magnitude_vector").is_some() || m.get("lora_B.bias").is_some();
            let scaled = adapter.kind().id() != "LORA" || adapter.config().scaling_of(m.name()) != 0.0;
            !magnitude && (!scaled || factors.iter().flatten().any(|t| t.bytes().iter().all(|&b| b == 0)))
        };
        let dead = modules.iter().filter(|m| zero(m)).count();
        let path = adapter.path().display();
        if dead > 0 && dead == modules.len() && adapter.others().next().is_none() {
            self.plan.warnings.push(format!(
                "the adapter '{path}' changes nothing: a factor of each of its {dead} modules is zero, as before training"
            ));
        } else if dead > 0 {
            let first = modules.iter().find(|m| zero(m)).map_or("", |m| m.name());
            self.plan.warnings.push(format!(
                "{dead} of {} modules of the adapter '{path}' change nothing, a factor of them is zero; first: '{first}'",
                modules.len()
            ));
        }
    }

    /// A layer whose weight is stored `[out, in]` although the adapter says `fan_in_fan_out`, in an architecture of which nothing
    /// is known.
    fn unlike_flag(&self, adapter: &Adapter, mapping: &Mapping, modules: &[Module]) -> Option<String> {
        if !adapter.config().fan_in_fan_out {
            return None;
        }
        let proves = |m: &&Module| {
            let Ok(Some((rows, columns))) = adapter.kind().shape(m) else { return false };
            let place = self.place(mapping, &m.tensor_name());
            // `rows` and `columns` are the extents by the flag.
            rows != columns
                && place.is_some_and(|p| *self.plan.outputs[p].source.shape() == [columns, rows])
                && !adapter.kind().is_embedding(m)
        };
        modules.iter().find(proves).map(|m| m.tensor_name())
    }

    /// The output called `name` by the adapter.
    pub(super) fn place(&self, mapping: &Mapping, name: &str) -> Option<usize> {
        self.places.get(&mapping.apply(name)).or_else(|| self.places.get(name)).copied()
    }

    /// Plans the updates of one module. Returns the tensors that have no target.
    fn add_module(
        &mut self,
        adapter: &'a Adapter,
        mapping: &Mapping,
        module: &Module<'a>,
        (all, shapes): (&[Module<'a>], &[&[usize]]),
        weight: f64,
    ) -> Result<Vec<&'a str>> {
        let parameter = match adapter.config().target_parameters.as_deref() {
            Some([_, ..]) => expert_parameters::find(
                |name| self.place(mapping, name),
                |place| self.plan.outputs[place].source.shape(),
                adapter,
                module,
                all,
            )?,
            _ => None,
        };
        if let Some(target) = parameter {
            self.update(target.place, module, Parameter::Weight, (weight, shapes), Some((target.r, target.scaling)))?;
            return Ok(Vec::new());
        }
        let weight_name = module.tensor_name();
        let place = match self.place(mapping, &weight_name) {
            Some(place) => place,
            None => match self.head(mapping, &weight_name)? {
                Some(place) => place,
                None => return Ok(module.tensors().map(|t| t.name()).collect()),
            },
        };
        self.keep_head(adapter, mapping, place, all)?;
        self.update(place, module, Parameter::Weight, (weight, shapes), None)?;
        match self.place(mapping, &format!("{}.bias", module.name())) {
            Some(place) => self.update(place, module, Parameter::Bias, (weight, shapes), None)?,
            None => return Ok(adapter.kind().changes_bias(module).iter().map(Tensor::name).collect()),
        }
        Ok(Vec::new())
    }

    /// Lets a module update one output.
    fn update(
        &mut self,
        place: usize,
        module: &Module<'a>,
        parameter: Parameter,
        (weight, all): (f64, &[&[usize]]),
        of_parameter: Option<(usize, f64)>,
    ) -> Result<()> {
        let output = &self.plan.outputs[place];
        let source = output.source;
        let stored_in_out = match self.architecture.kind(&output.spec.name) {
            Some(LayerKind::Conv1d) => Some(true),
            Some(LayerKind::Linear | LayerKind::Other) => Some(false),
            Some(LayerKind::Embedding) | None => None,
        };
        let site = Site {
            parameter,
            name: source.name(),
            shape: source.shape(),
            base: source.file().path(),
            weight,
            experts_in_out: self.architecture.experts_in_out(),
            all,
            stored_in_out,
            of_parameter,
        };
        let encoded = checks::is_encoded(self.base, &output.spec.name) || !dtype::is_float(source.dtype());
        if encoded && parameter == Parameter::Weight {
            let how = checks::quantisation(self.base, &self.config);
            let how = how.unwrap_or_else(|| format!("it stores {:?} values", source.dtype()));
            return Err(checks::quantised(self.base, &how, &format!("cannot merge '{}'", output.spec.name)));
        }
        if let (None, Some(other), &[m, n]) = (stored_in_out, &self.unlike_flag, source.shape())
            && m == n
            && parameter == Parameter::Weight
            && !module.adapter().kind().is_embedding(module)
        {
            return Err(Error::request(format!(
                "cannot tell how '{}' is stored: adapter_config.json of '{}' says fan_in_fan_out ([in, out]), but '{other}' is \
                 [out, in], and this one is square",
                output.spec.name,
                module.adapter().path().display()
            ))
            .help("name the architecture in config.json (architectures), or merge this adapter with PEFT"));
        }
        let planned = module.adapter().kind().plan(module, &site).map_err(|e| match grown(module, source.shape()) {
            Some(rows) => e.help(format!(
                "the adapter was trained with {rows} tokens, the base has {}: resize the base first \
                 (`resize_token_embeddings({rows})`), then merge",
                source.shape()[0]
            )),
            None => e,
        })?;
        let Some(planned) = planned else { return Ok(()) };
        if !dtype::is_float(source.dtype()) {
            let found = format!("{:?} values, expected floating point for the delta", source.dtype());
            return Err(site.refuse(module, &found));
        }
        self.plan.outputs[place].updates.push(planned);
        Ok(())
    }

    fn replace_rows(
        &mut self,
        place: usize,
        adapter: &'a Adapter,
        module: &str,
        rows: Tensor<'a>,
        weight: f64,
    ) -> Result<()> {
        let output = &mut self.plan.outputs[place];
        let bad = |what: String| {
            Error::request(format!("cannot replace rows of '{}' by '{}': {what}", output.spec.name, rows.name()))
                .help("the adapter is damaged, or made for another model")
        };
        let indices = expert_parameters::token_indices(adapter.config(), module)
            .ok_or_else(|| bad("adapter_config.json names no trainable_token_indices for it".into()))?;
        let ([vocabulary, dimension], [count, width]) = (output.source.shape(), rows.shape()) else {
            return Err(bad(format!("expected matrices, found {:?} and {:?}", output.source.shape(), rows.shape())));
        };
        if let Some(last) = indices.iter().max().filter(|i| *i >= vocabulary) {
            return Err(bad(format!("it replaces row {last}, the base has {vocabulary}"))
                .help("training added tokens: resize the base first (`resize_token_embeddings`), then merge"));
        }
        if *count != indices.len() || width != dimension {
            return Err(bad(format!(
                "it has shape {:?} for {} rows of {:?}",
                rows.shape(),
                indices.len(),
                output.source.shape()
            )));
        }
        if weight != 1.0 {
            return Err(bad(format!("weight {weight} cannot scale a replacement")));
        }
        if let Some(other) = output.tokens.first() {
            return Err(bad(format!("the adapter '{}' replaces rows, too", other.adapter.display())));
        }
        output.tokens.push(TokenRows { indices, rows, adapter: adapter.path() });
        Ok(())
    }
}

/// The rows of a vocabulary that an update wants, where the base's has fewer.
fn grown(module: &Module, stored: &[usize]) -> Option<usize> {
    let shape = module.adapter().kind().shape(module).ok()??;
    let &[rows, columns] = stored else { return None };
    let is_vocabulary = module.adapter().kind().is_embedding(module) || module.name().ends_with("lm_head");
    // The factors of an embedding give its transpose.
    let wanted = match shape {
        (tokens, width) if width == columns => tokens,
        (width, tokens) if width == columns => tokens,
        _ => return None,
    };
    (is_vocabulary && wanted > rows).then_some(wanted)
}

fn full_names(adapter: &Adapter) -> impl Iterator<Item = String> + '_ {
    adapter.others().filter(|(_, part, _)| *part != Stored::TokenRows).map(|(name, ..)| name.to_owned())
}
