//! Settings that contradict each other or make no sense are refused before anything is done.

use super::{Config, Mode};
use crate::error::{Error, Result};

impl Config {
    /// Refuses settings that contradict each other. Where the schedule of a `warmed_up_model` begins must be known before it
    /// can be checked.
    pub fn check(&self) -> Result<()> {
        self.check_ranges()?;
        self.check_relora()?;
        if self.model.warmed_up_model.is_some()
            && (self.model.warmed_up_steps.is_none() || self.train.max_train_tokens.is_some())
        {
            return Ok(());
        }
        for phase in self.phases() {
            phase.schedule.check()?;
        }
        Ok(())
    }

    fn check_ranges(&self) -> Result<()> {
        let t = &self.train;
        let m = &self.model;
        let origins = [m.preset.is_some(), m.config.is_some(), m.checkpoint.is_some(), m.warmed_up_model.is_some()];
        if origins.iter().filter(|&&x| x).count() != 1 {
            return Err(Error::request(
                "[model] must have exactly one of preset, config, checkpoint and warmed_up_model",
            ));
        }
        if m.warmed_up_model.is_none() && (m.warmed_up_steps.is_some() || m.warmed_up_tokens.is_some()) {
            return Err(Error::request("[model] warmed_up_steps and warmed_up_tokens belong to warmed_up_model"));
        }
        if m.warmed_up_model.is_some() && self.warm_start.is_some() {
            return Err(Error::request("[model] warmed_up_model and [warm_start] are two ways to do the same")
                .help("remove [warm_start]: the model is warmed up already"));
        }
        if (m.checkpoint.is_some() || m.warmed_up_model.is_some()) && !m.overrides.is_empty() {
            return Err(Error::request("[model] overrides are for new models: a checkpoint keeps its config.json"));
        }
        let positive = [
            ("data.max_length", self.data.max_length as f64 - 1.0),
            ("train.batch_size", t.batch_size as f64),
            ("train.gradient_accumulation", t.gradient_accumulation as f64),
            // A budget of tokens waits for what a warmed-up model has seen.
            ("train.num_training_steps", if t.max_train_tokens.is_some() { 1.0 } else { t.num_training_steps as f64 }),
            ("train.lr", t.lr),
            ("train.adam_eps", t.adam_eps),
            ("train.save_every", t.save_every as f64),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| value.is_nan() || *value <= 0.0) {
            let least = if *key == "data.max_length" { "at least 2" } else { "a positive number" };
            return Err(Error::request(format!("{key} must be {least}")));
        }
        let shares = [
            ("data.validation_fraction", self.data.validation_fraction),
            ("train.adam_beta1", t.adam_beta1),
            ("train.adam_beta2", t.adam_beta2),
        ];
        if let Some((key, value)) = shares.iter().find(|(_, value)| !(0.0..1.0).contains(value)) {
            return Err(Error::request(format!("{key} is {value}, expected 0 or more, below 1")));
        }
        if !(t.weight_decay >= 0.0 && t.clip_grad_norm >= 0.0) {
            return Err(Error::request("train.weight_decay and train.clip_grad_norm must not be negative"));
        }
        Ok(())
    }

    fn check_relora(&self) -> Result<()> {
        let warm = self.first_step();
        if warm >= self.train.num_training_steps && self.train.max_train_tokens.is_none() {
            let key = if self.warm_start.is_some() { "warm_start.num_training_steps" } else { "model.warmed_up_steps" };
            return Err(Error::request(format!(
                "{key} {warm} leaves nothing of train.num_training_steps {}",
                self.train.num_training_steps
            ))
            .help("train.num_training_steps counts all updates, those of the warm start included"));
        }
        let Some(relora) = &self.relora else {
            return match self.train.mode {
                Mode::Full if self.warm_start.is_none() => Ok(()),
                Mode::Full => Err(Error::request("[warm_start] is for the modes lora and relora")),
                _ => Err(Error::request("modes lora and relora need a [relora] section with lora_r and lora_alpha")),
            };
        };
        match (self.train.mode, relora.relora) {
            (Mode::Full, _) => return Err(Error::request("[relora] is for the modes lora and relora, not for full")),
            (Mode::Lora, Some(_)) => {
                return Err(Error::request("relora.relora is for mode relora: mode lora never restarts"));
            }
            (Mode::Relora, None | Some(0)) => {
                return Err(Error::request("mode relora needs relora.relora, the updates between two restarts"));
            }
            _ => {}
        }
        if relora.lora_r == 0 || !relora.lora_alpha.is_finite() || relora.lora_alpha <= 0.0 {
            return Err(Error::request(format!(
                "relora.lora_r is {} and relora.lora_alpha {}, expected positive numbers",
                relora.lora_r, relora.lora_alpha
            )));
        }
        if !(0.0..1.0).contains(&relora.lora_dropout) {
            return Err(Error::request(format!(
                "relora.lora_dropout is {}, expected 0 or more, below 1",
                relora.lora_dropout
            )));
        }
        if relora.zero_restart_scaling && !relora.train_scaling {
            return Err(Error::request("relora.zero_restart_scaling is for relora.train_scaling"));
        }
        if relora.lora_only && self.train.mode == Mode::Relora {
            return Err(Error::request(
                "relora.lora_only is for mode lora: without weights there is nothing to merge into",
            ));
        }
        if relora.lora_only && relora.quantize.is_some() {
            return Err(Error::request("relora.lora_only drops the weights that relora.quantize would keep"));
        }
        let (random, magnitude) = (relora.optimizer_random_pruning, relora.optimizer_magnitude_pruning);
        if !(0.0..1.0).contains(&random) || !(0.0..1.0).contains(&magnitude) || (random > 0.0 && magnitude > 0.0) {
            return Err(Error::request(format!(
                "relora.optimizer_random_pruning is {random} and relora.optimizer_magnitude_pruning {magnitude}, expected shares below 1, one of them 0"
            )));
        }
        Ok(())
    }
}
