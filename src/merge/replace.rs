//! Parameters that an adapter stores in full: saved modules, biases, base layers, heads; and tied embeddings.

use super::{
    matcher::Matcher,
    names::{Mapping, Tied},
    plan::{Output, Replacement},
};
use crate::{
    adapter::{Adapter, Module, Stored, types::made_for},
    architecture::is_end,
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
            return self.add_missing(adapter, mapping, name, (part, tensor), weight);
        };
        if !self.may_resize(place, adapter, &tensor) {
            self.expect_shape(place, adapter, &tensor)?;
        }
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
        output.spec.shape = tensor.shape().to_vec();
        output.replaced = Some(Replacement { added: output.replaced.is_some_and(|r| r.added), ..by });
        let name = output.spec.name.clone();
        self.describe_head(adapter, &name, &tensor);
        Ok(true)
    }

    /// Whether a tensor may have more rows than what it replaces: a vocabulary that training extended, or a classifier for another
    /// number of labels.
    fn may_resize(&self, place: usize, adapter: &Adapter, tensor: &Tensor) -> bool {
        let output = &self.plan.outputs[place];
        let (stored, found) = (&output.spec.shape, tensor.shape());
        if stored.len() != found.len() || stored.is_empty() || stored[1..] != found[1..] {
            return false;
        }
        let name = output.spec.name.as_str();
        self.is_vocabulary(name) && found[0] > stored[0] || is_saved_module(adapter, name) && is_classifier(name)
    }

    /// Whether the rows of a tensor belong to tokens: the input embedding, the head, its bias.
    fn is_vocabulary(&self, name: &str) -> bool {
        let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
        let last = module.rsplit('.').next().unwrap_or(module);
        let tied = self.tied.as_ref().is_some_and(|tied| name == tied.input || tied.is_head(name));
        const INPUTS: [&str; 6] = ["embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tokens_embed"];
        tied || ["lm_head", "embed_out"].contains(&last) || INPUTS.contains(&last)
    }

    /// A vocabulary that grew has to grow in embedding and head alike, and in config.json.
    pub(super) fn check_vocabulary(&mut self) -> Result<()> {
        let name = |o: &Output| o.spec.name.clone();
        let rows: Vec<(String, usize, usize)> = (self.plan.outputs.iter())
            .filter(|o| o.spec.shape.len() == 2 && self.is_vocabulary(&o.spec.name))
            .map(|o| {
                let before = self.base.get(&o.spec.name).and_then(|t| t.shape().first().copied());
                (name(o), before.unwrap_or(o.spec.shape[0]), o.spec.shape[0])
            })
            .collect();
        let Some((grew, before, after)) = rows.iter().find(|(_, before, after)| before != after) else { return Ok(()) };
        if let Some((other, _, stayed)) = rows.iter().find(|(_, b, a)| b == before && a == b) {
            return Err(Error::request(format!(
                "'{grew}' grew from {before} to {after} rows, but '{other}' has {stayed}: the adapter was trained with {after} \
                 tokens and holds only one of them"
            ))
            .help(format!("resize the base first (`resize_token_embeddings({after})`), then merge")));
        }
        self.plan.config.vocabulary = Some(*after);
        let (before, after) = (*before, *after);
        self.plan.warnings.push(format!("the vocabulary grows from {before} to {after} rows; config.json says so"));
        Ok(())
    }

    /// Lets config.json describe a classifier: its labels, and the class that has it.
    fn describe_head(&mut self, adapter: &Adapter, name: &str, tensor: &Tensor) {
        const TASKS: [(&str, &str); 3] = [
            ("SEQ_CLS", "ForSequenceClassification"),
            ("TOKEN_CLS", "ForTokenClassification"),
            ("QUESTION_ANS", "ForQuestionAnswering"),
        ];
        let Some((_, class)) = TASKS.iter().find(|(task, _)| adapter.config().task_type.as_deref() == Some(*task))
        else {
            return;
        };
        // The last layer of a head of several: `classifier.out_proj`.
        let last = ["score.weight", "classifier.weight", "classifier.out_proj.weight", "qa_outputs.weight"];
        let Some(&labels) = tensor.shape().first().filter(|_| last.iter().any(|end| is_end(name, end))) else {
            return;
        };
        self.plan.config.labels = Some(labels).filter(|_| *class != "ForQuestionAnswering");
        self.plan.config.task = Some((*class).to_owned());
    }

    /// A model that stores embedding and head and says that they are one: once one of them changes, they are two.
    pub(super) fn untie_if_they_differ(&mut self) {
        let Some(tied) = self.tied.clone().filter(|tied| tied.head_stored) else { return };
        if self.architecture.ties() != Some(true) || self.plan.config.untie {
            return;
        }
        let [input, head] = [&tied.input, &tied.head].map(|name| &self.plan.outputs[self.places[name]]);
        let changed = |o: &Output| !o.is_unchanged() || o.replaced.is_some();
        let alike = input.is_unchanged() && head.is_unchanged() && same_bytes(&input.source, &head.source);
        if (changed(input) || changed(head)) && !alike {
            self.plan.config.untie = true;
            self.plan.warnings.push(format!(
                "'{}' and '{}' are not one matrix any more: the output is untied",
                tied.input, tied.head
            ));
        }
    }

    /// A tensor that the base lacks: the head of a tied model, or one of another task.
    fn add_missing(
        &mut self,
        adapter: &'a Adapter,
        mapping: &Mapping,
        name: &str,
        (part, tensor): (Stored, Tensor<'a>),
        weight: f64,
    ) -> Result<bool> {
        let by = Replacement { adapter: adapter.path(), cycle: adapter.cycle(), added: false };
        let mapped = mapping.apply(name);
        let tied = self.tied.clone().filter(|tied| !tied.head_stored && (tied.is_head(name) || tied.is_head(&mapped)));
        let mut name = name;
        if let Some(tied) = &tied {
            let place = self.places[&tied.input];
            if !self.may_resize(place, adapter, &tensor) {
                self.expect_shape(place, adapter, &tensor)?;
            }
            // The shared matrix, stored once more.
            let again = |(other, part, t): (&str, Stored, Tensor)| {
                part == Stored::Full && self.place(mapping, other) == Some(place) && same_bytes(&t, &tensor)
            };
            if part == Stored::Base || adapter.others().any(again) {
                return Ok(true);
            }
            self.plan.config.untie = true;
            name = &tied.head;
        } else if !is_saved_module(adapter, name) || self.is_inside(name) || self.is_inside(&mapped) {
            return Ok(false);
        }
        self.describe_head(adapter, name, &tensor);
        refuse_weight(adapter, &tensor, weight)?;
        let like = self.plan.outputs.iter().map(|o| o.source.dtype()).find(|d| dtype::is_float(*d));
        let mut output = Output::new(name, tensor, self.to.or(like));
        output.replaced = Some(Replacement { added: true, ..by });
        self.push(output);
        Ok(true)
    }

    /// Whether the base has other tensors where `name` would lie: a model reads no more there than its own.
    fn is_inside(&self, name: &str) -> bool {
        let top = name.split('.').next().unwrap_or(name);
        self.base.tensors().any(|t| t.name().strip_prefix(top).is_some_and(|rest| rest.starts_with('.')))
    }

    /// The place of a head with low-rank factors in a model that stores no head, because it is tied: it becomes a matrix of its
    /// own, as it was in training, where the factors stand beside the layer and the shared matrix stays as it is.
    pub(super) fn head(&mut self, mapping: &Mapping, name: &str) -> Result<Option<usize>> {
        let tied = self.tied.clone().filter(|tied| !tied.head_stored);
        let Some(tied) = tied.filter(|tied| tied.is_head(name) || tied.is_head(&mapping.apply(name))) else {
            return Ok(None);
        };
        self.untie(&tied, "changes the head of a tied model").map(Some)
    }

    /// Before factors change the embedding of a tied model: the head keeps the matrix that it had in training, unless the adapter
    /// ties them.
    pub(super) fn keep_head(
        &mut self,
        adapter: &Adapter,
        mapping: &Mapping,
        place: usize,
        all: &[Module<'a>],
    ) -> Result<()> {
        let Some(tied) = self.tied.clone().filter(|tied| !tied.head_stored) else { return Ok(()) };
        let is_input = self.places[&tied.input] == place;
        let has_head =
            all.iter().any(|m| tied.is_head(&m.tensor_name()) || tied.is_head(&mapping.apply(&m.tensor_name())));
        if !is_input || self.places.contains_key(&tied.head) || keeps_tied(adapter) && !has_head {
            return Ok(());
        }
        self.untie(&tied, "changes the embedding of a tied model").map(|_| ())
    }

    fn untie(&mut self, tied: &Tied, why: &str) -> Result<usize> {
        self.plan.warnings.push(format!("an adapter {why}, '{}': the output is untied", tied.input));
        self.plan.config.untie = true;
        // What an adapter replaced is in the place of the embedding, the head is the base's.
        let source = self.base.tensor(&tied.input)?;
        Ok(self.push(Output::new(&tied.head, source, self.to)))
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

/// Whether a tensor belongs to the head of a classifier.
fn is_classifier(name: &str) -> bool {
    name.split('.').any(|part| CLASSIFICATION_HEADS.contains(&part))
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
