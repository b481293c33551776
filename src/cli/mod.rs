//! Arguments -> options -> library -> report. No work is done here.

mod completions;
#[cfg(feature = "convert")]
mod convert;
mod diff;
#[cfg(feature = "train")]
mod eval;
mod extract;
#[cfg(feature = "train")]
mod generate;
mod inspect;
mod merge;
mod ranks;
mod spectrum;
#[cfg(feature = "train")]
mod tokenize;
#[cfg(feature = "train")]
mod train;
mod verify;

#[cfg(not(feature = "cuda"))]
use crate::ops::Cpu as Cuda;
#[cfg(feature = "cuda")]
use crate::ops::{Cuda, CudaOptions};
use crate::{
    error::Error,
    escape,
    inputs::Inputs,
    interrupt,
    progress::{Cancellation, Progress},
    report::Format,
    staged::Target,
};
use clap::{Args, ColorChoice, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

/// Train ReLoRA models, merge low-rank deltas into checkpoints, and prove the rank of the summed update.
#[derive(Parser)]
#[command(name = "relora-kit", version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options that every command takes.
#[derive(Args)]
pub struct Global {
    /// More details on stderr
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Global options")]
    verbose: u8,
    /// No warnings, no progress
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Global options")]
    quiet: bool,
    /// Threads to compute with (default: all cores; of several processes, each its share)
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), help_heading = "Global options")]
    threads: Option<u16>,
    /// Colours on stderr and in help (NO_COLOR is obeyed, too)
    #[arg(long, global = true, value_enum, default_value_t, help_heading = "Global options")]
    // Read by `color_choice` from the raw arguments, since it colours their errors, too.
    color: When,
    /// Progress bars on stderr
    #[arg(long, global = true, value_enum, default_value_t, help_heading = "Global options")]
    progress: ProgressWhen,
}

#[derive(Clone, Copy, Default, PartialEq, ValueEnum)]
enum When {
    #[default]
    Auto,
    Always,
    Never,
}

#[derive(Clone, Copy, Default, PartialEq, ValueEnum)]
enum ProgressWhen {
    #[default]
    Auto,
    Never,
}

/// How a command's result is printed, and where to.
#[derive(Args)]
pub struct Output {
    /// How the result is printed
    #[arg(long, value_enum, default_value_t, help_heading = "Output")]
    pub format: Format,
    /// Write the result to FILE instead of stdout
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    /// Replace FILE if it exists
    #[arg(long, help_heading = "Output")]
    pub force: bool,
}

impl Output {
    /// The file of `--output`, checked against all files and folders that the command reads. `-` is stdout.
    fn target(&self, inputs: &Inputs) -> Result<Option<Target>, Error> {
        self.output.as_ref().map(|path| Target::text(path, self.force, inputs)).transpose()
    }
}

#[derive(Subcommand)]
enum Command {
    Merge(merge::Args),
    Spectrum(Box<spectrum::Args>),
    Verify(verify::Args),
    Inspect(inspect::Args),
    Diff(diff::Args),
    #[cfg(feature = "train")]
    Train(train::Args),
    #[cfg(feature = "train")]
    Tokenize(tokenize::Args),
    #[cfg(feature = "train")]
    Eval(eval::Args),
    Extract(extract::Args),
    #[cfg(feature = "convert")]
    Convert(convert::Args),
    #[cfg(feature = "train")]
    Generate(generate::Args),
    Completions(completions::Args),
}

/// What to compute on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum DeviceChoice {
    Cpu,
    /// The NVIDIA GPU with this number; without one, the first, or of several processes each its own.
    Cuda(Option<usize>),
}

/// Says what `--device` is where it is not given.
const DEVICE_VARIABLE: &str = "RELORA_KIT_DEVICE";

/// `cpu`, `cuda` (the first GPU) or `cuda:N`.
fn parse_device(text: &str) -> std::result::Result<DeviceChoice, String> {
    let number = |n: &str| n.parse().ok().filter(|_| n.bytes().all(|b| b.is_ascii_digit()));
    match text {
        "cpu" => Some(DeviceChoice::Cpu),
        "cuda" => Some(DeviceChoice::Cuda(None)),
        _ => text.strip_prefix("cuda:").and_then(number).map(|n| DeviceChoice::Cuda(Some(n))),
    }
    .ok_or_else(|| format!("device '{text}' is not supported, expected cpu, cuda or cuda:N"))
}

/// Opens the NVIDIA GPU with this number, with what the environment says about CUDA's libraries.
#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize, progress: &Progress) -> Result<Cuda, Error> {
    let device = Cuda::open(&CudaOptions::from_env(ordinal))?;
    progress.detail(&format!("device cuda:{ordinal} is {}", device.model()));
    Ok(device)
}

/// Refuses to open a GPU.
#[cfg(not(feature = "cuda"))]
fn open_cuda(ordinal: usize, _: &Progress) -> Result<Cuda, Error> {
    Err(crate::ops::unavailable(ordinal))
}

/// What a command that ran to its end has to say.
pub enum Outcome {
    /// Done; every gate held; no difference found (exit code 0).
    Yes,
    /// The answer is no (exit code 1).
    No,
}

/// Parses the arguments, runs the command, prints the error, and returns the exit code of the contract:
/// 0 yes, 1 no, 2 the request is wrong, 3 the environment failed.
pub fn main() -> ExitCode {
    let command = Cli::command().color(color_choice(std::env::args_os().map(|arg| arg.to_string_lossy().into_owned())));
    let cli = match command.try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(e.exit_code() as u8);
        }
    };
    match run(cli, &interrupt::install()) {
        Ok(Outcome::Yes) => ExitCode::SUCCESS,
        Ok(Outcome::No) => ExitCode::from(1),
        Err(e) => {
            report_error(&e);
            ExitCode::from(e.exit_code())
        }
    }
}

/// In one piece: a launcher of several processes writes to the same place.
fn report_error(e: &Error) {
    let help = e.help.as_ref().map_or(String::new(), |help| format!("help: {}\n", escape::lines(help)));
    let _ = io::stderr().write_all(format!("error: {e}\n{help}").as_bytes());
}

/// The last `--color` of the command line; clap itself obeys NO_COLOR.
fn color_choice(args: impl Iterator<Item = String>) -> ColorChoice {
    let args: Vec<String> = args.collect();
    let after = |i: usize| {
        args[i]
            .strip_prefix("--color=")
            .or_else(|| (args[i] == "--color").then(|| args.get(i + 1))?.map(String::as_str))
    };
    match (0..args.len()).rev().find_map(after) {
        Some("always") => ColorChoice::Always,
        Some("never") => ColorChoice::Never,
        _ => ColorChoice::Auto,
    }
}

fn run(cli: Cli, cancellation: &Cancellation) -> Result<Outcome, Error> {
    let global = &cli.global;
    let together = match cli.command {
        #[cfg(feature = "train")]
        Command::Train(_) => true,
        Command::Merge(_) | Command::Spectrum(_) => true,
        _ => false,
    };
    let threads = match global.threads {
        None if together => ranks::threads()?,
        given => given.map(usize::from),
    };
    crate::threads::set(threads)?;
    let verbosity = if global.quiet { -1 } else { global.verbose as i8 };
    let progress = Progress::stderr(global.progress == ProgressWhen::Auto && !global.quiet, verbosity);
    let progress = progress.with_cancellation(cancellation);
    match cli.command {
        Command::Merge(args) => args.run(&progress),
        Command::Spectrum(args) => args.run(&progress),
        Command::Verify(args) => args.run(&progress),
        #[cfg(feature = "train")]
        Command::Train(args) => args.run(&progress),
        #[cfg(feature = "train")]
        Command::Tokenize(args) => args.run(&progress),
        #[cfg(feature = "train")]
        Command::Eval(args) => args.run(&progress),
        #[cfg(feature = "train")]
        Command::Generate(args) => args.run(&progress),
        Command::Inspect(args) => args.run(&progress),
        Command::Diff(args) => args.run(&progress),
        Command::Extract(args) => args.run(&progress),
        #[cfg(feature = "convert")]
        Command::Convert(args) => args.run(&progress),
        Command::Completions(args) => args.run(&mut Cli::command()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_color_option_decides() {
        let choice = |line: &str| color_choice(line.split(' ').map(str::to_owned));
        assert_eq!(choice("relora-kit inspect x"), ColorChoice::Auto);
        assert_eq!(choice("relora-kit --color never inspect x --color=always"), ColorChoice::Always);
        assert_eq!(choice("relora-kit inspect x --color never"), ColorChoice::Never);
        assert_eq!(choice("relora-kit inspect x --color"), ColorChoice::Auto);
    }

    #[test]
    fn devices_are_cpu_and_numbered_gpus() {
        assert_eq!(parse_device("cpu"), Ok(DeviceChoice::Cpu));
        assert_eq!(parse_device("cuda"), Ok(DeviceChoice::Cuda(None)));
        assert_eq!(parse_device("cuda:3"), Ok(DeviceChoice::Cuda(Some(3))));
        for text in ["", "gpu", "cuda:", "cuda:+1", "cuda:-1", "cuda:1:2", "CPU"] {
            assert!(parse_device(text).unwrap_err().contains("expected cpu, cuda or cuda:N"), "{text}");
        }
    }

    #[test]
    fn every_argument_has_help_and_every_command_examples() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        for sub in command.get_subcommands().filter(|c| c.get_name() != "help") {
            for arg in sub.get_arguments() {
                assert!(arg.get_help().is_some(), "{} {} has no help", sub.get_name(), arg.get_id());
            }
            let after = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.contains("Examples:\n  relora-kit "), "{} shows no examples", sub.get_name());
        }
    }
}
