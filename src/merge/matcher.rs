//! Finds the target of every tensor of an adapter, or names those that have none.

use super::{
    companions::ConfigChanges,
    names::{Mapping, Tied},
    own_factors, parameters,
    plan::{Output, Plan, TokenRows},
    refuse,
};
use crate::{
    adapter::{
        Adapter, LoraModule, Module, Stored,
        types::{Parameter, Site},
    },
    checkpoint::{Checkpoint, Dtype, Tensor, dtype, read_text},
    error::{Error, Result},
};
use serde_json::Value;
use std::collections::HashMap;

/// Matches every tensor of every adapter with its target in `base`. Everything that can be refused is refused here, before
/// anything is written.
pub(super) fn plan<'a>(base: &'a Checkpoint, adapters: &'a [(Adapter, f64)], to: Option<Dtype>) -> Result<Plan<'a>> {
    let mut matcher = Matcher::new(base, to)?;
    for (adapter, weight) in adapters {
        matcher.add(adapter, *weight)?;
    }
    matcher.finish()
}

/// The plan in the making.
pub(super) struct Matcher<'a> {
    pub base: &'a Checkpoint,
    /// The base's `config.json`, empty where there is none.
    pub config: Value,
    pub to: Option<Dtype>,
    pub places: HashMap<String, usize>,
    pub tied: Option<Tied>,
    pub plan: Plan<'a>,
}

impl<'a> Matcher<'a> {
    pub(super) fn new(base: &'a Checkpoint, to: Option<Dtype>) -> Result<Matcher<'a>> {
        let config = base.folder().map(|f| f.join("config.json")).and_then(|path| read_text(&path).ok());
        let config = config.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let own = own_factors::find(base)?;
        let kept = base.tensors().filter(|t| !own.belongs(t.name()));
        let outputs: Vec<_> = kept.map(|t| Output::new(t.name(), t, to)).collect();
        let places = outputs.iter().enumerate().map(|(i, o)| (o.spec.name.clone(), i)).collect();
        let changes = ConfigChanges { dtype: to, ..ConfigChanges::default() };
        let plan = Plan { outputs, config: changes, warnings: Vec::new() };
        let tied = Tied::find(base, &config);
        let mut matcher = Matcher { base, config, to, places, tied, plan };
        for module in own.modules {
            let name = module.tensor_name();
            let place = matcher.places.get(&name).copied().ok_or_else(|| own_factors::homeless(base, &module))?;
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

    pub(super) fn finish(self) -> Result<Plan<'a>> {
        self.plan.outputs.iter().try_for_each(refuse::ambiguous_dora)?;
        Ok(self.plan)
    }

    /// Adds one adapter, or refuses it as a whole.
    pub(super) fn add(&mut self, adapter: &'a Adapter, weight: f64) -> Result<()> {
        adapter.kind().check_mergeable(adapter)?;
        let modules: Vec<Module> = adapter.modules().collect();
        let names: Vec<String> = modules.iter().map(Module::tensor_name).chain(full_names(adapter)).collect::<Vec<_>>();
        let mapping = Mapping::find(self.base, names.iter().map(String::as_str));
        if mapping != Mapping::Identity {
            let adapter = adapter.path().display();
            let rule = mapping.describe();
            self.plan.warnings.push(format!("the adapter '{adapter}' names tensors unlike the base: {rule}"));
        }
        let mut orphans = Vec::new();
        // Replacements come first: deltas are added to what replaces the base.
        for (name, part, tensor) in adapter.others().filter(|(_, part, _)| *part != Stored::TokenRows) {
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
        refuse::orphans(self.base, adapter, orphans)
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
            Some([_, ..]) => {
                let lora = adapter.lora_modules().collect::<Result<Vec<_>>>()?;
                parameters::find(self, adapter, mapping, &LoraModule::of(module)?, &lora)?
            }
            _ => None,
        };
        let weight_name = module.tensor_name();
        let place = match parameter.or_else(|| self.place(mapping, &weight_name)) {
            Some(place) => place,
            None => match self.head(adapter, mapping, &weight_name, all)? {
                Some(place) => place,
                None => return Ok(module.tensors().map(|t| t.name()).collect()),
            },
        };
        self.update(place, module, Parameter::Weight, weight, shapes)?;
        match self.place(mapping, &format!("{}.bias", module.name())) {
            Some(place) => self.update(place, module, Parameter::Bias, weight, shapes)?,
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
        weight: f64,
        all: &[&[usize]],
    ) -> Result<()> {
        let output = &mut self.plan.outputs[place];
        let source = output.source;
        let site = Site {
            parameter,
            name: source.name(),
            shape: source.shape(),
            base: source.file().path(),
            weight,
            experts_in_out: parameters::stored_transposed(&self.config),
            all,
        };
        let Some(planned) = module.adapter().kind().plan(module, &site)? else { return Ok(()) };
        if !dtype::is_float(source.dtype()) {
            let found = format!("{:?} values, expected floating point for the delta", source.dtype());
            return Err(site.refuse(module, &found));
        }
        output.updates.push(planned);
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
        let indices = parameters::token_indices(adapter.config(), module)
            .ok_or_else(|| bad("adapter_config.json names no trainable_token_indices for it".into()))?;
        let ([vocabulary, dimension], [count, width]) = (output.source.shape(), rows.shape()) else {
            return Err(bad(format!("expected matrices, found {:?} and {:?}", output.source.shape(), rows.shape())));
        };
        if *count != indices.len() || width != dimension || indices.iter().any(|i| i >= vocabulary) {
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

fn full_names(adapter: &Adapter) -> impl Iterator<Item = String> + '_ {
    adapter.others().filter(|(_, part, _)| *part != Stored::TokenRows).map(|(name, ..)| name.to_owned())
}
