//! Adapters as PEFT stores them: a folder with `adapter_config.json` and `adapter_model.safetensors`.
//!
//! What an adapter does to a weight is the matter of its type: [`types`].

mod bin;
pub mod config;
pub mod names;
mod pattern;
mod save;
pub mod types;

pub use config::AdapterConfig;
pub use save::{FullTensor, NewModule, save, save_with};
pub use types::{
    AdapterType, Site,
    lora::{Blocks, LoraModule},
};

use names::Key;

use crate::{
    checkpoint::{Tensor, TensorFile},
    error::{Error, Result},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// The name PEFT gives the tensors.
pub const ADAPTER_NAME: &str = "adapter_model.safetensors";

/// Metadata of the tensor file: the cycle of a training run that it holds, from 1.
pub const CYCLE_KEY: &str = "relora_cycle";

/// An opened adapter: its configuration, and its tensors memory-mapped and sorted by module.
pub struct Adapter {
    path: PathBuf,
    config: AdapterConfig,
    kind: &'static dyn AdapterType,
    file: TensorFile,
    /// Module -> slot -> position in the file. The tensors that all modules share belong to the module [`SHARED`].
    modules: BTreeMap<String, BTreeMap<String, usize>>,
    /// Everything else, by the name of the parameter, or of the module for rows.
    others: BTreeMap<(String, Stored), usize>,
}

/// The name of no module: what its tensors would be are shared by all.
const SHARED: &str = "";

/// How a tensor is stored that belongs to no update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stored {
    /// A parameter of the layer below an adapter (`base_layer.weight`), saved along with it.
    Base,
    /// A parameter that replaces the model's: a saved module, a bias.
    Full,
    /// `[tokens, dimension]`: rows that replace an embedding's.
    TokenRows,
}

/// Whether a folder is an adapter: it holds a configuration and tensors.
pub fn is_adapter(folder: &Path) -> bool {
    let has = |name| folder.join(name).exists();
    has(config::CONFIG_NAME) && (has(ADAPTER_NAME) || has(bin::BIN_NAME))
}

/// The tensors of an adapter's folder as they are stored, unchecked: in safetensors, or pickled by older versions of PEFT.
pub fn open_tensors(folder: &Path) -> Result<TensorFile> {
    let (tensors, pickled) = (folder.join(ADAPTER_NAME), folder.join(bin::BIN_NAME));
    match !tensors.exists() && pickled.exists() {
        true => bin::open(&pickled),
        false => TensorFile::open(&tensors),
    }
}

impl Adapter {
    /// Opens a PEFT folder and checks that its tensors fit each other and the configuration.
    pub fn open(path: &Path) -> Result<Adapter> {
        let config = AdapterConfig::open(&path.join(config::CONFIG_NAME))?;
        let kind = types::find(&config.peft_type, path)?;
        let file = open_tensors(path)?;
        let (mut modules, mut others) = (BTreeMap::<String, BTreeMap<String, usize>>::new(), BTreeMap::new());
        let name = names::adapter_name(file.tensors().map(|t| t.name())).map(str::to_owned);
        let keys: Vec<String> = file.tensors().map(|t| names::plain_key(t.name(), name.as_deref())).collect();
        for (i, tensor) in file.tensors().enumerate() {
            // Beside the trained copy the untrained one says nothing: PEFT reads past it.
            let trained = |key: &str| {
                let saved = [key.replace(names::ORIGINAL, "."), key.replace(names::ORIGINAL, ".modules_to_save.")];
                keys.iter().any(|other| saved.contains(other))
            };
            if keys[i].contains(names::ORIGINAL) && trained(&keys[i]) {
                continue;
            }
            let (owner, before) = match names::parse_key(&keys[i], kind) {
                Some(Key::Slot { module, slot }) => {
                    let before = modules.entry(module.clone()).or_default().insert(slot, i);
                    (module, before)
                }
                Some(Key::Stored { name, stored }) => (name.clone(), others.insert((name, stored), i)),
                None => {
                    return Err(Error::request(format!(
                        "'{}' holds '{}', which is no known kind of {} tensor",
                        file.path().display(),
                        tensor.name(),
                        kind.name()
                    )));
                }
            };
            // PEFT writes the trained embedding of a resized model under two names.
            let alike = |other: usize| {
                let other = file.tensor(other);
                other.dtype() == tensor.dtype() && other.shape() == tensor.shape() && other.bytes() == tensor.bytes()
            };
            if let Some(other) = before.filter(|other| !alike(*other)) {
                return Err(Error::request(format!(
                    "'{}' holds two tensors for '{owner}': '{}' and '{}'",
                    file.path().display(),
                    file.tensor(other).name(),
                    tensor.name()
                )));
            }
        }
        let adapter = Adapter { path: path.to_owned(), config, kind, file, modules, others };
        adapter.modules().try_for_each(|module| kind.check(&module))?;
        Ok(adapter)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `adapter_config.json`.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// What its tensors mean.
    pub fn kind(&self) -> &'static dyn AdapterType {
        self.kind
    }

    /// `adapter_model.safetensors`.
    pub fn file(&self) -> &TensorFile {
        &self.file
    }

    /// Which cycle of a training run it is: `relora_cycle` of the file's metadata. Of several cycles the latest decides what
    /// the parameters trained in full are.
    pub fn cycle(&self) -> Option<u64> {
        self.file.metadata().get(CYCLE_KEY)?.parse().ok()
    }

    /// The modules that it updates, by name.
    pub fn modules(&self) -> impl Iterator<Item = Module<'_>> {
        let own = self.modules.iter().filter(|(name, _)| *name != SHARED);
        own.map(|(name, slots)| Module { adapter: self, name, slots })
    }

    /// The modules of a LoRA, by name. [`Adapter::open`] has checked them: on an opened LoRA no item is an error; on an
    /// adapter of another type every one is.
    pub fn lora_modules(&self) -> impl Iterator<Item = Result<LoraModule<'_>>> {
        self.modules().map(|module| LoraModule::of(&module))
    }

    /// The tensor of a slot that all modules share.
    pub fn shared(&self, slot: &str) -> Option<Tensor<'_>> {
        self.modules.get(SHARED)?.get(slot).map(|&i| self.file.tensor(i))
    }

    /// The slots that all modules share, in their order.
    pub fn shared_slots(&self) -> impl Iterator<Item = &str> {
        self.modules.get(SHARED).into_iter().flat_map(|slots| slots.keys().map(String::as_str))
    }

    /// The tensors that belong to no update, by name.
    pub fn others(&self) -> impl Iterator<Item = (&str, Stored, Tensor<'_>)> {
        self.others.iter().map(|((name, stored), &i)| (name.as_str(), *stored, self.file.tensor(i)))
    }
}

/// A module that an adapter updates, with the tensors stored for it.
#[derive(Clone, Copy)]
pub struct Module<'a> {
    adapter: &'a Adapter,
    name: &'a str,
    slots: &'a BTreeMap<String, usize>,
}

impl<'a> Module<'a> {
    /// Name inside the model: `model.layers.0.self_attn.q_proj`.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// The adapter it belongs to.
    pub fn adapter(&self) -> &'a Adapter {
        self.adapter
    }

    /// The configuration.
    pub fn config(&self) -> &'a AdapterConfig {
        &self.adapter.config
    }

    /// The weight it changes, for models whose tensors are named as the adapter's: `NAME.weight`.
    pub fn tensor_name(&self) -> String {
        format!("{}.weight", self.name)
    }

    /// The tensor of a slot.
    pub fn get(&self, slot: &str) -> Option<Tensor<'a>> {
        self.slots.get(slot).map(|&i| self.adapter.file.tensor(i))
    }

    /// The tensor of a slot that the update cannot do without.
    pub fn need(&self, slot: &str) -> Result<Tensor<'a>> {
        self.get(slot).ok_or_else(|| self.damaged(&format!("it has no '{slot}'")))
    }

    /// Its slots, in their order.
    pub fn slots(&self) -> impl Iterator<Item = &'a str> {
        self.slots.keys().map(String::as_str)
    }

    /// Its tensors, in the order of its slots.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'a>> {
        let file = &self.adapter.file;
        self.slots.values().map(move |&i| file.tensor(i))
    }

    /// The error for tensors that do not fit each other or the configuration.
    pub fn damaged(&self, what: &str) -> Error {
        Error::request(format!("module '{}' in '{}': {what}", self.name, self.adapter.file.path().display()))
            .help("the adapter is damaged or incomplete: download or save it again")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_modules() -> (tempfile::TempDir, Vec<f32>, Vec<f32>) {
        let dir = tempfile::tempdir().unwrap();
        let a: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let b: Vec<f32> = (0..8).map(|i| -(i as f32)).collect();
        let config = AdapterConfig::new(2, 3.0, &["q_proj", "v_proj"]);
        let modules = ["model.layers.1.self_attn.v_proj", "model.layers.0.self_attn.q_proj"].map(|name| NewModule {
            name,
            r: 2,
            out_features: 4,
            in_features: 3,
            a: &a,
            b: &b,
        });
        save(dir.path(), &config, &modules).unwrap();
        (dir, a, b)
    }

    #[test]
    fn what_is_saved_is_opened() {
        let (dir, a, b) = two_modules();
        let adapter = Adapter::open(dir.path()).unwrap();
        let modules: Vec<_> = adapter.lora_modules().map(Result::unwrap).collect();
        assert_eq!(modules.len(), 2);
        assert_eq!(modules[0].tensor_name(), "model.layers.0.self_attn.q_proj.weight");
        assert_eq!((modules[0].r, modules[0].scaling), (2, 1.5));
        assert_eq!(modules[1].a.to_f32().unwrap(), a);
        assert_eq!(modules[1].b.to_f32().unwrap(), b);
    }

    #[test]
    fn a_rank_that_differs_from_the_configuration_is_refused() {
        let (dir, ..) = two_modules();
        AdapterConfig::new(3, 3.0, &["q_proj"]).write(&dir.path().join(config::CONFIG_NAME)).unwrap();
        let message = Adapter::open(dir.path()).err().unwrap().message;
        assert!(message.contains("its factors have rank 2, adapter_config.json says 3"), "{message}");
        AdapterConfig::new(0, 3.0, &["q_proj"]).write(&dir.path().join(config::CONFIG_NAME)).unwrap();
        let message = Adapter::open(dir.path()).err().unwrap().message;
        assert!(message.contains("rank 0"), "{message}");
    }
}
