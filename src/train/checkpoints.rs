//! Which checkpoints a run has, and which one it is resumed from.

use super::state;
use crate::{
    collective::Collective,
    error::{Error, Result},
    ops::Device,
    progress::Progress,
    run::RunDir,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Updates after which checkpoints were saved, newest first.
pub(super) fn steps(dir: &RunDir) -> Result<Vec<u64>> {
    let folder = dir.0.join("checkpoints");
    let entries = match fs::read_dir(&folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|e| Error::io("read", &folder, e))?,
    };
    let step = |name: &str| name.strip_prefix("step-")?.parse().ok();
    let mut steps: Vec<u64> = entries.filter_map(|entry| step(entry.ok()?.file_name().to_str()?)).collect();
    steps.sort_unstable_by(|a, b| b.cmp(a));
    Ok(steps)
}

/// The checkpoint that all processes resume from: the choice of rank 0. `None` if none was ever saved.
pub(super) fn agreed_checkpoint<D: Device>(
    dir: &RunDir,
    collective: &dyn Collective<D>,
    progress: &Progress,
) -> Result<Option<PathBuf>> {
    let own = if collective.is_leader() { newest_sound_checkpoint(dir, progress)? } else { None };
    let name = own.as_deref().and_then(Path::file_name).unwrap_or_default();
    let name = collective.gather(name.as_encoded_bytes())?.swap_remove(0);
    if name.is_empty() || own.is_some() {
        return Ok(own);
    }
    let folder = dir.0.join("checkpoints").join(String::from_utf8_lossy(&name).as_ref());
    match folder.is_dir() {
        true => Ok(Some(folder)),
        false => Err(Error::request(format!("rank 0 goes on from '{}', which is not there here", folder.display()))
            .help("keep the run directory where all machines see it under the same path")),
    }
}

/// The newest checkpoint whose files have the hashes they were written with; `None` if none was ever saved.
fn newest_sound_checkpoint(dir: &RunDir, progress: &Progress) -> Result<Option<PathBuf>> {
    let steps = self::steps(dir)?;
    for step in &steps {
        let folder = dir.0.join(RunDir::checkpoint_folder(*step));
        match state::check_seal(&folder) {
            Ok(()) => return Ok(Some(folder)),
            Err(e) => progress.warn(&format!("{e}; trying the checkpoint before it")),
        }
    }
    match steps.is_empty() {
        true => Ok(None),
        false => Err(Error::request(format!(
            "none of the {} checkpoints of run '{}' is sound",
            steps.len(),
            dir.0.display()
        ))
        .help("restore one from a backup, or remove run/checkpoints to begin the run again")),
    }
}
