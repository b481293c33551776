//! Finds the target of every tensor of an adapter, or names those that have none.

use super::{
    companions::ConfigChanges,
    names::{Mapping, Tied},
    own_factors, parameters,
    plan::{Output, Plan, Term, TokenRows},
    refuse,
};
use crate::{
    adapter::{Adapter, Module, ModuleKind, Part},
    checkpoint::{Checkpoint, Dtype, Tensor, dtype, read_text},
    error::{Error, Result},
};
use serde_json::Value;
use std::collections::HashMap;

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
            matcher.add_low_rank(place, base.path(), None, &module, false, 1.0)?;
        }
        Ok(matcher)
    }

    pub(super) fn finish(self) -> Result<Plan<'a>> {
        self.plan.outputs.iter().try_for_each(refuse::ambiguous_dora)?;
        Ok(self.plan)
    }

    /// Adds one adapter, or refuses it as a whole.
    pub(super) fn add(&mut self, adapter: &'a Adapter, weight: f64) -> Result<()> {
        refuse::unmergeable(adapter)?;
        let modules: Vec<Module> = adapter.modules().collect::<Result<_>>()?;
        let names: Vec<String> = modules.iter().map(Module::tensor_name).chain(full_names(adapter)).collect::<Vec<_>>();
        let mapping = Mapping::find(self.base, names.iter().map(String::as_str));
        if mapping != Mapping::Identity {
            let adapter = adapter.path().display();
            let rule = mapping.describe();
            self.plan.warnings.push(format!("the adapter '{adapter}' names tensors unlike the base: {rule}"));
        }
        let mut orphans = Vec::new();
        // Replacements come first: deltas are added to what replaces the base.
        for (name, part, tensor) in adapter.others().filter(|(_, part, _)| *part != Part::TokenRows) {
            if !self.replace(adapter, &mapping, name, part, tensor, weight)? {
                orphans.push(tensor.name());
            }
        }
        for module in &modules {
            orphans.extend(self.add_module(adapter, &mapping, module, &modules, weight)?);
        }
        for (name, _, rows) in adapter.others().filter(|(_, part, _)| *part == Part::TokenRows) {
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

    /// Adds the delta of one module. Returns the tensors that have no target.
    fn add_module(
        &mut self,
        adapter: &'a Adapter,
        mapping: &Mapping,
        module: &Module<'a>,
        all: &[Module<'a>],
        weight: f64,
    ) -> Result<Vec<&'a str>> {
        let factors = vec![module.a.name(), module.b.name()];
        let parameter = parameters::find(self, adapter, mapping, module, all)?;
        let weight_name = module.tensor_name();
        let place = match parameter.or_else(|| self.place(mapping, &weight_name)) {
            Some(place) => place,
            None => match self.head(adapter, mapping, &weight_name, all)? {
                Some(place) => place,
                None => return Ok(factors),
            },
        };
        let fan_in_fan_out = adapter.config().fan_in_fan_out;
        self.add_low_rank(place, adapter.file().path(), Some(adapter), module, fan_in_fan_out, weight)?;
        if let Some(vector) = module.bias {
            let Some(place) = self.place(mapping, &format!("{}.bias", module.name)) else {
                return Ok(vec![vector.name()]);
            };
            self.expect_shape(place, adapter, &vector)?;
            self.plan.outputs[place].terms.push(Term::Bias { vector, factor: weight * module.scaling });
        }
        Ok(Vec::new())
    }

    fn add_low_rank(
        &mut self,
        place: usize,
        file: &std::path::Path,
        adapter: Option<&Adapter>,
        module: &Module<'a>,
        fan_in_fan_out: bool,
        weight: f64,
    ) -> Result<()> {
        let output = &mut self.plan.outputs[place];
        let (source, stored) = (output.source, output.source.shape());
        let refuse = |found: String| {
            let (base, file) = (source.file().path().display(), file.display());
            Error::request(format!("cannot merge '{}': base '{base}' has {found} ('{file}')", output.spec.name))
                .help(adapter.map_or_else(|| "the checkpoint is damaged".to_owned(), refuse::other_model))
        };
        let delta = [module.out_features, module.in_features];
        if !dtype::is_float(source.dtype()) {
            return Err(refuse(format!("{:?} values, expected floating point for the delta", source.dtype())));
        }
        let wanted = module.kind == ModuleKind::Embedding || fan_in_fan_out;
        let transposed = match *stored {
            [m, n] if module.experts == 1 => match (delta == [m, n], delta == [n, m]) {
                (true, true) => wanted,
                (true, false) if module.kind == ModuleKind::Linear => false,
                (false, true) if wanted => true,
                _ => return Err(refuse(format!("shape {stored:?} but B @ A gives {delta:?}"))),
            },
            [e, m, n] if module.experts == e => match (delta == [m, n], delta == [n, m]) {
                (true, true) => parameters::stored_transposed(&self.config),
                (true, false) => false,
                (false, true) => true,
                _ => return Err(refuse(format!("shape {stored:?} but B @ A of an expert gives {delta:?}"))),
            },
            _ => {
                let experts =
                    if module.experts > 1 { format!(" for {} experts", module.experts) } else { String::new() };
                return Err(refuse(format!("shape {stored:?} but B @ A gives {delta:?}{experts}")));
            }
        };
        if module.magnitude.is_some() && weight != 1.0 {
            return Err(Error::request(format!(
                "cannot merge '{}' with weight {weight}: '{}' rescales it (DoRA), which has no weighted form",
                output.spec.name,
                file.display()
            ))
            .help("merge it with weight 1"));
        }
        output.terms.push(Term::LowRank { module: *module, transposed, weight });
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
    adapter.others().filter(|(_, part, _)| *part != Part::TokenRows).map(|(name, ..)| name.to_owned())
}
