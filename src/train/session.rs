//! A run on disk: create or resume the folder, train, save, evaluate, restart, finish.

use super::{
    checkpoints::{self, agreed_checkpoint},
    config::{Config, MixedPrecision, Mode, WeightRounding},
    evaluate::{Evaluation, evaluate},
    inputs::{check_validation, hash_data, initial_model, open_validation, resolve_warm_up},
    metrics::{EvalRow, MergeRow, Metrics, Row, UpdateRow},
    plan::reserve,
    replica_consistency,
    run_lock::RunLock,
    sidecar_files, state,
    summary::{Summary, peak_memory},
    tokens::{TokenShard, Windows},
    trainer::{Trainer, Update, UpdateOutcome},
};
use crate::{
    checkpoint::{
        Checkpoint,
        roundings::{self, Step},
    },
    collective::Collective,
    error::{Error, Result},
    inputs::Inputs,
    interrupt,
    model::{Model, StorageFormat},
    ops::Device,
    progress::Progress,
    run::{BaseRecord, CheckpointRecord, CycleRecord, Hashed, Manifest, RunDir, sha256_folder},
    staged::{self, Holds, StagedDir, Target},
};
use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// A run in progress. Several processes may train it together: the first of them writes the files and reports; the others see the
/// run directory in the same place, and only read it.
pub struct Session<D: Device> {
    dir: RunDir,
    manifest: Manifest,
    trainer: Trainer<D>,
    validation: Option<(TokenShard, Windows)>,
    /// Of the process that writes.
    metrics: Option<Metrics>,
    progress: Progress,
    /// Of the process that writes.
    _lock: Option<RunLock>,
    /// Whether to save a checkpoint and stop.
    interrupted: bool,
    started: Instant,
    train_seconds: f64,
    /// Whether the device works while the host goes on, and how long the host has waited for it.
    on_gpu: bool,
    host_wait: Duration,
    losses: Vec<f64>,
}

impl<D: Device> Session<D> {
    /// Starts a run in `dir`, which must not exist. Everything is checked before the folder is created.
    pub fn create(
        device: D,
        mut config: Config,
        dir: &Path,
        collective: &Arc<dyn Collective<D>>,
        progress: &Progress,
    ) -> Result<Session<D>> {
        if collective.is_leader() && dir.symlink_metadata().is_ok() {
            return Err(Error::request(format!("run directory '{}' exists already", dir.display()))
                .help(format!("choose another, or go on with: relora-kit train --resume {}", dir.display())));
        }
        resolve_warm_up(&mut config, progress)?;
        reserve(&device, &config, collective.world_size())?.iter().for_each(|warning| progress.warn(warning));
        let shard = TokenShard::open(&config.data.train)?;
        let model = initial_model(device, &config)?;
        let trainer = Trainer::spread(config.clone(), model, shard, collective.clone())?;
        let validation = open_validation(&trainer)?;
        check_validation(&trainer, &validation)?;
        let manifest = Manifest {
            schema: 1,
            tool: format!("relora-kit {}", env!("CARGO_PKG_VERSION")),
            mode: serde_name(&config.train.mode),
            seed: config.train.seed,
            first_step: config.model.warmed_up_steps.unwrap_or(0),
            stochastic_rounding: config.rounds_merges() && config.train.rounding == WeightRounding::Stochastic,
            quantised: match config.frozen_store() {
                StorageFormat::Quantised(how) => Some(how.name().into()),
                _ => None,
            },
            configuration: config.keys()?,
            changes: Vec::new(),
            data: hash_data(&config)?,
            base: None,
            cycles: Vec::new(),
            checkpoint: None,
            finished: false,
        };
        trainer.model.device().status()?;
        replica_consistency::check(&**collective, config.to_toml()?, &manifest.data, &trainer.model, trainer.step)?;
        let dir = RunDir(dir.to_owned());
        if !collective.is_leader() {
            return Ok(Self::new(dir, manifest, trainer, validation, (None, None), progress));
        }
        let inputs = Inputs::of([&config.data.train]);
        let staged = StagedDir::create(Target::folder(&dir.0, Holds::Run, false, &inputs)?)?;
        let config_path = staged.path().join("config.toml");
        fs::write(&config_path, config.to_toml()?).map_err(|e| Error::io("write", &config_path, e))?;
        write_manifest(&staged.path().join("manifest.json"), &manifest)?;
        sidecar_files::collect(&config, trainer.shard(), &staged.path().join(RunDir::TOKENIZER), progress)?;
        // Before the run can be seen.
        let lock = RunLock::acquire(staged.path(), &dir.0, progress)?;
        if let Err(e) = staged.commit() {
            // Where another process was faster, say which.
            return Err(if dir.0.is_dir() { RunLock::acquire(&dir.0, &dir.0, progress).err().unwrap_or(e) } else { e });
        }
        let metrics = Metrics::open(&dir.metrics_path(), 0)?;
        Ok(Self::new(dir, manifest, trainer, validation, (Some(metrics), Some(lock)), progress))
    }

    /// [`Session::create`], or [`Session::resume`] if the run exists and has this configuration. `None`: it is finished.
    pub fn create_or_resume(
        device: D,
        mut config: Config,
        dir: &Path,
        collective: &Arc<dyn Collective<D>>,
        progress: &Progress,
    ) -> Result<Option<Session<D>>> {
        // The first process may have created it before another looks.
        let exists = collective.gather(&[u8::from(dir.symlink_metadata().is_ok())])?;
        if exists[0] == [0] {
            return Session::create(device, config, dir, collective, progress).map(Some);
        }
        let run = RunDir(dir.to_owned());
        let manifest = run.manifest()?;
        resolve_warm_up(&mut config, &Progress::hidden())?;
        let (wanted, found) = (config.to_toml()?, Config::read(&run.config_path(), &[])?.to_toml()?);
        if let Some((found, wanted)) = replica_consistency::first_difference(&found, &wanted) {
            return Err(Error::request(format!(
                "run '{}' has another configuration: '{found}' instead of '{wanted}'",
                dir.display()
            ))
            .help(format!("choose another run directory, or go on as it is with --resume {}", dir.display())));
        }
        match manifest.finished {
            true => Ok(None),
            false => Session::resume(device, dir, collective, progress).map(Some),
        }
    }

    /// Goes on with the run in `dir`, from its newest checkpoint.
    pub fn resume(
        device: D,
        dir: &Path,
        collective: &Arc<dyn Collective<D>>,
        progress: &Progress,
    ) -> Result<Session<D>> {
        let dir = RunDir(dir.to_owned());
        let mut manifest = dir.manifest()?;
        let lock = collective.is_leader().then(|| RunLock::acquire(&dir.0, &dir.0, progress)).transpose()?;
        if lock.is_some() {
            // Another process may have written it before the lock was free.
            manifest = dir.manifest()?;
        }
        if manifest.finished {
            return Err(Error::request(format!("run '{}' is finished", dir.0.display()))
                .help("start a new run from its last checkpoint with [model] checkpoint"));
        }
        let config = Config::read(&dir.config_path(), &[])?;
        let data = hash_data(&config)?;
        let folder = agreed_checkpoint(&dir, &**collective, progress)?;
        let step = folder.as_deref().map_or(Ok(0), state::step_of)?;
        check_seed_and_mode(&config, &manifest)?;
        if !manifest.configuration.is_empty() {
            let changes = config.changes_since(&manifest.configuration, step, folder.is_some())?;
            for c in &changes {
                progress.info(&format!("{} changes from {} to {} after update {step}", c.key, c.from, c.to));
            }
            manifest.changes.extend(changes);
            manifest.configuration = config.keys()?;
        }
        let moved =
            |(name, hash): &(&String, &Hashed)| manifest.data.get(*name).map(|h| &h.sha256) != Some(&hash.sha256);
        if let Some((name, found)) = data.iter().find(moved) {
            return Err(Error::request(format!(
                "the {name} data differ from those that run '{}' began with: '{}' has another sha256",
                dir.0.display(),
                found.path.display()
            ))
            .help("restore the token shard; a run cannot change its data"));
        }
        manifest.data = data.clone();
        reserve(&device, &config, collective.world_size())?.iter().for_each(|warning| progress.warn(warning));
        let shard = TokenShard::open(&config.data.train)?;
        let trainer = match folder {
            None => Trainer::spread(config.clone(), initial_model(device, &config)?, shard, collective.clone())?,
            Some(folder) => {
                let store = if state::is_low_rank(&folder)? { config.frozen_store() } else { StorageFormat::F32 };
                let mixed = config.train.mixed_precision == MixedPrecision::Bf16;
                let model = Model::load_as(device, &Checkpoint::open(&folder)?, store, mixed)?;
                let mut trainer = Trainer::spread(config.clone(), model, shard, collective.clone())?;
                state::restore(&mut trainer, &folder)?;
                trainer
            }
        };
        // Cycles after the checkpoint are trained again, with the same result.
        manifest.cycles.retain(|c| c.last_step <= trainer.step);
        if manifest.base.as_ref().is_some_and(|b| b.step >= trainer.step) && trainer.cycle == 0 {
            manifest.base = None;
        }
        replica_consistency::check(&**collective, config.to_toml()?, &data, &trainer.model, trainer.step)?;
        progress.info(&format!("resuming '{}' after update {}", dir.0.display(), trainer.step));
        let validation = open_validation(&trainer)?;
        let metrics = collective.is_leader().then(|| Metrics::open(&dir.metrics_path(), trainer.step)).transpose()?;
        Ok(Self::new(dir, manifest, trainer, validation, (metrics, lock), progress))
    }

    fn new(
        dir: RunDir,
        manifest: Manifest,
        mut trainer: Trainer<D>,
        validation: Option<(TokenShard, Windows)>,
        (metrics, lock): (Option<Metrics>, Option<RunLock>),
        progress: &Progress,
    ) -> Session<D> {
        let on_gpu = trainer.model.device().peak_memory().is_some();
        trainer.observe(progress.cancellation());
        Session {
            dir,
            manifest,
            trainer,
            validation,
            metrics,
            progress: progress.clone(),
            _lock: lock,
            interrupted: false,
            started: Instant::now(),
            train_seconds: 0.0,
            on_gpu,
            host_wait: Duration::ZERO,
            losses: Vec::new(),
        }
    }

    /// Trains to the end. On Ctrl-C it saves a checkpoint first.
    pub fn run(mut self) -> Result<Summary> {
        let _deferred = interrupt::defer(true);
        let total = self.trainer.config().train.num_training_steps;
        let bar = self.progress.bar("", total, "{pos}/{len} {wide_bar} {msg} {eta} left");
        bar.set_position(self.trainer.step);
        let log_every = (total / 10).max(1);
        let first = self.trainer.step;
        self.make_up_evaluation()?;
        while !self.trainer.is_finished() {
            if self.trainer.cycles_start_here() {
                self.start_cycles()?;
            }
            let (row, update) = self.update().map_err(|e| self.with_way_on(e))?;
            bar.inc(1);
            bar.set_message(format!(
                "loss {:.4} lr {:.2e} {:.0} tokens/s cycle {}",
                row.loss, row.lr, row.tokens_per_s, row.cycle
            ));
            match update.outcome {
                UpdateOutcome::Applied => self.losses.push(update.loss),
                UpdateOutcome::PassedOver => {}
                UpdateOutcome::NotFinite => self
                    .progress
                    .warn(&format!("step {}: loss or gradient is not finite; the update was skipped", row.step)),
            }
            if !self.progress.is_visible() && (row.step % log_every == 0 || row.step == first + 1) {
                self.progress.info(&format!("step {}/{total} {}", row.step, bar.message()));
            }
            if self.trainer.restart_is_due() {
                self.save_cycle()?;
                let retention = self.trainer.restart();
                replica_consistency::check_weights(
                    &**self.trainer.collective(),
                    &self.trainer.model,
                    self.trainer.step,
                )?;
                self.note_retention(retention)?;
            }
            self.after_update()?;
        }
        bar.finish_and_clear();
        self.finish()
    }

    fn update(&mut self) -> Result<(UpdateRow, Update)> {
        let began = Instant::now();
        let cycle = self.trainer.cycle;
        let update = self.trainer.update()?;
        self.interrupted = update.interrupted;
        let seconds = began.elapsed().as_secs_f64();
        self.train_seconds += seconds;
        self.host_wait += update.host_wait;
        let per_update = self.trainer.config().tokens_per_update();
        let row = UpdateRow {
            step: self.trainer.step,
            loss: update.loss,
            lr: update.lr,
            grad_norm: update.grad_norm,
            tokens: self.trainer.tokens_after(self.trainer.step),
            tokens_per_s: per_update as f64 / seconds,
            host_wait: self.on_gpu.then(|| update.host_wait.as_secs_f64() / seconds),
            cycle,
            restarts: cycle.saturating_sub(1),
            skipped: update.outcome != UpdateOutcome::Applied,
        };
        self.write(&row)?;
        Ok((row, update))
    }

    /// The evaluation that was due after the update that the run goes on from, if an interruption came before it.
    fn make_up_evaluation(&mut self) -> Result<()> {
        let t = &self.trainer.config().train;
        let (step, every, eval_tokens) = (self.trainer.step, t.eval_every, t.eval_tokens);
        let due = every > 0 && step > self.manifest.first_step && step.is_multiple_of(every);
        if due && !self.trainer.is_finished() && self.recorded_evaluation()?.is_none() {
            self.evaluate(eval_tokens)?;
        }
        if self.interrupted {
            return Err(self.interruption());
        }
        Ok(())
    }

    /// The evaluation after this update that metrics.jsonl held when the run was resumed. In all processes, as the one that writes
    /// found it.
    fn recorded_evaluation(&self) -> Result<Option<Evaluation>> {
        let own = self.metrics.as_ref().and_then(|metrics| metrics.evaluation_at(self.trainer.step));
        let json = serde_json::to_vec(&own).map_err(|e| Error::environment(e.to_string()))?;
        let first = self.trainer.collective().gather(&json)?.swap_remove(0);
        let row: Option<EvalRow> = serde_json::from_slice(&first).map_err(|e| Error::environment(e.to_string()))?;
        Ok(row.map(|e| Evaluation { loss: e.eval_loss, perplexity: e.perplexity, predictions: e.eval_tokens }))
    }

    fn interruption(&self) -> Error {
        let message = format!("interrupted after update {}; a checkpoint was saved", self.trainer.step);
        Error { message, ..Error::interrupted() }
            .help(format!("go on with: relora-kit train --resume {}", self.dir.0.display()))
    }

    /// Adds to the help of an error how this run can go on.
    fn with_way_on(&self, e: Error) -> Error {
        let Some(help) = e.help.clone() else { return e };
        let run = self.dir.0.display();
        e.help(match &self.manifest.checkpoint {
            Some(CheckpointRecord { step, .. }) => format!(
                "{help} in '{}', then go on from the checkpoint after update {step} with: relora-kit train --resume {run}",
                self.dir.config_path().display()
            ),
            None => format!("{help}, and start a new run: no checkpoint was saved"),
        })
    }

    /// Evaluation, checkpoint, interruption, as they are due after an update that is not the last.
    fn after_update(&mut self) -> Result<()> {
        let t = &self.trainer.config().train;
        let (step, eval_every, eval_tokens) = (self.trainer.step, t.eval_every, t.eval_tokens);
        let save = step.is_multiple_of(t.save_every);
        if self.trainer.is_finished() {
            return Ok(());
        }
        if eval_every > 0 && step.is_multiple_of(eval_every) {
            self.evaluate(eval_tokens)?;
        }
        if save || self.interrupted {
            self.save_checkpoint(false)?;
        }
        if self.interrupted {
            // The first process is still writing.
            self.trainer.collective().barrier()?;
            return Err(self.interruption());
        }
        Ok(())
    }

    fn start_cycles(&mut self) -> Result<()> {
        self.trainer.freeze_projections();
        if self.leads() {
            self.save_base()?;
        }
        self.trainer.start_cycles()?;
        replica_consistency::check_weights(&**self.trainer.collective(), &self.trainer.model, self.trainer.step)
    }

    fn save_base(&mut self) -> Result<()> {
        let staged = StagedDir::own(&self.dir.base_path())?;
        state::save_model(&self.trainer.model, self.trainer.config().train.dtype, &[], staged.path())?;
        sidecar_files::copy_all(&self.dir.0.join(RunDir::TOKENIZER), staged.path())?;
        staged.commit()?;
        let files = sha256_folder(&self.dir.base_path())?;
        self.manifest.base = Some(BaseRecord { step: self.trainer.step, files });
        self.write_manifest()
    }

    /// Whether this process writes.
    fn leads(&self) -> bool {
        self.trainer.collective().is_leader()
    }

    fn write<R: Row>(&mut self, row: &R) -> Result<()> {
        self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.write(row))
    }

    /// Saves A and B of the cycle that ends now, and the parameters trained in full.
    fn save_cycle(&mut self) -> Result<()> {
        if !self.leads() {
            return Ok(());
        }
        let cycle = self.trainer.cycle;
        let folder = RunDir::cycle_folder(cycle);
        let path = self.dir.0.join(&folder);
        let staged = StagedDir::own(&path)?;
        // The adapter's base is the run's base with the cycles before it merged.
        state::save_cycle(&self.trainer.model, cycle, Path::new("../../base"), staged.path())?;
        staged.commit()?;
        let spec = self.trainer.lora_spec()?;
        self.manifest.cycles.push(CycleRecord {
            cycle,
            folder,
            first_step: self.trainer.cycle_start,
            last_step: self.trainer.step,
            r: spec.r,
            scaling: spec.scaling,
            retention: None,
            files: sha256_folder(&path)?,
        });
        self.write_manifest()
    }

    /// Writes down how much of the delta just merged survived rounding, if it was rounded.
    fn note_retention(&mut self, retention: Option<f64>) -> Result<()> {
        let (Some(retention), Some(record)) = (retention, self.manifest.cycles.last_mut()) else { return Ok(()) };
        record.retention = Some(retention);
        let row = MergeRow { step: self.trainer.step, merged_cycle: record.cycle, retention };
        let line = format!("cycle {}: {:.1}% of the delta survived rounding", row.merged_cycle, 100.0 * retention);
        if retention < 0.9 {
            self.progress.warn(&line)
        } else {
            self.progress.detail(&line)
        }
        self.write(&row)?;
        self.write_manifest()
    }

    /// How the weights were rounded since `run/base`; nothing before there is one.
    fn roundings(&self) -> Result<Vec<Step>> {
        if self.manifest.base.is_none() {
            return Ok(Vec::new());
        }
        let base = roundings::fingerprint(&Checkpoint::open(&self.dir.base_path())?)?;
        let names = self.trainer.model.params().iter().filter_map(|p| p.name.strip_suffix(".lora_A.weight"));
        let mut modules: Vec<String> = names.filter_map(|name| name.rsplit('.').next()).map(str::to_owned).collect();
        modules.sort_unstable();
        modules.dedup();
        if modules.is_empty() {
            modules = self.dir.trained_modules(&self.manifest);
        }
        Ok(self.manifest.roundings(base, None, self.trainer.step, modules).unwrap_or_default())
    }

    /// Saves a checkpoint; `finished`: nothing of the run remains to be done.
    fn save_checkpoint(&mut self, finished: bool) -> Result<()> {
        if !self.leads() {
            return state::send_moments(&self.trainer);
        }
        Inputs::of([&self.trainer.config().data.train]).check_unchanged()?;
        let step = self.trainer.step;
        let folder = RunDir::checkpoint_folder(step);
        let path = self.dir.0.join(&folder);
        let staged = StagedDir::own(&path)?;
        state::save_checkpoint(&self.trainer, &self.roundings()?, staged.path())?;
        sidecar_files::copy_all(&self.dir.0.join(RunDir::TOKENIZER), staged.path())?;
        let files = state::seal(staged.path())?;
        staged.commit()?;
        self.manifest.checkpoint = Some(CheckpointRecord { step, folder, files });
        self.manifest.finished = finished;
        self.write_manifest()?;
        self.progress.detail(&format!("saved '{}'", path.display()));
        self.drop_old_checkpoints()
    }

    /// Removes all but the newest `keep_checkpoints`, after the newest is safe.
    fn drop_old_checkpoints(&self) -> Result<()> {
        let keep = self.trainer.config().train.keep_checkpoints;
        if keep == 0 {
            return Ok(());
        }
        let steps = checkpoints::steps(&self.dir)?;
        for step in steps.into_iter().filter(|&s| s <= self.trainer.step).skip(keep) {
            let old = self.dir.0.join(RunDir::checkpoint_folder(step));
            fs::remove_dir_all(&old).map_err(|e| Error::io("remove", &old, e))?;
        }
        Ok(())
    }

    fn evaluate(&mut self, max_predictions: u64) -> Result<Option<Evaluation>> {
        let Some((shard, windows)) = &self.validation else { return Ok(None) };
        let batch_size = self.trainer.config().train.batch_size;
        let collective = self.trainer.collective().clone();
        let result = evaluate(
            &mut self.trainer.model,
            shard,
            windows,
            batch_size,
            max_predictions,
            &*collective,
            &self.progress,
        );
        let e = match result {
            // The checkpoint that an interruption wants is saved by the caller.
            Err(_) if collective.world_size() == 1 && self.progress.cancellation().is_cancelled() => {
                self.interrupted = true;
                return Ok(None);
            }
            result => result?,
        };
        let step = self.trainer.step;
        self.write(&EvalRow { step, eval_loss: e.loss, perplexity: e.perplexity, eval_tokens: e.predictions })?;
        self.progress.info(&format!("step {step} eval loss {:.4} perplexity {:.2}", e.loss, e.perplexity));
        Ok(Some(e))
    }

    /// Merges the last cycle, evaluates, writes the final checkpoint.
    fn finish(mut self) -> Result<Summary> {
        let cycles = self.trainer.cycle;
        // Without factors, this is a resumed run whose final checkpoint was written before it died.
        if self.trainer.model.lora().is_some() {
            self.save_cycle()?;
            let retention = self.trainer.finish_cycles();
            self.note_retention(retention)?;
        }
        let evaluation = match self.recorded_evaluation()? {
            Some(evaluation) => Some(evaluation),
            None => self.evaluate(u64::MAX)?,
        };
        let cut_short = self.validation.is_some() && evaluation.is_none();
        self.save_checkpoint(!cut_short)?;
        if cut_short {
            self.trainer.collective().barrier()?;
            return Err(self.interruption());
        }
        let tail = self.losses.len().div_ceil(10);
        let tail = &self.losses[self.losses.len() - tail..];
        let updates = self.losses.len() as u64;
        let trained = updates > 0;
        Ok(Summary {
            mode: self.trainer.config().train.mode,
            steps: self.trainer.step,
            cycles,
            tokens: self.trainer.tokens_after(self.trainer.step),
            loss: trained.then(|| tail.iter().sum::<f64>() / tail.len() as f64),
            evaluation,
            seconds: self.started.elapsed().as_secs_f64(),
            tokens_per_s: trained
                .then(|| (updates * self.trainer.config().tokens_per_update()) as f64 / self.train_seconds),
            world_size: self.trainer.collective().world_size(),
            skipped: self.trainer.skipped,
            checkpoint: self.dir.0.join(RunDir::checkpoint_folder(self.trainer.step)),
            run: self.dir.0,
            peak_memory: peak_memory(),
            device_peak_memory: self.trainer.model.device().peak_memory(),
            host_wait: (self.on_gpu && trained).then(|| self.host_wait.as_secs_f64() / self.train_seconds),
            cuda_graphs: self.on_gpu && self.trainer.uses_graphs(),
            operations: Vec::new(),
        })
    }

    fn write_manifest(&self) -> Result<()> {
        write_manifest(&self.dir.manifest_path(), &self.manifest)
    }
}

/// Seed and mode are in the manifest of every run, of old ones too.
fn check_seed_and_mode(config: &Config, manifest: &Manifest) -> Result<()> {
    let pairs = [
        ("train.seed", manifest.seed.to_string(), config.train.seed.to_string()),
        ("train.mode", manifest.mode.clone(), serde_name(&config.train.mode)),
    ];
    match pairs.into_iter().find(|(_, began, now)| began != now) {
        None => Ok(()),
        Some((key, began, now)) => Err(Error::request(format!(
            "{key} was {began} when the run began and is {now} in its config.toml: that would be another run"
        ))
        .help(format!("write {began} again, or start a new run"))),
    }
}

fn write_manifest(path: &Path, manifest: &Manifest) -> Result<()> {
    let json = serde_json::to_string_pretty(manifest).map_err(|e| Error::environment(e.to_string()))? + "\n";
    staged::write_own(path, json.as_bytes())
}

fn serde_name(mode: &Mode) -> String {
    serde_json::to_value(mode).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}
