//! `relora-kit train`

use super::{Cuda, DEVICE_VARIABLE, DeviceChoice, Outcome, open_cuda, parse_device, ranks};
#[cfg(feature = "mpi")]
use crate::collective::MpiCollective;
#[cfg(all(feature = "mpi", feature = "cuda"))]
use crate::collective::MpiOnGpus;
#[cfg(feature = "cuda")]
use crate::{collective::Nccl, ops::CudaOptions};
use crate::{
    collective::{Alone, Collective, Job},
    error::{Error, Result},
    ops::{Cpu, Device, Profiled},
    progress::Progress,
    report::{self, Format},
    staged,
    train::{
        config::Config,
        plan::{Plan, plan},
        session::Session,
        summary::Summary,
    },
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// What `--plan PRESET` assumes without a configuration: the paper's window and rank.
const PLANNED: &str = r#"
[model]
preset = "llama_9m"
[data]
train = "none"
max_length = 512
[train]
mode = "relora"
batch_size = 8
num_training_steps = 20000
lr = 1e-3
scheduler = "cosine_restarts"
[relora]
lora_r = 128
lora_alpha = 32
relora = 5000
"#;

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
  relora-kit train --plan --config run.toml
  relora-kit train --plan llama_350m,llama_1b,llama_7b --set train.batch_size=4
  relora-kit train --config run.toml -o run --device cuda
  torchrun --nproc-per-node 8 --no-python -- relora-kit train --config run.toml -o run --device cuda
  mpirun -n 4 relora-kit train --config run.toml -o run
  relora-kit train --resume run")]
pub struct Args {
    /// The configuration
    #[arg(long, value_name = "RUN.toml", required_unless_present_any = ["resume", "plan"], conflicts_with = "resume")]
    config: Option<PathBuf>,
    /// Replace a key of the configuration (repeatable)
    #[arg(long, value_name = "SECTION.KEY=VALUE", conflicts_with = "resume")]
    set: Vec<String>,
    /// The run directory to create
    #[arg(short, long, value_name = "DIR", required_unless_present_any = ["resume", "plan"], conflicts_with = "resume")]
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
    /// Print the memory that training will need, and train nothing; of these presets (or `all`), or of the configured model
    #[arg(long, value_name = "PRESET,...", num_args = 0..=1, value_delimiter = ',', conflicts_with = "resume")]
    plan: Option<Vec<String>>,
    /// What to compute on: `cpu`, or an NVIDIA GPU, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", env = DEVICE_VARIABLE, default_value = "cpu", value_parser = parse_device)]
    device: DeviceChoice,
    /// What sums the gradients of several processes: NCCL on GPUs, MPI on CPUs if this is left out
    #[arg(long, value_enum, value_name = "LIBRARY")]
    collective: Option<CollectiveChoice>,
    /// How the summary is printed
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// A library that sums over processes.
#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum CollectiveChoice {
    /// NVIDIA's, from GPU to GPU
    Nccl,
    /// From GPU to GPU where MPI is CUDA-aware, else through the host's memory; of a build with the feature `mpi`
    Mpi,
}

impl Args {
    pub(super) fn run(self, progress: &Progress) -> Result<Outcome> {
        if let Some(presets) = &self.plan {
            report::emit(&self.plan(presets)?, self.format, None)?;
            return Ok(Outcome::Yes);
        }
        let run = self.resume.as_ref().or(self.output.as_ref());
        let after = run
            .map(|dir| format!("go on with: relora-kit train --resume {}, on any number of processes", dir.display()));
        ranks::run(after, progress, |job, progress| {
            // What is wrong with the configuration is said before a GPU is opened.
            self.config.as_ref().map_or(Ok(()), |config| Config::read(config, &self.set).map(drop))?;
            let summary = match job {
                None => self.train_alone(progress)?,
                Some(job) => self.train_together(job, progress)?.filter(|_| job.is_leader()),
            };
            if let Some(summary) = summary {
                report::emit(&summary, self.format, None)?;
            }
            Ok(Outcome::Yes)
        })
    }

    fn train_alone(&self, progress: &Progress) -> Result<Option<Summary>> {
        match ranks::own_gpu(self.device, None) {
            None => self.train_on(Cpu, Alone, progress),
            Some(ordinal) => self.train_on(open_cuda(ordinal, progress)?, Alone, progress),
        }
    }

    fn train_together(&self, job: &Arc<Job>, progress: &Progress) -> Result<Option<Summary>> {
        let Some(ordinal) = ranks::own_gpu(self.device, Some(job)) else {
            if self.collective == Some(CollectiveChoice::Nccl) {
                return Err(Error::request("--collective nccl sums on GPUs, but --device is cpu")
                    .help("pass --device cuda, or --collective mpi"));
            }
            return self.train_on(Cpu, mpi(job)?, progress);
        };
        let device = open_cuda(ordinal, progress)?;
        #[cfg(feature = "cuda")]
        {
            ranks::warn_of_shared_gpus(job, &device, progress)?;
            if self.collective != Some(CollectiveChoice::Mpi) {
                let nccl = Nccl::start(job.clone(), &device, &CudaOptions::from_env(ordinal).libraries)?;
                return self.train_on(device, nccl, progress);
            }
        }
        self.train_by_mpi(device, job, progress)
    }

    /// From GPU to GPU where MPI can, through the host's memory where not.
    fn train_by_mpi(&self, device: Cuda, job: &Arc<Job>, progress: &Progress) -> Result<Option<Summary>> {
        #[cfg(all(feature = "mpi", feature = "cuda"))]
        if let Some(between_gpus) = MpiOnGpus::start(job.clone(), job.mpi()?, &device)? {
            progress.detail("MPI is CUDA-aware: it sends from GPU to GPU");
            return self.train_on(device, between_gpus, progress);
        }
        self.train_on(device, mpi(job)?, progress)
    }

    fn plan(&self, presets: &[String]) -> Result<Plan> {
        let config = match &self.config {
            Some(path) => Config::read(path, &self.set)?,
            None if presets.is_empty() => {
                return Err(Error::request("train --plan needs --config, or the names of presets")
                    .help("for example: relora-kit train --plan llama_350m"));
            }
            None => Config::parse(PLANNED, Path::new("the defaults of --plan"), &self.set)?,
        };
        plan(&config, presets)
    }

    /// [`Args::train`], with a profile if one is asked for.
    fn train_on<D, C>(&self, device: D, collective: C, progress: &Progress) -> Result<Option<Summary>>
    where
        D: Device + Clone,
        C: Collective<D> + Collective<Profiled<D>> + 'static,
    {
        let leads = collective.is_leader();
        if !self.profile {
            return self.train(device, Arc::new(collective), progress);
        }
        let device = Profiled::new(device);
        let mut summary = self.train(device.clone(), Arc::new(collective), progress)?;
        if let Some(summary) = summary.as_mut().filter(|_| leads) {
            summary.operations = device.operations();
            let trace = device.trace().to_string();
            staged::write_own(&summary.run.join("profile.json"), trace.as_bytes())?;
        }
        Ok(summary)
    }

    /// `None`: the run was finished already.
    fn train<D: Device>(
        &self,
        device: D,
        collective: Arc<dyn Collective<D>>,
        progress: &Progress,
    ) -> Result<Option<Summary>> {
        let session = match (&self.resume, &self.config, &self.output) {
            (Some(dir), _, _) => Session::resume(device, dir, &collective, progress)?,
            (None, Some(config), Some(dir)) => {
                let config = Config::read(config, &self.set)?;
                if !self.autoresume {
                    Session::create(device, config, dir, &collective, progress)?
                } else if let Some(session) = Session::create_or_resume(device, config, dir, &collective, progress)? {
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

/// MPI, which this build may not have.
#[cfg(feature = "mpi")]
fn mpi(job: &Arc<Job>) -> Result<MpiCollective> {
    Ok(MpiCollective::new(job.clone(), job.mpi()?))
}

/// MPI, which this build may not have.
#[cfg(not(feature = "mpi"))]
fn mpi(_job: &Arc<Job>) -> Result<Alone> {
    Err(Error::request("several processes train on CPUs through MPI, which this relora-kit was built without")
        .help("build it with `cargo install --path . --features mpi`, pass --device cuda, or start one process"))
}
