//! Every file the manifest lists exists and has the hash it had.

use super::{Findings, Mismatch};
use crate::{
    error::Result,
    interrupt,
    progress::Progress,
    run::{Manifest, RunDir, sha256_file},
};
use std::path::{Path, PathBuf};

/// Hashes every listed file. Data outside the run may be gone: that is only noted.
pub(super) fn check(dir: &RunDir, manifest: &Manifest, progress: &Progress) -> Result<Findings> {
    let mut findings = Findings::default();
    let files = listed(manifest);
    let bar = progress.count("hashing", (files.len() + manifest.data.len()) as u64);
    for (name, expected) in &files {
        interrupt::check()?;
        compare(&dir.0.join(name), &name.display().to_string(), expected, &mut findings)?;
        bar.inc(1);
    }
    let mut hashed = files.len();
    for (name, data) in &manifest.data {
        interrupt::check()?;
        if data.path.exists() {
            compare(&data.path, &format!("{name} data '{}'", data.path.display()), &data.sha256, &mut findings)?;
            hashed += 1;
        } else {
            findings.notes.push(format!("{name} data '{}' is not here and was not checked", data.path.display()));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    findings.detail = format!("{hashed} files");
    Ok(findings)
}

/// Path relative to the run, and sha256, of every file it vouches for.
fn listed(manifest: &Manifest) -> Vec<(PathBuf, String)> {
    let base = manifest.base.iter().map(|b| (PathBuf::from("base"), &b.files));
    let cycles = manifest.cycles.iter().map(|c| (c.folder.clone(), &c.files));
    let checkpoint = manifest.checkpoint.iter().map(|c| (c.folder.clone(), &c.files));
    base.chain(cycles)
        .chain(checkpoint)
        .flat_map(|(folder, files)| files.iter().map(move |(name, hash)| (folder.join(name), hash.clone())))
        .collect()
}

fn compare(path: &Path, what: &str, expected: &str, findings: &mut Findings) -> Result<()> {
    if !path.is_file() {
        findings.mismatches.push(Mismatch::new(what, "the file is missing"));
        return Ok(());
    }
    let found = sha256_file(path)?;
    findings.expect(found == expected, what, || format!("sha256 is {found}, the manifest says {expected}"));
    Ok(())
}
