//! What each tensor of the output is made of. Everything that can be refused is refused here, before anything is written.

use super::{companions::ConfigChanges, names::Mapping};
use crate::{
    adapter::{Adapter, Module, ModuleKind},
    checkpoint::{Checkpoint, Dtype, Tensor, TensorSpec, dtype},
    error::{Error, Result},
};
use std::collections::HashMap;

/// The output, tensor by tensor, in the order of the base.
pub(super) struct Plan<'a> {
    pub outputs: Vec<Output<'a>>,
    pub config: ConfigChanges,
    pub warnings: Vec<String>,
}

/// One tensor of the output: `round(source + sum of terms)`.
pub(super) struct Output<'a> {
    pub spec: TensorSpec,
    pub source: Tensor<'a>,
    pub terms: Vec<Term<'a>>,
}

/// Something that is added to a tensor.
pub(super) enum Term<'a> {
    /// `weight * scaling * B @ A`, transposed where the weight is stored `[in, out]`.
    LowRank { module: Module<'a>, transposed: bool, weight: f64 },
}

impl Term<'_> {
    /// Rank of what it adds.
    pub(super) fn rank(&self) -> usize {
        match self {
            Term::LowRank { module, .. } => module.r,
        }
    }
}

impl Output<'_> {
    /// Whether its bytes are the source's.
    pub(super) fn is_copy(&self) -> bool {
        self.terms.is_empty() && self.spec.dtype == self.source.dtype()
    }

    /// The tensor seen as a matrix: all extents but the last make the rows; a vector is one row.
    pub(super) fn matrix_shape(&self) -> (usize, usize) {
        match self.spec.shape.split_last() {
            Some((&columns, [])) => (1, columns),
            Some((&columns, rows)) => (rows.iter().product(), columns),
            None => (1, 1),
        }
    }
}

impl<'a> Plan<'a> {
    /// Matches every tensor of every adapter with its target in `base`.
    pub(super) fn new(base: &'a Checkpoint, adapters: &'a [(Adapter, f64)], to: Option<Dtype>) -> Result<Plan<'a>> {
        let output = |source: Tensor<'a>| {
            let mut spec = TensorSpec::like(&source);
            spec.dtype = to.filter(|_| dtype::is_float(source.dtype())).unwrap_or(source.dtype());
            Output { spec, source, terms: Vec::new() }
        };
        let outputs: Vec<_> = base.tensors().map(output).collect();
        let config = ConfigChanges { dtype: to, ..ConfigChanges::default() };
        let plan = Plan { outputs, config, warnings: Vec::new() };
        let places = plan.outputs.iter().enumerate().map(|(i, o)| (o.source.name(), i)).collect();
        let mut matcher = Matcher { base, places, plan };
        for (adapter, weight) in adapters {
            matcher.add(adapter, *weight)?;
        }
        Ok(matcher.plan)
    }
}

struct Matcher<'a> {
    base: &'a Checkpoint,
    places: HashMap<&'a str, usize>,
    plan: Plan<'a>,
}

impl<'a> Matcher<'a> {
    fn add(&mut self, adapter: &'a Adapter, weight: f64) -> Result<()> {
        refuse_unmergeable(adapter)?;
        let modules: Vec<Module> = adapter.modules().collect::<Result<_>>()?;
        let names: Vec<String> = modules.iter().map(Module::tensor_name).collect();
        let mapping = Mapping::find(self.base, names.iter().map(String::as_str));
        if mapping != Mapping::Identity {
            self.plan.warnings.push(format!(
                "the adapter '{}' names tensors unlike the base; matched by this rule: {mapping:?}",
                adapter.path().display()
            ));
        }
        let mut orphans = Vec::new();
        for (module, name) in modules.iter().zip(&names) {
            match self.places.get(mapping.apply(name).as_str()) {
                Some(&place) => self.add_low_rank(place, adapter, module, weight)?,
                None => orphans.extend([module.a.name(), module.b.name()]),
            }
        }
        orphans.extend(adapter.others().map(|(_, _, tensor)| tensor.name()));
        refuse_orphans(self.base, adapter, orphans)
    }

    fn add_low_rank(&mut self, place: usize, adapter: &'a Adapter, module: &Module<'a>, weight: f64) -> Result<()> {
        let output = &mut self.plan.outputs[place];
        let (source, stored) = (output.source, output.source.shape());
        let refuse = |found: String| {
            let hint = match &adapter.config().base_model_name_or_path {
                Some(name) => format!("the adapter was trained on '{name}'; merge it into that model"),
                None => "the adapter seems made for another model".to_owned(),
            };
            let (base, adapter) = (source.file().path().display(), adapter.file().path().display());
            Error::request(format!("cannot merge '{}': base '{base}' has {found} ('{adapter}')", source.name()))
                .help(hint)
        };
        let delta = [module.out_features, module.in_features];
        if !dtype::is_float(source.dtype()) {
            return Err(refuse(format!("{:?} values, expected floating point for the delta", source.dtype())));
        }
        let transposed = match stored {
            [m, n] => {
                let (as_is, swapped) = (delta == [*m, *n], delta == [*n, *m]);
                let wanted = module.kind == ModuleKind::Embedding || adapter.config().fan_in_fan_out;
                match (as_is, swapped) {
                    (true, true) => wanted,
                    (true, false) if module.kind == ModuleKind::Linear => false,
                    (false, true) => true,
                    _ => return Err(refuse(format!("shape {stored:?} but B @ A gives {delta:?}"))),
                }
            }
            _ => return Err(refuse(format!("shape {stored:?} but B @ A gives {delta:?}"))),
        };
        output.terms.push(Term::LowRank { module: *module, transposed, weight });
        Ok(())
    }
}

/// Names what nobody can merge, instead of skipping it.
fn refuse_unmergeable(adapter: &Adapter) -> Result<()> {
    let refuse =
        |what: String| Err(Error::request(format!("adapter '{}' cannot be merged: {what}", adapter.path().display())));
    if adapter.config().use_dora {
        return refuse("it uses DoRA, which is not supported yet".into());
    }
    if let Some(tensor) = adapter.modules().flatten().find_map(|m| m.magnitude.or(m.bias)) {
        return refuse(format!("'{}' is not supported yet", tensor.name()));
    }
    Ok(())
}

fn refuse_orphans(base: &Checkpoint, adapter: &Adapter, orphans: Vec<&str>) -> Result<()> {
    const SHOWN: usize = 20;
    if orphans.is_empty() {
        return Ok(());
    }
    let mut list = orphans.iter().take(SHOWN).map(|n| format!("'{n}'")).collect::<Vec<_>>().join(", ");
    if orphans.len() > SHOWN {
        list += &format!(" and {} more", orphans.len() - SHOWN);
    }
    let trained_on = adapter.config().base_model_name_or_path.as_deref().unwrap_or("an unnamed model");
    Err(Error::request(format!(
        "{} of {} tensors of adapter '{}' match nothing in the base '{}': {list}",
        orphans.len(),
        adapter.file().tensors().len(),
        adapter.path().display(),
        base.path().display()
    ))
    .help(format!("the adapter was trained on '{trained_on}'; nothing was written")))
}
