//! `relora-kit train`

use super::{Outcome, parse_device};
use crate::{
    error::{Error, Result},
    ops::{Cpu, Device, Profiled},
    progress::Progress,
    report::{self, Format},
    staged,
    train::{
        config::Config,
        session::{Session, Summary},
    },
};
use std::path::PathBuf;

/// Train a LLaMA model: full, LoRA, or ReLoRA with a warm start and restarts
///
/// The configuration is one TOML file with the sections [model], [data], [train], [warm_start] and [relora]; every key
/// can be set with --set, too. The run directory holds the resolved configuration, metrics.jsonl, the base of the first
/// cycle, each cycle's delta as a PEFT adapter, and checkpoints. The first Ctrl-C saves a checkpoint and stops.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit train --config run.toml -o run
  relora-kit train --config run.toml -o run --set train.lr=1e-3 --set relora.lora_r=128
  relora-kit train --config run.toml -o run --autoresume
  relora-kit train --config run.toml -o run --profile
  relora-kit train --resume run")]
pub struct Args {
    /// The configuration
    #[arg(long, value_name = "RUN.toml", required_unless_present = "resume", conflicts_with = "resume")]
    config: Option<PathBuf>,
    /// Replace a key of the configuration (repeatable)
    #[arg(long, value_name = "SECTION.KEY=VALUE", conflicts_with = "resume")]
    set: Vec<String>,
    /// The run directory to create
    #[arg(short, long, value_name = "DIR", required_unless_present = "resume", conflicts_with = "resume")]
    output: Option<PathBuf>,
    /// Go on with a run from its newest checkpoint
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Go on with the run in --output if it exists and has this configuration; otherwise start it
    #[arg(long, conflicts_with = "resume")]
    autoresume: bool,
    /// Time every operation: a table at the end, and profile.json in the run directory for chrome://tracing
    #[arg(long)]
    profile: bool,
    /// What to compute on
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: String,
    /// How the summary is printed
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Args {
    pub(super) fn run(self, progress: &Progress) -> Result<Outcome> {
        let summary = if self.profile {
            let device = Profiled::new(Cpu);
            let mut summary = self.train(device.clone(), progress)?;
            if let Some(summary) = &mut summary {
                summary.operations = device.operations();
                let trace = device.trace().to_string();
                staged::write_file(&summary.run.join("profile.json"), trace.as_bytes(), true)?;
            }
            summary
        } else {
            self.train(Cpu, progress)?
        };
        if let Some(summary) = summary {
            report::emit(&summary, self.format, None, false)?;
        }
        Ok(Outcome::Yes)
    }

    /// `None`: the run was finished already.
    fn train<D: Device>(&self, device: D, progress: &Progress) -> Result<Option<Summary>> {
        let session = match (&self.resume, &self.config, &self.output) {
            (Some(dir), _, _) => Session::resume(device, dir, progress)?,
            (None, Some(config), Some(dir)) => {
                let config = Config::read(config, &self.set)?;
                if !self.autoresume {
                    Session::create(device, config, dir, progress)?
                } else if let Some(session) = Session::create_or_resume(device, config, dir, progress)? {
                    session
                } else {
                    progress.info(&format!("run '{}' is finished", dir.display()));
                    return Ok(None);
                }
            }
            _ => return Err(Error::request("train needs --config and --output, or --resume")),
        };
        session.run().map(Some)
    }
}
