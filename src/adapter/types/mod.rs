//! The types of adapters, one file each: which tensors a module has, what they must be, and the update they make.
//!
//! A new type is a file here with an [`AdapterType`], a line in `TYPES`, and a fixture.

mod adalora;
mod beft;
mod boft;
mod c3a;
mod deft;
mod delora;
mod fourierft;
mod glora;
mod gralora;
mod hira;
mod hra;
mod ia3;
mod ln_tuning;
mod loha;
mod lokr;
pub mod lora;
mod miss;
mod oft;
mod osf;
mod peanut;
mod randlora;
mod road;
mod shira;
mod square;
mod supertuning;
mod torch_random;
mod trainable_tokens;
mod unilora;
pub mod values;
mod vblora;
mod vera;

use super::{Module, names, names::Key};
use crate::{
    adapter::Adapter,
    checkpoint::Tensor,
    delta::{
        Planned, Update,
        forms::{self, Boxed},
    },
    error::{Error, Result},
};
use std::path::Path;

/// Every type that can be merged.
static TYPES: &[&dyn AdapterType] = &[
    &lora::Lora,
    &loha::LoHa,
    &lokr::LoKr,
    &ia3::Ia3,
    &adalora::AdaLora,
    &oft::Oft,
    &boft::Boft,
    &vera::VERA,
    &vera::PVERA,
    &hra::Hra,
    &miss::MISS,
    &miss::BONE,
    &ln_tuning::LnTuning,
    &trainable_tokens::TrainableTokens,
    &shira::Shira,
    &fourierft::FourierFt,
    &randlora::RandLora,
    &c3a::C3a,
    &road::Road,
    &gralora::GraLora,
    &hira::Hira,
    &delora::DeLora,
    &vblora::VbLora,
    &unilora::UniLora,
    &glora::Glora,
    &beft::Beft,
    &supertuning::SuperTuning,
    &deft::Deft,
    &osf::Osf,
    &peanut::Peanut,
];

/// Names of a type and of its tensors.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// `peft_type` in adapter_config.json.
    pub id: &'static str,
    /// The name that papers give it.
    pub name: &'static str,
    /// What the names of all its tensors begin with, after the module: `lora_`.
    pub prefix: &'static str,
    /// The names of its tensors after the module: `lora_A`, `lora_B.bias`; `NAME.#` stands for numbered ones, `NAME.*` for
    /// any. A name before one that it begins with.
    pub slots: &'static [&'static str],
}

/// What an adapter's tensors mean, for one value of `peft_type`.
pub trait AdapterType: Sync {
    /// Its names.
    fn about(&self) -> About;

    /// `peft_type` in adapter_config.json.
    fn id(&self) -> &'static str {
        self.about().id
    }

    /// The name that papers give it.
    fn name(&self) -> &'static str {
        self.about().name
    }

    /// What the names of all its tensors begin with, after the module.
    fn prefix(&self) -> &'static str {
        self.about().prefix
    }

    /// The names of its tensors after the module, see [`About::slots`].
    fn slots(&self) -> &'static [&'static str] {
        self.about().slots
    }

    /// Part of the names of parameters that are replaced as a whole: `.ln_tuning_layers.`.
    fn replaces(&self) -> Option<&'static str> {
        None
    }

    /// Refuses tensors of a module that do not fit each other or the configuration.
    fn check(&self, _module: &Module) -> Result<()> {
        Ok(())
    }

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

    /// `(out, input)` where the module's tensors alone determine the update, so that it can be measured without the base.
    fn shape(&self, _module: &Module) -> Result<Option<(usize, usize)>> {
        Ok(None)
    }

    /// Whether the module's tensors fit the layer.
    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool>;

    /// Why the update is no sum that a weight could scale: "scales it".
    fn no_sum(&self, _: &Module) -> Option<&'static str> {
        None
    }

    /// Rows of a layer that are mixed with each other lie between multiples of this.
    fn row_group(&self, _module: &Module, _layer: &Layer) -> usize {
        1
    }

    /// The rank of what is added; 0 where it is no product of factors.
    fn rank(&self, _module: &Module) -> usize {
        0
    }

    /// Makes the update of a layer's weight `[out, input]`, `weight` times. [`AdapterType::fits`] has seen its tensors.
    fn build(&self, module: &Module, layer: &Layer, weight: f64) -> Result<Boxed>;

    /// Makes the update in f32, for types that do not need more on weights stored in 32 bits or fewer.
    fn single(&self, _module: &Module, _weight: f64) -> Option<Result<Box<dyn Update<f32>>>> {
        None
    }

    /// Plans the update of a bias; `None` if the module leaves it alone.
    fn plan_bias<'a>(&'static self, _module: &Module<'a>, _site: &Site) -> Result<Option<Planned<'a>>> {
        Ok(None)
    }

    /// Plans the update of the tensor at `site`; `None` if the module leaves that tensor alone.
    fn plan<'a>(&'static self, module: &Module<'a>, site: &Site) -> Result<Option<Planned<'a>>> {
        if let Some(why) = self.no_sum(module) {
            site.refuse_weight(module, why)?;
        }
        if site.parameter == Parameter::Bias {
            return self.plan_bias(module, site);
        }
        let fits = |layer: &Layer| self.fits(module, layer);
        let Some(layer) = Layer::of(module, site).filter(|layer| fits(layer).unwrap_or(true)) else {
            let slots = module.slots().zip(module.tensors()).map(|(slot, t)| format!("'{slot}' {:?}", t.shape()));
            let given = slots.collect::<Vec<_>>().join(", ");
            return Err(
                site.refuse(module, &format!("shape {:?}, which {} {given} does not fit", site.shape, self.name()))
            );
        };
        fits(&layer)?;
        let (shape, file) = (layer.stored(), module.adapter().file().path());
        let (group, tensors, rank) = (self.row_group(module, &layer), module.tensors().collect(), self.rank(module));
        let (module, weight, turned) = (*module, site.weight, layer.transposed);
        let double = move || {
            let update = self.build(&module, &layer, weight)?;
            Ok(if turned { forms::transposed(update) } else { update })
        };
        let mut planned = match self.single(&module, weight) {
            Some(_) if !turned => {
                let single =
                    move || self.single(&module, weight).unwrap_or_else(|| Err(module.damaged("it needs f64")));
                Planned::new(file, shape, single, double)
            }
            _ => Planned::in_double(file, shape, double),
        };
        (planned.row_group, planned.tensors, planned.rank) = (if turned { 1 } else { group }, tensors, rank);
        Ok(Some(planned))
    }
}

/// The weight of a layer as a matrix `[out, input]`; the input of a convolution is a patch, `in * kernel`.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Outputs.
    pub out: usize,
    /// Inputs, or elements of a patch.
    pub input: usize,
    /// Extents of a convolution's kernel; empty for a linear layer.
    pub kernel: Vec<usize>,
    /// It is stored `[input, out]`.
    pub transposed: bool,
    /// `(out, input)` of all layers that the adapter updates, where the update of one depends on the others.
    pub all: Vec<(usize, usize)>,
}

impl Layer {
    fn of(module: &Module, site: &Site) -> Option<Layer> {
        let transposed = module.config().fan_in_fan_out && !module.adapter().kind().is_embedding(module);
        let (out, input, kernel) = extents(site.shape, transposed)?;
        let all = site.all.iter().filter_map(|shape| extents(shape, transposed)).map(|(out, input, _)| (out, input));
        Some(Layer {
            out,
            input,
            kernel: kernel.to_vec(),
            transposed: transposed && kernel.is_empty(),
            all: all.collect(),
        })
    }

    /// `(out, input)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.out, self.input)
    }

    /// `(rows, columns)` as stored.
    fn stored(&self) -> (usize, usize) {
        if self.transposed { (self.input, self.out) } else { (self.out, self.input) }
    }

    /// Input channels, without the kernel.
    pub fn channels(&self) -> usize {
        self.input / self.kernel.iter().product::<usize>().max(1)
    }
}

fn extents(shape: &[usize], transposed: bool) -> Option<(usize, usize, &[usize])> {
    match *shape {
        [_, _] if shape.contains(&0) => None,
        [input, out] if transposed => Some((out, input, &[])),
        [out, input] => Some((out, input, &[])),
        [out, ref patch @ ..] if patch.len() > 1 && !shape.contains(&0) => {
            Some((out, patch.iter().product(), &patch[1..]))
        }
        _ => None,
    }
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
    /// The extents of all weights that the adapter updates.
    pub all: &'a [&'a [usize]],
    /// Whether the layer's weight is stored `[in, out]`, where the base's architecture says so: PEFT's one flag per adapter
    /// cannot tell Conv1D from Linear.
    pub stored_in_out: Option<bool>,
    /// Rank and scaling of expert parameters, which their own names decide.
    pub of_parameter: Option<(usize, f64)>,
}

impl Site<'_> {
    /// The error for an update that does not fit: `found` says what the base has and what the adapter gives.
    pub fn refuse(&self, module: &Module, found: &str) -> Error {
        let (base, file) = (self.base.display(), module.adapter().file().path().display());
        Error::request(format!("cannot merge '{}': base '{base}' has {found} ('{file}')", self.name))
            .help(made_for(module.adapter()))
    }

    /// Plans the update of a bias of `count` elements, in f64.
    fn plan_bias<'m>(
        &self,
        module: &Module<'m>,
        count: usize,
        build: impl Fn(&Module<'m>) -> Result<Boxed> + Send + Sync + 'm,
    ) -> Result<Option<Planned<'m>>> {
        if *self.shape != [count] {
            return Err(self.refuse(module, &format!("shape {:?}, expected {count} elements", self.shape)));
        }
        let (file, module) = (module.adapter().file().path(), *module);
        Ok(Some(Planned::in_double(file, (1, count), move || build(&module))))
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

/// Types that no weight can hold, or that their files do not determine.
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
    ("FROD", "PEFT recomputes its bases from the base's weights when it loads the adapter"),
    ("ADAMSS", "which rows it changes is a clustering of the base that PEFT repeats when it loads the adapter"),
    ("PSOFT", "it depends on the signs of singular vectors that PEFT recomputes when it loads the adapter"),
    ("SHADOW", "it is a network beside the base; no weight of the base changes"),
];

/// The type with this `peft_type`; `path` is the adapter's, for messages.
pub(super) fn find(id: &str, path: &Path) -> Result<&'static dyn AdapterType> {
    if let Some(found) = TYPES.iter().find(|t| t.id() == id) {
        return Ok(*found);
    }
    let path = path.display();
    if let Some((_, why)) = NOT_MERGEABLE.iter().find(|(name, _)| *name == id) {
        return Err(Error::request(format!("'{path}' is a {id} adapter, which cannot be merged: {why}"))
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

/// `peft_type` of every type that can be merged.
pub fn ids() -> impl Iterator<Item = &'static str> {
    TYPES.iter().map(|t| t.id())
}

/// Plans the update of a module whose tensors alone determine it; `None` if it depends on the base.
pub fn plan_alone<'a>(module: &Module<'a>) -> Result<Option<Planned<'a>>> {
    let kind = module.adapter().kind();
    kind.check_mergeable(module.adapter())?;
    let Some((out, input)) = kind.shape(module)? else { return Ok(None) };
    let shape = if module.config().fan_in_fan_out { [input, out] } else { [out, input] };
    let name = module.tensor_name();
    let site = Site {
        parameter: Parameter::Weight,
        name: &name,
        shape: &shape,
        base: module.adapter().path(),
        weight: 1.0,
        experts_in_out: false,
        all: &[],
        stored_in_out: None,
        of_parameter: None,
    };
    kind.plan(module, &site)
}
