//! The types of adapters, one file each: which tensors a module has, what they must be, and the update they make.
//!
//! A new type is a file here with an [`AdapterType`], a line in [`TYPES`], and a fixture.

mod loha;
pub mod lora;
pub mod values;

use super::{Module, names, names::Key};
use crate::{
    adapter::Adapter,
    checkpoint::Tensor,
    delta::Planned,
    error::{Error, Result},
};
use std::path::Path;

/// Every type that can be merged.
static TYPES: &[&dyn AdapterType] = &[&lora::Lora, &loha::LoHa];

/// What an adapter's tensors mean, for one value of `peft_type`.
pub trait AdapterType: Sync {
    /// `peft_type` in adapter_config.json.
    fn id(&self) -> &'static str;

    /// The name that papers give it.
    fn name(&self) -> &'static str;

    /// What the names of all its tensors begin with, after the module: `lora_`.
    fn prefix(&self) -> &'static str;

    /// The names of its tensors after the module: `lora_A`, `lora_B.bias`; `NAME.#` stands for numbered ones, `NAME.*` for
    /// any. A name before one that it begins with.
    fn slots(&self) -> &'static [&'static str];

    /// Part of the names of parameters that are replaced as a whole: `.ln_tuning_layers.`.
    fn replaces(&self) -> Option<&'static str> {
        None
    }

    /// Refuses tensors of a module that do not fit each other or the configuration.
    fn check(&self, module: &Module) -> Result<()>;

    /// Refuses an adapter that has no merged form, or whose files do not determine it.
    fn check_mergeable(&self, _adapter: &Adapter) -> Result<()> {
        Ok(())
    }

    /// Whether the module is an embedding.
    fn is_embedding(&self, _module: &Module) -> bool {
        false
    }

    /// The tensor of a module that changes the bias of its layer, which the base must therefore have.
    fn changes_bias<'a>(&self, _module: &Module<'a>) -> Option<Tensor<'a>> {
        None
    }

    /// The shape of the weight as stored, where the module's tensors alone determine the update: it can be measured without the base.
    fn shape(&self, module: &Module) -> Result<Option<(usize, usize)>>;

    /// Plans the update of the tensor at `site`; `None` if the module leaves that tensor alone.
    fn plan<'a>(&self, module: &Module<'a>, site: &Site<'a>) -> Result<Option<Planned<'a>>>;
}

/// What of a layer is updated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameter {
    /// Its weight.
    Weight,
    /// Its bias.
    Bias,
}

/// The tensor of a base that a module updates, and how.
#[derive(Clone, Copy)]
pub struct Site<'a> {
    /// Weight or bias.
    pub parameter: Parameter,
    /// Its name in the base.
    pub name: &'a str,
    /// Its extents as stored.
    pub shape: &'a [usize],
    /// The file of the base that holds it.
    pub base: &'a Path,
    /// What the update is multiplied with.
    pub weight: f64,
    /// The base's expert parameters are stored `[experts, in, out]`, which matters where both extents are the same.
    pub experts_in_out: bool,
}

impl Site<'_> {
    /// The error for an update that does not fit: `found` says what the base has and what the adapter gives.
    pub fn refuse(&self, module: &Module, found: &str) -> Error {
        let (base, file) = (self.base.display(), module.adapter().file().path().display());
        Error::request(format!("cannot merge '{}': base '{base}' has {found} ('{file}')", self.name))
            .help(made_for(module.adapter()))
    }

    /// Refuses a weight other than 1 for an update that is no sum.
    pub fn refuse_weight(&self, module: &Module, why: &str) -> Result<()> {
        if self.weight == 1.0 {
            return Ok(());
        }
        Err(Error::request(format!(
            "cannot merge '{}' with weight {}: '{}' {why}, which has no weighted form",
            self.name,
            self.weight,
            module.adapter().file().path().display()
        ))
        .help("merge it with weight 1"))
    }
}

/// The hint for an adapter that does not fit its base.
pub fn made_for(adapter: &Adapter) -> String {
    match &adapter.config().base_model_name_or_path {
        Some(name) => format!("the adapter was trained on '{name}'; merge it into that model"),
        None => "the adapter seems made for another model".to_owned(),
    }
}

/// Types that no weight can hold.
const NOT_MERGEABLE: &[(&str, &str)] = &[
    ("PROMPT_TUNING", "it prepends trained vectors to the input; no weight of the base changes"),
    ("MULTITASK_PROMPT_TUNING", "it prepends trained vectors to the input; no weight of the base changes"),
    ("P_TUNING", "it prepends trained vectors to the input; no weight of the base changes"),
    ("CPT", "it prepends trained vectors to the input; no weight of the base changes"),
    ("PREFIX_TUNING", "it prepends trained vectors to keys and values; no weight of the base changes"),
    ("CARTRIDGE", "it prepends trained keys and values; no weight of the base changes"),
    ("ADAPTION_PROMPT", "it adds a gated attention over trained vectors; no weight of the base changes"),
    ("POLY", "it mixes its factors by the task that is named at run time"),
    ("XLORA", "it mixes adapters by the input"),
    ("LILY", "a router weighs its factors by the input: there is no fixed update"),
    ("SHADOW", "it is a network beside the base; no weight of the base changes"),
];

/// The type with this `peft_type`; `path` is the adapter's, for messages.
pub(super) fn find(id: &str, path: &Path) -> Result<&'static dyn AdapterType> {
    if let Some(found) = TYPES.iter().find(|t| t.id() == id) {
        return Ok(*found);
    }
    let path = path.display();
    if let Some((_, why)) = NOT_MERGEABLE.iter().find(|(name, _)| *name == id) {
        return Err(Error::request(format!("'{path}' is a {id} adapter, which has no merged form: {why}"))
            .help("use it unmerged, with PEFT"));
    }
    let known: Vec<&str> = TYPES.iter().map(|t| t.id()).collect();
    Err(Error::request(format!("'{path}' is a {id} adapter, expected one of {}", known.join(", ")))
        .help("merge it with PEFT"))
}

/// Whose tensor `key` is, in an adapter with this `peft_type`. `None` if nothing is known of it.
pub fn parse_key(peft_type: &str, key: &str) -> Option<Key> {
    names::parse_key(key, *TYPES.iter().find(|t| t.id() == peft_type)?)
}
