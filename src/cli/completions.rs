//! `relora-kit completions SHELL`

use super::Outcome;
use crate::{error::Result, report};
use clap_complete::Shell;

/// Print a completion script for your shell
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit completions bash > ~/.local/share/bash-completion/completions/relora-kit
  relora-kit completions fish > ~/.config/fish/completions/relora-kit.fish")]
pub struct Args {
    /// The shell to write for
    shell: Shell,
}

impl Args {
    pub(super) fn run(self, command: &mut clap::Command) -> Result<Outcome> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, command, "relora-kit", &mut script);
        report::print(&String::from_utf8_lossy(&script))?;
        Ok(Outcome::Yes)
    }
}
