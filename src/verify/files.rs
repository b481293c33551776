//! Every file the manifest lists exists and has the hash it had, and no other file lies beside them.

use super::{Findings, Mismatch};
use crate::{
    error::{Error, Result},
    progress::Progress,
    run::{Manifest, RunDir, sha256_file},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path, PathBuf},
};

/// Hashes every listed file. Data outside the run may be gone: that is only noted.
pub(super) fn check(dir: &RunDir, manifest: &Manifest, progress: &Progress) -> Result<Findings> {
    let mut findings = Findings::default();
    let folders = listed(manifest);
    let count = folders.iter().map(|(_, files)| files.len()).sum::<usize>();
    let bar = progress.count("hashing", (count + manifest.data.len()) as u64);
    let mut hashed = 0;
    for (folder, files) in &folders {
        // A path that leads elsewhere is a mistake or an attack: what it names is not even looked at.
        let outside = std::iter::once(folder.as_path()).chain(files.keys().map(Path::new)).find(|p| !stays_inside(p));
        if let Some(path) = outside {
            findings
                .mismatches
                .push(Mismatch::new(path.display().to_string(), "the manifest names a path that leaves the run"));
            continue;
        }
        refuse_links(&dir.0, folder)?;
        for (name, expected) in *files {
            progress.check()?;
            refuse_links(&dir.0, &folder.join(name))?;
            let what = folder.join(name).display().to_string();
            if let Some(found) = hash(&dir.0.join(folder).join(name), &what, &mut findings)? {
                findings
                    .expect(found == *expected, &*what, || format!("sha256 is {found}, the manifest says {expected}"));
            }
            hashed += 1;
            bar.inc(1);
        }
        expect_no_others(&dir.0, folder, files, &mut findings)?;
    }
    for (name, data) in &manifest.data {
        progress.check()?;
        let what = format!("{name} data '{}'", data.path.display());
        if data.path.exists() {
            // Of a file outside the run nothing is told, not even its hash.
            if let Some(found) = hash(&data.path, &what, &mut findings)? {
                findings.expect(found == data.sha256, what, || "its sha256 is not the one in the manifest".into());
            }
            hashed += 1;
        } else {
            findings.notes.push(format!("{what} is not here and was not checked"));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    findings.detail = format!("{hashed} files");
    Ok(findings)
}

/// Every folder that the manifest vouches for, relative to the run, and sha256 by file name.
fn listed(manifest: &Manifest) -> Vec<(PathBuf, &BTreeMap<String, String>)> {
    let base = manifest.base.iter().map(|b| (PathBuf::from("base"), &b.files));
    let cycles = manifest.cycles.iter().map(|c| (c.folder.clone(), &c.files));
    let checkpoint = manifest.checkpoint.iter().map(|c| (c.folder.clone(), &c.files));
    base.chain(cycles).chain(checkpoint).collect()
}

/// Whether a path in the manifest is made of plain names.
fn stays_inside(path: &Path) -> bool {
    path.components().next().is_some() && path.components().all(|part| matches!(part, Component::Normal(_)))
}

/// A link inside the run leads to what the run does not hold. This is no claim that fails: it cannot be looked at.
fn refuse_links(run: &Path, path: &Path) -> Result<()> {
    let mut place = run.to_owned();
    for part in path.components() {
        place.push(part);
        if place.is_symlink() {
            return Err(Error::request(format!(
                "'{}' is a symbolic link, which verify does not follow",
                place.display()
            ))
            .help("copy the run with its files (cp -rL), and verify the copy"));
        }
    }
    Ok(())
}

/// Files that the manifest does not list are loaded like the others: an index or a second file of weights changes the model.
fn expect_no_others(
    run: &Path,
    folder: &Path,
    files: &BTreeMap<String, String>,
    findings: &mut Findings,
) -> Result<()> {
    let known: BTreeSet<PathBuf> = files.keys().map(PathBuf::from).collect();
    let mut waiting = vec![PathBuf::new()];
    while let Some(place) = waiting.pop() {
        let path = run.join(folder).join(&place);
        // A folder that is not there has missing files, which are named already.
        let Ok(entries) = fs::read_dir(&path) else { continue };
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("read", &path, e))?;
            let name = place.join(entry.file_name());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                waiting.push(name);
            } else if !known.contains(&name) && !entry.file_name().as_encoded_bytes().starts_with(b".") {
                let what = folder.join(&name).display().to_string();
                findings.mismatches.push(Mismatch::new(what, "the file is there but the manifest does not list it"));
            }
        }
    }
    Ok(())
}

fn hash(path: &Path, what: &str, findings: &mut Findings) -> Result<Option<String>> {
    if !path.is_file() {
        findings.mismatches.push(Mismatch::new(what, "the file is missing"));
        return Ok(None);
    }
    sha256_file(path).map(Some)
}
