//! Parameters that an adapter stores in full: saved modules, biases, base layers, heads; and tied embeddings.

use super::{
    matcher::Matcher,
    names::Mapping,
    plan::{Output, Replacement},
};
use crate::{
    adapter::{Adapter, Module, Stored, types::made_for},
    checkpoint::{Tensor, dtype},
    error::{Error, Result},
};
use serde_json::Value;

/// Heads that PEFT saves for classification even if `modules_to_save` is empty.
const CLASSIFICATION_HEADS: [&str; 3] = ["classifier", "score", "qa_outputs"];

impl<'a> Matcher<'a> {
    /// Puts `tensor` in the place of the base's `name`. `false` if it has no place.
    pub(super) fn replace(
        &mut self,
        adapter: &'a Adapter,
        mapping: &Mapping,
        name: &str,
        part: Stored,
        tensor: Tensor<'a>,
        weight: f64,
    ) -> Result<bool> {
        let by = Replacement { adapter: adapter.path(), cycle: adapter.cycle(), added: false };
        let Some(place) = self.place(mapping, name) else {
            return self.add_missing(adapter, name, part, tensor, weight, by);
        };
        self.expect_shape(place, adapter, &tensor)?;
        if same_bytes(&self.plan.outputs[place].source, &tensor) {
            self.plan.outputs[place].replaced =
                self.plan.outputs[place].replaced.map(|r| Replacement { cycle: by.cycle, ..r });
            return Ok(true);
        }
        // Taking a delta back starts from what it was added to, which is the base at hand.
        if part == Stored::Base && weight < 0.0 {
            return Ok(true);
        }
        if part == Stored::Full {
            refuse_weight(adapter, &tensor, weight)?;
            self.untie_head(adapter, place);
        }
        let output = &mut self.plan.outputs[place];
        if let Some(before) = output.replaced
            && !(before.cycle.is_some() && before.cycle < by.cycle)
        {
            return Err(Error::request(format!(
                "'{}' and '{}' both replace '{}', with different values",
                before.adapter.display(),
                by.adapter.display(),
                output.spec.name
            ))
            .help("only the cycles of one training run, in their order, may replace each other's tensors"));
        }
        output.source = tensor;
        output.replaced = Some(Replacement { added: output.replaced.is_some_and(|r| r.added), ..by });
        Ok(true)
    }

    /// A tensor that the base lacks: the head of a tied model, or one of another task.
    fn add_missing(
        &mut self,
        adapter: &'a Adapter,
        name: &str,
        part: Stored,
        tensor: Tensor<'a>,
        weight: f64,
        by: Replacement<'a>,
    ) -> Result<bool> {
        let tied = self.tied.clone().filter(|tied| tied.is_head(name));
        if let Some(tied) = tied {
            let place = self.places[&tied.input];
            self.expect_shape(place, adapter, &tensor)?;
            // The shared matrix, stored once more.
            let again = |(other, part, t): (&str, Stored, Tensor)| {
                part == Stored::Full && other != name && same_bytes(&t, &tensor)
            };
            if part == Stored::Base || keeps_tied(adapter) && adapter.others().any(again) {
                return Ok(true);
            }
            self.plan.config.untie = true;
        } else if !is_saved_module(adapter, name) {
            return Ok(false);
        }
        refuse_weight(adapter, &tensor, weight)?;
        let like = self.plan.outputs.iter().map(|o| o.source.dtype()).find(|d| dtype::is_float(*d));
        let mut output = Output::new(name, tensor, self.to.or(like));
        output.replaced = Some(Replacement { added: true, ..by });
        self.push(output);
        Ok(true)
    }

    /// The place of a head with low-rank factors in a model that stores no head, because it is tied. Where the embedding is
    /// targeted as well, PEFT adds both deltas to the one matrix; otherwise only the head changes, and is untied.
    pub(super) fn head(
        &mut self,
        adapter: &'a Adapter,
        mapping: &Mapping,
        name: &str,
        all: &[Module<'a>],
    ) -> Result<Option<usize>> {
        let Some(tied) = self.tied.clone().filter(|tied| tied.is_head(name)) else { return Ok(None) };
        let input = self.places[&tied.input];
        let is_embedding = |m: &&Module| m.adapter().kind().is_embedding(m);
        let both = all.iter().filter(is_embedding).any(|m| self.place(mapping, &m.tensor_name()) == Some(input));
        if both {
            return Ok(Some(input));
        }
        self.plan.warnings.push(format!(
            "the adapter '{}' changes '{name}' but not the embedding it is tied to: the output is untied",
            adapter.path().display()
        ));
        self.plan.config.untie = true;
        let source = self.base.tensor(&tied.input)?;
        Ok(Some(self.push(Output::new(name, source, self.to))))
    }

    /// A saved embedding leaves the head as it was, which therefore has to be stored; unless the adapter keeps them tied.
    fn untie_head(&mut self, adapter: &Adapter, place: usize) {
        let Some(tied) = self.tied.clone() else { return };
        if self.places[&tied.input] != place || keeps_tied(adapter) || self.places.contains_key(&tied.head) {
            return;
        }
        if adapter.others().any(|(name, part, _)| part == Stored::Full && tied.is_head(name)) {
            return;
        }
        self.plan.warnings.push(format!(
            "the adapter '{}' replaces '{}' but not the head tied to it: the output is untied",
            adapter.path().display(),
            tied.input
        ));
        self.plan.config.untie = true;
        if let Some(source) = self.base.get(&tied.input) {
            self.push(Output::new(&tied.head, source, self.to));
        }
    }

    fn push(&mut self, output: Output<'a>) -> usize {
        let place = self.plan.outputs.len();
        self.places.insert(output.spec.name.clone(), place);
        self.plan.outputs.push(output);
        place
    }

    /// Refuses a tensor whose shape is not its target's.
    pub(super) fn expect_shape(&self, place: usize, adapter: &Adapter, tensor: &Tensor) -> Result<()> {
        let output = &self.plan.outputs[place];
        if output.spec.shape == tensor.shape() {
            return Ok(());
        }
        Err(Error::request(format!(
            "cannot merge '{}': base '{}' has shape {:?}, '{}' in '{}' has {:?}",
            output.spec.name,
            output.source.file().path().display(),
            output.spec.shape,
            tensor.name(),
            adapter.file().path().display(),
            tensor.shape()
        ))
        .help(made_for(adapter)))
    }
}

fn keeps_tied(adapter: &Adapter) -> bool {
    adapter.config().other.get("ensure_weight_tying") == Some(&Value::Bool(true))
}

fn same_bytes(a: &Tensor, b: &Tensor) -> bool {
    a.dtype() == b.dtype() && a.bytes() == b.bytes()
}

fn refuse_weight(adapter: &Adapter, tensor: &Tensor, weight: f64) -> Result<()> {
    if weight == 1.0 {
        return Ok(());
    }
    Err(Error::request(format!(
        "adapter '{}' replaces a tensor by '{}', which weight {weight} cannot scale",
        adapter.path().display(),
        tensor.name()
    ))
    .help("merge it with weight 1; what a replacement replaced is only in the original base"))
}

/// Whether the configuration says that the module of parameter `name` was trained in full.
fn is_saved_module(adapter: &Adapter, name: &str) -> bool {
    let config = adapter.config();
    let classifies = config.task_type.as_deref().is_some_and(|t| t.ends_with("_CLS") || t == "QUESTION_ANS");
    let saved = config.modules_to_save.iter().flatten().map(String::as_str);
    let implied = CLASSIFICATION_HEADS.into_iter().filter(|_| classifies);
    saved.chain(implied).any(|module| format!(".{name}.").contains(&format!(".{module}.")))
}
