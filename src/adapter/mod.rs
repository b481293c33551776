//! LoRA as PEFT stores it: a folder with `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Letters: A is `[r, in]`, B is `[out, r]`, the delta of a weight `[out, in]` is `scaling * B @ A`.

mod bin;
pub mod config;
pub mod names;
mod pattern;
mod save;

pub use config::AdapterConfig;
pub use names::Part;
pub use save::{FullTensor, NewModule, save, save_with};

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
    file: TensorFile,
    // Module (or parameter, for `Part::Full` and `Part::Base`) -> parts -> position in the file.
    parts: BTreeMap<String, BTreeMap<Part, usize>>,
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
        if config.peft_type != "LORA" {
            return Err(Error::request(format!(
                "'{}' is a {} adapter, expected LORA",
                path.display(),
                config.peft_type
            )));
        }
        let file = open_tensors(path)?;
        let mut parts: BTreeMap<String, BTreeMap<Part, usize>> = BTreeMap::new();
        for (i, tensor) in file.tensors().enumerate() {
            let (module, part) = names::parse_key(tensor.name()).ok_or_else(|| {
                Error::request(format!(
                    "'{}' holds '{}', which is no known kind of LoRA tensor",
                    file.path().display(),
                    tensor.name()
                ))
            })?;
            if let Some(other) = parts.entry(module.clone()).or_default().insert(part, i) {
                return Err(Error::request(format!(
                    "'{}' holds two tensors for '{module}': '{}' and '{}'",
                    file.path().display(),
                    file.tensor(other).name(),
                    tensor.name()
                )));
            }
        }
        let adapter = Adapter { path: path.to_owned(), config, file, parts };
        for module in adapter.modules() {
            module?;
        }
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

    /// `adapter_model.safetensors`.
    pub fn file(&self) -> &TensorFile {
        &self.file
    }

    /// Which cycle of a training run it is: `relora_cycle` of the file's metadata. Of several cycles the latest decides what
    /// the parameters trained in full are.
    pub fn cycle(&self) -> Option<u64> {
        self.file.metadata().get(CYCLE_KEY)?.parse().ok()
    }

    /// The modules with a low-rank delta, by name. [`Adapter::open`] has checked them: on an opened adapter no item is
    /// an error.
    pub fn modules(&self) -> impl Iterator<Item = Result<Module<'_>>> {
        self.parts.iter().filter_map(|(name, parts)| self.module(name, parts).transpose())
    }

    /// The tensors that are not factors: parameters stored in full, by parameter name, and replaced token rows, by
    /// module name.
    pub fn others(&self) -> impl Iterator<Item = (&str, Part, Tensor<'_>)> {
        self.parts.iter().flat_map(move |(name, parts)| {
            let plain = |part: &Part| matches!(part, Part::Full | Part::Base | Part::TokenRows);
            parts.iter().filter(move |(p, _)| plain(p)).map(|(&p, &i)| (name.as_str(), p, self.file.tensor(i)))
        })
    }

    fn module<'a>(&'a self, name: &'a str, parts: &BTreeMap<Part, usize>) -> Result<Option<Module<'a>>> {
        let get = |part| parts.get(&part).map(|&i: &usize| self.file.tensor(i));
        let bad = |what: String| {
            Error::request(format!("module '{name}' in '{}': {what}", self.file.path().display()))
                .help("the adapter is damaged or incomplete: download or save it again")
        };
        let (a, b, kind) = match (get(Part::A), get(Part::B), get(Part::EmbeddingA), get(Part::EmbeddingB)) {
            (Some(a), Some(b), None, None) => (a, b, ModuleKind::Linear),
            (None, None, Some(a), Some(b)) => (a, b, ModuleKind::Embedding),
            (None, None, None, None) if get(Part::Magnitude).is_none() && get(Part::BiasB).is_none() => {
                return Ok(None);
            }
            _ => return Err(bad("expected one A and one B factor, found only part of them".into())),
        };
        if a.shape().len() > 2 {
            return Err(Error::request(format!(
                "module '{name}' in '{}' is a convolution, of which A {:?} and B {:?} are the factors: only linear layers and \
                 embeddings are supported",
                self.file.path().display(),
                a.shape(),
                b.shape()
            ))
            .help("merge this adapter with PEFT"));
        }
        let (&[r, n], &[m, r_b]) = (a.shape(), b.shape()) else {
            return Err(bad(format!("expected matrices A and B, found shapes {:?} and {:?}", a.shape(), b.shape())));
        };
        if r != r_b || r == 0 {
            return Err(bad(format!("A {:?} and B {:?} do not share a rank above 0", a.shape(), b.shape())));
        }
        let vector = |part, what: &str| match get(part) {
            Some(v) if v.elements() != m => {
                Err(bad(format!("{what} has shape {:?}, expected {m} elements", v.shape())))
            }
            v => Ok(v),
        };
        let (magnitude, bias) = (vector(Part::Magnitude, "the DoRA magnitude")?, vector(Part::BiasB, "the bias of B")?);
        let configured = self.config.rank_of(name);
        if configured == 0 {
            return Err(bad("adapter_config.json gives it rank 0, expected at least 1".into()));
        }
        // Expert parameters stack one pair of factors per expert along the rank.
        let experts = match self.config.target_parameters.as_deref() {
            Some([_, ..]) if r % configured == 0 => r / configured,
            _ => 1,
        };
        if r != configured * experts {
            return Err(bad(format!("its factors have rank {r}, adapter_config.json says {configured}")));
        }
        Ok(Some(Module {
            name,
            kind,
            a,
            b,
            magnitude,
            bias,
            r: configured,
            experts,
            out_features: m,
            in_features: n,
            scaling: self.config.scaling_of(name),
        }))
    }
}

/// What kind of weight a delta belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// `y = x Wᵀ`: W is `[out, in]` (or `[in, out]` with `fan_in_fan_out`).
    Linear,
    /// W is `[vocabulary, dimension]`, its delta `scaling * (B @ A)ᵀ`.
    Embedding,
}

/// The low-rank delta of one module, as stored.
#[derive(Clone, Copy)]
pub struct Module<'a> {
    /// Name inside the model: `model.layers.0.self_attn.q_proj`.
    pub name: &'a str,
    /// Linear or embedding.
    pub kind: ModuleKind,
    /// `[r, in]`, or `[r, vocabulary]`.
    pub a: Tensor<'a>,
    /// `[out, r]`, or `[dimension, r]`.
    pub b: Tensor<'a>,
    /// DoRA's magnitude, one per output.
    pub magnitude: Option<Tensor<'a>>,
    /// The bias of B, one per output.
    pub bias: Option<Tensor<'a>>,
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

impl Module<'_> {
    /// The weight it changes, for models whose tensors are named as the adapter's: `NAME.weight`.
    pub fn tensor_name(&self) -> String {
        format!("{}.weight", self.name)
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
        let modules: Vec<_> = adapter.modules().map(Result::unwrap).collect();
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
