//! The algorithm, without files: batches in, updates and restarts out.
//!
//! ReLoRA (arXiv 2307.05695): after a full-rank warm start the projections are frozen and `W + s B A` is trained through
//! A and B; at every restart `W += s B A`, A is drawn anew, B = 0, and the optimiser state of A and B is pruned.

use super::{
    buckets::{BUCKET, Buckets},
    config::{Config, MixedPrecision, OptimizerChoice, WeightDtype, WeightRounding},
    launch_bound::LaunchBound,
    micro_batches::MicroBatches,
    optim::Optimizer,
    phase::Phase,
    tokens::{TokenShard, Windows, mix},
};
use crate::{
    collective::{Alone, Collective},
    error::{Error, Result},
    model::{LoraSpec, Model, ParamKind, StorageFormat},
    ops::{Device, PACKED_STATS, Rounding, StepStats},
    progress::Cancellation,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// A model in training, and where it is.
pub struct Trainer<D: Device> {
    config: Config,
    phases: Vec<Phase>,
    /// The weights.
    pub model: Model<D>,
    /// The moments.
    pub optimizer: Optimizer<D>,
    shard: TokenShard,
    windows: Windows,
    collective: Arc<dyn Collective<D>>,
    micro_batches: MicroBatches,
    /// Updates made.
    pub step: u64,
    /// The cycle being trained, from 1; 0 before the first.
    pub cycle: u64,
    /// Updates made when the cycle began.
    pub cycle_start: u64,
    /// Updates skipped because loss or gradient were not finite.
    pub skipped: u64,
    tokens: Vec<u32>,
    launch_bound: LaunchBound,
    holds: bool,
    cancellation: Cancellation,
}

/// What one update did.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Mean loss of the batch before the update (natural logarithm, per prediction).
    pub loss: f64,
    /// Learning rate used.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Time in which the host waited for the device.
    pub host_wait: Duration,
    /// Whether the weights moved.
    pub outcome: UpdateOutcome,
    /// Whether someone wants the training to stop here: in this process or, as all learn with the same update, another.
    pub interrupted: bool,
}

/// What became of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpdateOutcome {
    /// The weights moved.
    Applied,
    /// Loss or gradient were not finite: the weights are as before.
    NotFinite,
    /// One of `skip_batches`: its data were not looked at, loss and gradient are NaN.
    PassedOver,
}

/// The share of skipped updates above which training stops, as in the official code.
const MAX_SKIPPED: f64 = 0.05;

impl<D: Device> Trainer<D> {
    /// Starts at update 0, in one process.
    pub fn new(config: Config, model: Model<D>, shard: TokenShard) -> Result<Self> {
        Self::spread(config, model, shard, Arc::new(Alone))
    }

    /// [`Trainer::new`], as one of the processes of `collective`: each computes its share of the windows of every update, and
    /// all make the same update.
    pub fn spread(
        config: Config,
        model: Model<D>,
        shard: TokenShard,
        collective: Arc<dyn Collective<D>>,
    ) -> Result<Self> {
        shard.check_vocabulary(model.config().vocab_size)?;
        if let Some(folder) = config.model.checkpoint.as_ref().or(config.model.warmed_up_model.as_ref()) {
            shard.check_tokenizer(folder)?;
        }
        if config.data.max_length > model.config().max_position_embeddings {
            return Err(Error::request(format!(
                "data.max_length is {}, the model has max_position_embeddings {}",
                config.data.max_length,
                model.config().max_position_embeddings
            ))
            .help("shorten data.max_length, or set [model] overrides.max_position_embeddings for a new model"));
        }
        if let Some(relora) = config.relora.as_ref().filter(|r| r.lora_r > model.config().hidden_size) {
            return Err(Error::request(format!(
                "relora.lora_r is {}, more than the model's hidden_size {}",
                relora.lora_r,
                model.config().hidden_size
            )));
        }
        let held_out = if config.data.validation.is_some() { 0.0 } else { config.data.validation_fraction };
        let seed = config.data.shuffle.then_some(config.train.seed);
        let (windows, _) = Windows::split(&shard, config.data.max_length, seed, held_out)?;
        let micro_batches = MicroBatches::new(&config, collective.rank(), collective.world_size())?;
        let sharded = config.train.optimizer == OptimizerChoice::AdamZero;
        let phases = config.phases();
        let step = config.model.warmed_up_steps.unwrap_or(0);
        // What other processes wait for must not be held back.
        let launch_bound =
            LaunchBound::new(if collective.world_size() == 1 { config.train.cuda_graphs } else { Some(false) });
        let mut trainer = Trainer {
            config,
            phases,
            model,
            optimizer: Optimizer::new(if sharded { collective.clone() } else { Arc::new(Alone) }),
            shard,
            windows,
            collective,
            micro_batches,
            step,
            cycle: 0,
            cycle_start: 0,
            skipped: 0,
            tokens: Vec::new(),
            launch_bound,
            holds: false,
            cancellation: Cancellation::new(),
        };
        trainer.model.device().allow_tf32(trainer.config.train.tf32);
        trainer.round(|_| true, |_| Rounding::Nearest);
        trainer.model.set_trainable(|_| true);
        trainer.model.set_mixed_precision(trainer.config.train.mixed_precision == MixedPrecision::Bf16);
        trainer.model.set_activation_checkpointing(trainer.config.train.activation_checkpointing);
        trainer.model.set_gradient_accumulation(micro_batches.passes > 1);
        Ok(trainer)
    }

    /// Makes an update report that the training should stop once `cancellation` is cancelled.
    pub fn observe(&mut self, cancellation: &Cancellation) {
        self.cancellation = cancellation.clone();
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The processes that train together.
    pub fn collective(&self) -> &Arc<dyn Collective<D>> {
        &self.collective
    }

    /// Whether the last update was asked for in lists that the device may make graphs of.
    pub fn uses_graphs(&self) -> bool {
        self.holds
    }

    /// The data.
    pub fn shard(&self) -> &TokenShard {
        &self.shard
    }

    /// Tokens seen after `step` updates, those of a model that was warmed up before included.
    pub fn tokens_after(&self, step: u64) -> u64 {
        let before = &self.config.model;
        let own = (step - before.warmed_up_steps.unwrap_or(0)) * self.config.tokens_per_update();
        before.warmed_up_tokens.unwrap_or(0) + own
    }

    /// The first sequence of the update that follows `step` updates, counted over all epochs. Where the model was warmed up
    /// before, the data go on after the tokens that it has seen, whatever its batch size was.
    fn first_sample(&self) -> u64 {
        let before = &self.config.model;
        let total = self.micro_batches.total as u64;
        let steps = before.warmed_up_steps.unwrap_or(0);
        let seen = match before.warmed_up_tokens {
            Some(tokens) => tokens.div_ceil(self.config.data.max_length as u64),
            None => steps * total,
        };
        seen + (self.step - steps) * total
    }

    /// Whether all updates are made.
    pub fn is_finished(&self) -> bool {
        self.step >= self.config.train.num_training_steps
    }

    /// Whether the next update is the first low-rank one: call [`Trainer::start_cycles`] before it.
    pub fn cycles_start_here(&self) -> bool {
        self.cycle == 0 && self.phase().low_rank && self.step == self.phase().first_step && !self.is_finished()
    }

    /// Whether the update just made ends a cycle before the end of the training: call [`Trainer::restart`].
    pub fn restart_is_due(&self) -> bool {
        self.cycle > 0 && self.step > self.cycle_start && self.phase().restarts_after(self.step)
    }

    fn phase(&self) -> &Phase {
        // The phases cover all updates; after the last one the last phase stays.
        let next = self.phases.iter().find(|p| self.step < p.first_step + p.steps);
        next.unwrap_or(&self.phases[self.phases.len() - 1])
    }

    /// Makes the projections what they will be while they are frozen: dropped, if the configuration wants `s B A` alone, or
    /// rounded. Comes before the base is saved and [`Trainer::start_cycles`].
    pub fn freeze_projections(&mut self) {
        if self.config.relora.as_ref().is_some_and(|r| r.lora_only) {
            let (device, params) = self.model.device_and_params_mut();
            for p in params.iter_mut().filter(|p| p.kind == ParamKind::Linear) {
                device.fill(&mut p.value, 0.0);
            }
        }
        let store = self.config.frozen_store();
        if store != StorageFormat::F32 {
            self.model.store_projections(store);
        }
    }

    /// Begins the first cycle.
    pub fn start_cycles(&mut self) -> Result<()> {
        let spec = self.lora_spec()?;
        self.model.add_lora(spec);
        self.model.set_trainable(|kind| *kind != ParamKind::Linear);
        self.model.reset_lora(self.cycle_seed(1));
        if self.config.relora.as_ref().is_some_and(|r| r.lora_only) {
            self.model.draw_b(self.cycle_seed(1));
        }
        if self.config.relora.as_ref().is_some_and(|r| r.zero_initial_a) {
            let (device, params) = self.model.device_and_params_mut();
            for p in params.iter_mut().filter(|p| p.kind == ParamKind::LoraA) {
                device.fill(&mut p.value, 0.0);
            }
        }
        self.round(|kind| kind.is_lora(), |_| Rounding::Nearest);
        self.optimizer.retain_trained(&self.model);
        self.cycle = 1;
        self.cycle_start = self.step;
        Ok(())
    }

    /// Ends a cycle and begins the next: merge, draw A anew, B = 0, prune the optimiser state. Returns the retention of the
    /// merge, see [`Trainer::finish_cycles`].
    pub fn restart(&mut self) -> Option<f64> {
        let retention = self.merge();
        self.cycle += 1;
        self.cycle_start = self.step;
        self.model.reset_lora(self.cycle_seed(self.cycle));
        self.round(|kind| kind.is_lora(), |_| Rounding::Nearest);
        if let Some(relora) = &self.config.relora {
            if relora.zero_restart_scaling {
                let (device, params) = self.model.device_and_params_mut();
                let scalings = params.iter_mut().filter(|p| p.kind == ParamKind::LoraScaling);
                scalings.for_each(|p| device.fill(&mut p.value, 0.0));
            }
            self.optimizer.prune_lora(&self.model, relora, self.cycle_seed(self.cycle));
        }
        retention
    }

    /// Merges the last cycle; the model is an ordinary one again. With rounded weights, returns the share of the delta that
    /// survived their rounding.
    pub fn finish_cycles(&mut self) -> Option<f64> {
        let retention = self.merge();
        self.model.remove_lora();
        retention
    }

    fn merge(&mut self) -> Option<f64> {
        if !self.config.rounds_merges() {
            self.model.merge_lora();
            return None;
        }
        let (mode, seed) = (self.config.train.rounding, self.rounding_seed());
        Some(self.model.merge_lora_rounded(|at| rounding(mode, seed, at)))
    }

    /// With bf16 weights, rounds the parameters of these kinds, each by its place in the list.
    fn round(&mut self, kinds: impl Fn(ParamKind) -> bool, rounding: impl Fn(usize) -> Rounding) {
        if self.config.train.dtype == WeightDtype::Bf16 {
            let (device, params) = self.model.device_and_params_mut();
            for (at, p) in params.iter_mut().enumerate().filter(|(_, p)| kinds(p.kind)) {
                device.round_to_bf16(rounding(at), &mut p.value);
            }
        }
    }

    /// Another one after every update.
    fn rounding_seed(&self) -> u64 {
        mix(self.config.train.seed ^ mix(self.step ^ (1 << 63)))
    }

    /// One update: forward and backward over the batch, clipping, AdamW.
    pub fn update(&mut self) -> Result<Update> {
        let began = Instant::now();
        self.holds = self.launch_bound.is_launch_bound() && self.model.device().begin_capture();
        let update = self.update_at_once_or_held();
        if self.holds {
            self.model.device().end_capture();
        }
        if let Ok(Update { host_wait, .. }) = &update {
            self.launch_bound.count(*host_wait, began.elapsed());
        }
        update
    }

    fn update_at_once_or_held(&mut self) -> Result<Update> {
        let t = self.config.train.clone();
        let lr = self.phase().lr_after(self.step);
        if t.skip_batches.contains(&(self.step + 1)) {
            self.step += 1;
            let outcome = UpdateOutcome::PassedOver;
            return Ok(Update {
                loss: f64::NAN,
                lr,
                grad_norm: f64::NAN,
                host_wait: Duration::ZERO,
                outcome,
                interrupted: self.alone_and_asked(),
            });
        }
        let stats = self.gradients(t.clip_grad_norm)?;
        self.optimizer.update(&mut self.model, lr, &stats, &t)?;
        // Where nothing moved, this moves nothing either.
        let (mode, seed, low_rank) = (t.rounding, self.rounding_seed(), self.model.lora().is_some());
        self.round(|kind| !(low_rank && kind == ParamKind::Linear), |at| rounding(mode, seed, at));

        self.model.device().flush();
        // Here the host waits, and nowhere else.
        let began = Instant::now();
        let StepStats { loss, squares, factor, signals } = self.model.device().read_step_stats(&stats)?;
        let host_wait = began.elapsed();
        let interrupted = signals > 0.0 || self.alone_and_asked();
        let (grad_norm, applied) = (squares.sqrt(), !factor.is_nan());
        match applied {
            true => self.optimizer.count_update(&self.model),
            false => self.skipped += 1,
        }
        // Now, not before the next pass: an evaluation between them needs the memory.
        self.model.zero_grad();
        self.step += 1;
        if self.skipped as f64 > (MAX_SKIPPED * t.num_training_steps as f64).max(1.0) {
            let after_restart = match self.cycle {
                0 | 1 => String::new(),
                _ => format!(", {} updates after the last restart", self.step - self.cycle_start),
            };
            let warmup = if self.cycle > 1 { "restart_warmup_steps" } else { "warmup_steps" };
            return Err(Error::environment(format!(
                "step {}: loss is {loss} (grad_norm {grad_norm:.1e}, lr {lr:.1e}{after_restart}); {} updates were skipped for such values, more than 5% of {}",
                self.step,
                self.skipped,
                t.num_training_steps
            ))
            .help(format!("lower train.lr or lengthen train.{warmup}")));
        }
        let outcome = if applied { UpdateOutcome::Applied } else { UpdateOutcome::NotFinite };
        Ok(Update { loss, lr, grad_norm, host_wait, outcome, interrupted })
    }

    /// Forward and backward over the update's batch: the gradients of all processes together are with the parameters, and
    /// measured.
    fn gradients(&mut self, max_norm: f64) -> Result<D::StepStats> {
        let (batches, len) = (self.micro_batches, self.config.data.max_length);
        let seed = mix(self.config.train.seed ^ mix(self.step));
        let collective = self.collective.clone();
        let alone = collective.world_size() == 1;
        let mut stats = self.model.device().step_stats();
        let mut buckets = Buckets::new(&*collective, BUCKET);
        for pass in 0..batches.passes {
            let window = batches.first + pass * batches.batch;
            self.model.set_dropout_key(seed, window);
            self.tokens.clear();
            let sample = self.first_sample() + window as u64;
            self.windows.read(&self.shard, sample, batches.batch, &mut self.tokens)?;
            let scale = batches.batch as f32 / batches.total as f32;
            let last = pass + 1 == batches.passes && !alone;
            let mut ready = |device: &D, params: &mut [_], places: &[usize]| {
                if last {
                    buckets.take(device, params, places);
                }
            };
            self.model.forward_backward_then(&self.tokens, batches.batch, len, scale, &mut stats, &mut ready)?;
            self.model.device().flush();
        }
        if !alone {
            let device = self.model.device();
            let mut numbers = device.zeros(PACKED_STATS * collective.world_size());
            let signal = if self.cancellation.is_cancelled() { 1.0 } else { 0.0 };
            device.pack_step_stats(&stats, signal, collective.rank(), &mut numbers);
            let (device, params) = self.model.device_and_params_mut();
            let numbers = buckets.finish(device, params, numbers)?;
            device.reduce_step_stats(&numbers, &mut stats);
        }
        Optimizer::measure(&self.model, max_norm, &mut stats);
        Ok(stats)
    }

    /// Whether the only process is to stop. Several agree on it, by the numbers of an update.
    fn alone_and_asked(&self) -> bool {
        self.collective.world_size() == 1 && self.cancellation.is_cancelled()
    }

    /// Rank and scale of the delta, from the configuration.
    pub fn lora_spec(&self) -> Result<LoraSpec> {
        let relora = self.config.relora.as_ref().ok_or_else(|| Error::request("mode full has no cycles"))?;
        Ok(relora.into())
    }

    fn cycle_seed(&self, cycle: u64) -> u64 {
        mix(self.config.train.seed ^ mix(cycle))
    }
}

/// How the parameter at this place is rounded.
fn rounding(mode: WeightRounding, seed: u64, at: usize) -> Rounding {
    match mode {
        WeightRounding::Nearest => Rounding::Nearest,
        WeightRounding::Stochastic => Rounding::Stochastic(mix(seed ^ mix(at as u64))),
    }
}
