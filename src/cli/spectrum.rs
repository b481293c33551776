//! `relora-kit spectrum`

use super::{DeviceChoice, Outcome, Output, parse_device, ranks};
use crate::{
    collective::Job,
    error::{Error, Result},
    inputs::Inputs,
    job_array::ArrayTask,
    ops::CudaOptions,
    progress::Progress,
    report::{self, Format, spectrum::SpectrumReport},
    spectrum::{self, Gate, Labelled, Method, Options, SourceSpec},
    staged::{self, Target},
};
use std::{ffi::OsString, path::PathBuf, sync::Arc};

/// Singular values and honest rank of weight updates, with gates for CI
///
/// Measures every matrix of an update: its norms, its numerical, effective and stable rank, and the rank that rounding
/// alone cannot have produced (rank_above_noise). Exit code 1 if a gate fails.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit spectrum --base step-0 --tuned step-20000
  relora-kit spectrum --base step-0 --tuned relora=runs/a/final --tuned full=runs/b/final --filter '*self_attn*'
  relora-kit spectrum --run runs/a --require 'rank_above_noise > 2*r for 90%'
  relora-kit spectrum --run runs/a --require 'effective_rank > r for median' --against main.json --format markdown
  relora-kit spectrum --run runs/a --report spectrum.html
  relora-kit spectrum --adapter my-lora
  relora-kit spectrum --base step-0 --tuned step-20000 --rank 8 --require 'rank_above_noise > 2*r for 90%'
  relora-kit spectrum --base step-0 --tuned step-20000 --format json --sigma -o spectrum.json
  relora-kit spectrum --base step-0 --tuned step-20000 --device cuda
  relora-kit spectrum --base step-0 --tuned step-20000 --part 3/8 -o part-3.json
  mpirun -n 4 relora-kit spectrum --base step-0 --tuned step-20000
  relora-kit spectrum --join part-*.json --require 'effective_rank > 64 for 90%' --report spectrum.html

A gate reads METRIC OP VALUE [for all|any|median|P%] [on GLOB]; VALUE is a number or a multiple of the adapter rank (2*r).
Metrics: spectral_norm frobenius_norm nuclear_norm numerical_rank noise_edge rank_above_noise effective_rank
proportional_effective_rank stable_rank participation_ratio energy_rank_90 energy_rank_99 condition_number below_0_1")]
pub struct Args {
    /// The checkpoint before the update (W0)
    #[arg(long, value_name = "CKPT", requires = "tuned", help_heading = "Sources")]
    base: Option<PathBuf>,
    /// The checkpoint after the update (Wn); repeat to compare several
    #[arg(long, value_name = "[LABEL=]CKPT", requires = "base", help_heading = "Sources")]
    tuned: Vec<OsString>,
    /// A PEFT adapter: the spectrum of scaling * B @ A, no base needed; repeat to compare several
    #[arg(long, value_name = "[LABEL=]ADAPTER", help_heading = "Sources")]
    adapter: Vec<OsString>,
    /// A run of `relora-kit train`: every cycle and the sum of all; repeat to compare several
    #[arg(long, value_name = "[LABEL=]RUN", help_heading = "Sources")]
    run: Vec<OsString>,
    /// Join the parts that --part wrote: gates, formats and pages as if one process had measured everything
    #[arg(
        long,
        alias = "combine",
        value_name = "PART.json",
        num_args = 1..,
        help_heading = "Job arrays",
        conflicts_with_all = [
            "base", "tuned", "adapter", "run", "filter", "common_only", "skip_nonfinite", "rank", "rank_tol", "roundings",
            "dense", "part", "device",
        ],
    )]
    join: Vec<PathBuf>,
    /// Measure the I-th of N parts of the matrices, equal in cost, and write it (JSON) for --join
    #[arg(
        long,
        alias = "shard",
        value_name = "I/N",
        help_heading = "Job arrays",
        conflicts_with_all = ["require", "against", "report", "sigma"],
    )]
    part: Option<ArrayTask>,
    /// Only tensors whose names match this glob; repeat for more
    #[arg(long, value_name = "GLOB", help_heading = "Selection")]
    filter: Vec<String>,
    /// Ignore tensors that only one of base and tuned has
    #[arg(long, help_heading = "Selection")]
    common_only: bool,
    /// Report matrices with NaN or infinite entries and go on
    #[arg(long, help_heading = "Selection")]
    skip_nonfinite: bool,
    /// A condition that must hold, or the exit code is 1; repeat for more
    #[arg(long, value_name = "GATE", help_heading = "Gates")]
    require: Vec<String>,
    /// What `r` means in gates over checkpoints
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Gates")]
    rank: Option<u32>,
    /// Numerical tolerance relative to the largest singular value [default: max(m, n) * 2^-23]
    #[arg(long, value_name = "TOL", value_parser = tolerance, help_heading = "Measures")]
    rank_tol: Option<f64>,
    /// How often the weights were rounded between base and tuned: the stored merges; 0 for exact storage. Outputs of
    /// relora-kit say it themselves; for others, gates on the noise edge need it
    #[arg(long, value_name = "K", help_heading = "Measures")]
    roundings: Option<u64>,
    /// Compute every spectrum by LAPACK's SVD instead of the Gram matrix: slower, and accurate below 1e-6 * s1, too
    #[arg(long, help_heading = "Measures")]
    dense: bool,
    /// What to compute on: `cpu`, or an NVIDIA GPU, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = parse_device, help_heading = "Measures")]
    device: DeviceChoice,
    /// Compare with an earlier result of `--format json`
    #[arg(long, value_name = "PREVIOUS.json", help_heading = "Output")]
    against: Option<PathBuf>,
    /// Also write a self-contained page with figures
    #[arg(long, value_name = "FILE.html", help_heading = "Output")]
    report: Option<PathBuf>,
    /// Put all singular values into the JSON
    #[arg(long, help_heading = "Output")]
    sigma: bool,
    #[command(flatten)]
    output: Output,
}

impl Args {
    pub(super) fn run(self, progress: &Progress) -> Result<Outcome> {
        let output = &self.output;
        if self.part.is_some() && matches!(output.format, Format::Csv | Format::Markdown) {
            return Err(Error::request("a part of a spectrum is written as JSON")
                .help("leave out --format; --join prints every format"));
        }
        if self.dense && self.device != DeviceChoice::Cpu {
            return Err(Error::request("--dense takes LAPACK's SVD, which runs on the CPU, but --device names a GPU")
                .help("leave out one of them"));
        }
        if self.part.is_some() || !self.join.is_empty() {
            return self.measure(None, progress);
        }
        ranks::run(None, progress, |job, progress| self.measure(job, progress))
    }

    /// Where the result and the page go.
    fn targets(&self, options: &Options) -> Result<(Option<Target>, Option<Target>)> {
        let mut inputs = Inputs::of(self.join.iter().chain(&self.against));
        for source in &options.sources {
            match source {
                SourceSpec::Checkpoints { base, tuned } => inputs.extend([base, &tuned.path]),
                SourceSpec::Adapter(source) | SourceSpec::Run(source) => inputs.extend([&source.path]),
            }
        }
        let page = self.report.as_ref().map(|path| Target::text(path, self.output.force, &inputs)).transpose()?;
        Ok((self.output.target(&inputs)?, page))
    }

    fn measure(&self, job: Option<&Arc<Job>>, progress: &Progress) -> Result<Outcome> {
        let (output, options) = (&self.output, self.options(job)?);
        let (target, page) = self.targets(&options)?;
        let mut spectrum = match (self.join.is_empty(), job) {
            (false, _) => spectrum::join(&self.join, &options)?,
            (true, None) => spectrum::run(&options, progress)?,
            (true, Some(job)) => match spectrum::run_together(&options, job, progress)? {
                Some(spectrum) => spectrum,
                None => return Ok(Outcome::Yes),
            },
        };
        if let Some(page) = page {
            let path = page.path().to_owned();
            staged::write_text(page, &report::html::page(&spectrum)?)?;
            progress.info(&format!("wrote '{}'", path.display()));
            if !self.sigma {
                spectrum.forget_sigma();
            }
        }
        let shown = SpectrumReport { spectrum: &spectrum, wide: output.format == Format::Csv };
        let format = if self.part.is_some() { Format::Json } else { output.format };
        report::emit(&shown, format, target)?;
        Ok(if spectrum.passed() { Outcome::Yes } else { Outcome::No })
    }

    fn options(&self, job: Option<&Arc<Job>>) -> Result<Options> {
        Ok(Options {
            sources: if self.join.is_empty() { self.sources()? } else { Vec::new() },
            filter: self.filter.clone(),
            gates: self.require.iter().map(|text| Gate::parse(text)).collect::<Result<_>>()?,
            rank_tolerance: self.rank_tol,
            roundings: self.roundings,
            rank: self.rank.map(|r| r as usize),
            skip_nonfinite: self.skip_nonfinite,
            common_only: self.common_only,
            sigma: self.sigma || self.report.is_some(),
            hashes: self.report.is_some(),
            against: self.against.clone(),
            part: self.part,
            method: if self.dense { Method::Dense } else { Method::Auto },
            small: None,
            gpu: ranks::own_gpu(self.device, job).map(CudaOptions::from_env),
        })
    }

    fn sources(&self) -> Result<Vec<SourceSpec>> {
        let mut sources = Vec::new();
        for (base, tuned) in self.base.iter().flat_map(|base| self.tuned.iter().map(move |tuned| (base, tuned))) {
            sources.push(SourceSpec::Checkpoints { base: base.clone(), tuned: Labelled::parse(tuned) });
        }
        sources.extend(self.adapter.iter().map(|text| SourceSpec::Adapter(Labelled::parse(text))));
        sources.extend(self.run.iter().map(|text| SourceSpec::Run(Labelled::parse(text))));
        if sources.is_empty() {
            return Err(Error::request("no source is given")
                .help("pass --base CKPT --tuned CKPT, --adapter ADAPTER, --run RUN, or --join PART.json..."));
        }
        Ok(sources)
    }
}

fn tolerance(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if (0.0..1.0).contains(&x) => Ok(x),
        _ => Err("expected a number from 0 to below 1".into()),
    }
}
