//! A merge spread over the jobs of an array: each job writes its share of the output's files, whole or not at all, into
//! `OUT.parts/I-of-N/`, and combining makes OUT of them, byte for byte what one process writes.

use super::{
    MergeReport, Options,
    apply::Sums,
    device::{self, Gpu},
    explain_losses, metadata, origin,
    plan::Plan,
    result,
    rounding::Rounding,
    sidecar_files, stream,
};
use crate::{
    adapter::{Adapter, config::CONFIG_NAME},
    checkpoint::{Checkpoint, FileSpecs, Writer, read_text},
    error::{Error, Result},
    job_array::{self, ArrayTask},
    progress::Progress,
    staged::{self, Holds, StagedDir, Target},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

/// What a job leaves beside its files.
const RECORD: &str = "part.json";

/// `part.json`.
#[derive(Serialize, Deserialize)]
struct Record {
    /// Option -> value, as one line each; the same in all parts of a job.
    options: BTreeMap<String, String>,
    /// Inputs, each with a digest of its length and some of its bytes.
    inputs: Vec<(PathBuf, String)>,
    /// The files of this part and their bytes.
    files: Vec<(String, u64)>,
    /// Tensor -> the bits of its sums, which a decimal number might round: of the delta, what was kept, the error.
    sums: HashMap<String, [u64; 3]>,
}

/// Where the jobs of an array leave their parts: `OUT.parts`.
pub(super) const ARRAY: &str = ".parts";
/// Where processes that run together leave theirs, for a while: `OUT.ranks`.
pub(super) const RANKS: &str = ".ranks";

/// The output's folder with `suffix`.
pub(super) fn folder(options: &Options, suffix: &str) -> PathBuf {
    let mut name = options.output.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    options.output.with_file_name(name)
}

/// Warns where some of `count` jobs have nothing to do.
pub(super) fn warn_of_few_files(plan: &Plan, options: &Options, count: usize, progress: &Progress) {
    let files = Writer::files(&plan.specs(), options.max_shard_size).len();
    if files < count {
        progress.warn(&format!(
            "the output's files, {files} in number, are fewer than the {count} jobs; a smaller --max-shard-size makes more"
        ));
    }
}

/// Writes the share of one job. The report covers its tensors only.
pub(super) fn run(
    shard: ArrayTask,
    parts: &Path,
    options: &Options,
    (base, adapters): (&Checkpoint, &[(Adapter, f64)]),
    mut plan: Plan,
    gpu: Option<&Gpu>,
    progress: &Progress,
) -> Result<MergeReport> {
    let specs = plan.specs();
    let files = Writer::files(&specs, options.max_shard_size);
    let moved: HashMap<&str, u64> =
        plan.outputs.iter().map(|o| (o.spec.name.as_str(), o.bytes_read() + o.spec.bytes())).collect();
    let cost = |file: &FileSpecs| file.1.iter().map(|s| moved[s.name.as_str()] as f64).sum::<f64>();
    let own = shard.owns(&files.iter().map(cost).collect::<Vec<_>>());
    let files: Vec<FileSpecs> = files.into_iter().zip(own).filter(|(_, own)| *own).map(|(file, _)| file).collect();
    let mine: HashSet<&str> = files.iter().flat_map(|(_, specs)| specs.iter().map(|s| s.name.as_str())).collect();
    let mut record = Record {
        options: identity(options),
        inputs: digests(base, adapters)?,
        files: Vec::new(),
        sums: HashMap::new(),
    };
    let metadata = metadata(options, base, &plan)?;
    plan.outputs.retain(|o| mine.contains(o.spec.name.as_str()));
    let folder = parts.join(format!("{}-of-{}", shard.index, shard.count));
    let staged = StagedDir::create(Target::folder(&folder, Holds::Part, options.force, &options.inputs())?)?;
    let writer = Writer::create_files(staged.path(), &files, &metadata)?;
    let measured = stream::run(&plan, options.rounding, gpu, &writer, progress)?;
    let mut report = result::report(options, &plan, gpu, &files, &measured);
    explain_losses(&mut report, &plan, progress)?;
    writer.finish()?;
    for (name, _) in &files {
        let path = staged.path().join(name);
        let bytes = fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
        record.files.push((name.clone(), bytes));
    }
    let bits = |s: &Sums| [s.delta, s.kept, s.error].map(f64::to_bits);
    record.sums = plan.outputs.iter().zip(&measured).map(|(o, s)| (o.spec.name.clone(), bits(s))).collect();
    let path = staged.path().join(RECORD);
    let json = serde_json::to_vec_pretty(&record).map_err(|e| Error::environment(e.to_string()))?;
    fs::write(&path, json).map_err(|e| Error::io("write", &path, e))?;
    staged.commit()?;
    report.output = folder;
    Ok(report)
}

/// Makes the output of all parts, then removes them. Interrupted at any moment, it can be run again.
pub(super) fn combine(
    folder: &Path,
    options: &Options,
    (base, adapters): (&Checkpoint, &[(Adapter, f64)]),
    plan: &Plan,
    progress: &Progress,
) -> Result<MergeReport> {
    let parts = read_parts(folder, options, base, adapters)?;
    let specs = plan.specs();
    let files = Writer::files(&specs, options.max_shard_size);
    let sources = files.iter().map(|(name, _)| find(&parts, name)).collect::<Result<Vec<_>>>()?;
    let measured = specs.iter().map(|s| sums(&parts, &s.name)).collect::<Result<Vec<_>>>()?;
    let staged = StagedDir::create(options.target()?)?;
    if let Some(folder) = base.folder() {
        sidecar_files::copy(folder, staged.path(), &plan.config)?;
    }
    Writer::write_index(staged.path(), &files)?;
    for ((name, _), source) in files.iter().zip(sources) {
        progress.check()?;
        let target = staged.path().join(name);
        // The parts stay as they are until the output is there. Not every file system knows links.
        if fs::hard_link(&source, &target).is_err() {
            fs::copy(&source, &target).map_err(|e| Error::io("copy", &source, e))?;
        }
    }
    let mut report = result::report(options, plan, None, &files, &measured);
    explain_losses(&mut report, plan, progress)?;
    staged.commit()?;
    if let Err(e) = remove(folder) {
        progress.warn(&format!("the parts are not needed any more, but {e}"));
    }
    Ok(report)
}

/// Removes the parts in `folder`, and the folder if it holds nothing else.
pub(super) fn remove(folder: &Path) -> Result<()> {
    for shard in list_parts(folder)? {
        staged::remove_folder(&folder.join(format!("{}-of-{}", shard.index, shard.count)), Holds::Part)?;
    }
    // Where a job of an array died, its sibling stays beside the parts.
    match fs::remove_dir(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", folder, e)),
        _ => Ok(()),
    }
}

/// All parts in the order of their numbers, none missing, none of another merge.
fn read_parts(
    folder: &Path,
    options: &Options,
    base: &Checkpoint,
    adapters: &[(Adapter, f64)],
) -> Result<Vec<(PathBuf, Record)>> {
    let found = list_parts(folder)?;
    let Some(&ArrayTask { count, .. }) = found.first() else {
        return Err(Error::request(format!("there are no parts in '{}'", folder.display()))
            .help("write them with --shard I/N and the same options"));
    };
    let name = |s: &ArrayTask| format!("{}-of-{}", s.index, s.count);
    if let Some(other) = found.iter().find(|s| s.count != count) {
        return Err(Error::request(format!(
            "'{}' holds parts of different jobs: '{}' and '{}'",
            folder.display(),
            name(&found[0]),
            name(other)
        ))
        .help("remove the parts that are not wanted"));
    }
    // The count is what the name of a folder says: counted without a list.
    let missing = count - found.len();
    if missing > 0 {
        let there: HashSet<usize> = found.iter().map(|s| s.index).collect();
        let absent = (1..=count).filter(|index| !there.contains(index)).take(10);
        let shown = absent.map(|index| ArrayTask { index, count }.to_string()).collect::<Vec<_>>().join(", ");
        return Err(Error::request(format!(
            "{missing} of {count} parts are missing in '{}': {shown}{}",
            folder.display(),
            if missing > 10 { ", ..." } else { "" }
        ))
        .help("write them with --shard and the same options"));
    }
    let wanted = Record {
        options: identity(options),
        inputs: digests(base, adapters)?,
        files: Vec::new(),
        sums: HashMap::new(),
    };
    let read = |shard: &ArrayTask| {
        let part = folder.join(name(shard));
        let path = part.join(RECORD);
        let bytes = read_text(&path)?;
        let record: Record = serde_json::from_slice(&bytes)
            .map_err(|e| Error::request(format!("'{}' is damaged: {e}", path.display())))?;
        check_same_merge(&part, &record, &wanted)?;
        Ok((part, record))
    };
    found.iter().map(read).collect()
}

fn list_parts(folder: &Path) -> Result<Vec<ArrayTask>> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|e| Error::io("read", folder, e))?,
    };
    let parse = |name: &str| name.replacen("-of-", "/", 1).parse::<ArrayTask>().ok();
    let mut found: Vec<ArrayTask> = entries.filter_map(|entry| parse(entry.ok()?.file_name().to_str()?)).collect();
    found.sort_by_key(|s| (s.count, s.index));
    Ok(found)
}

fn check_same_merge(part: &Path, found: &Record, wanted: &Record) -> Result<()> {
    let differs = |what: String, there: &str, here: &str| {
        Err(Error::request(format!(
            "part '{}' belongs to another merge: {what} is {there} there and {here} here",
            part.display()
        ))
        .help("combine with the options of the parts, or write this part again with --force"))
    };
    for (key, here) in &wanted.options {
        let there = found.options.get(key).map_or("absent", String::as_str);
        if there != here {
            return differs(key.clone(), there, here);
        }
    }
    if found.inputs.len() != wanted.inputs.len() {
        let (there, here) = (found.inputs.len().to_string(), wanted.inputs.len().to_string());
        return differs("the number of input files".into(), &there, &here);
    }
    for ((there, a), (here, b)) in found.inputs.iter().zip(&wanted.inputs) {
        if (there, a) != (here, b) {
            let words =
                |path: &Path, digest: &str| format!("'{}' ({})", path.display(), digest.get(..12).unwrap_or(digest));
            return differs("an input file".into(), &words(there, a), &words(here, b));
        }
    }
    Ok(())
}

/// What must be the same in every job, by the names of the options.
fn identity(options: &Options) -> BTreeMap<String, String> {
    let mut identity = origin(options);
    identity.insert("--dtype".into(), options.dtype.map_or("keep".into(), |d| format!("{d:?}").to_lowercase()));
    // Devices differ in the last digits, and which takes what depends on the threads.
    let device = options.gpu.as_ref().map_or("cpu".into(), |_| format!("cuda from rank {}", device::smallest_rank()));
    identity.insert("--device".into(), device);
    let rules: Vec<String> = options.map.iter().map(|(from, to)| format!("{from}={to}")).collect();
    identity.insert("--map".into(), rules.join(" "));
    identity.insert("--max-shard-size".into(), options.max_shard_size.to_string());
    if let Rounding::Stochastic { seed } = options.rounding {
        identity.insert("--seed".into(), seed.to_string());
    }
    identity
}

/// The files that the output depends on, each once.
fn digests(base: &Checkpoint, adapters: &[(Adapter, f64)]) -> Result<Vec<(PathBuf, String)>> {
    let of_base = base.files().iter().map(|f| f.path().to_owned());
    let of_adapters = adapters.iter().flat_map(|(a, _)| [a.path().join(CONFIG_NAME), a.file().path().to_owned()]);
    let mut seen = HashSet::new();
    let digest = |path: PathBuf| job_array::digest(&path).map(|digest| (path, digest));
    of_base.chain(of_adapters).filter(|path| seen.insert(path.clone())).map(digest).collect()
}

/// Where the parts hold the file `name`, complete.
fn find(parts: &[(PathBuf, Record)], name: &str) -> Result<PathBuf> {
    let listed = parts.iter().find_map(|(folder, r)| {
        r.files.iter().find(|(file, _)| file == name).map(|(_, bytes)| (folder, folder.join(name), *bytes))
    });
    let Some((part, path, bytes)) = listed else {
        return Err(Error::request(format!("no part holds '{name}'")).help("write the parts again with --force"));
    };
    let found = fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
    if found != bytes {
        return Err(Error::request(format!("'{}' has {found} bytes, its part wrote {bytes}", path.display()))
            .help(format!("write part '{}' again with --force", part.display())));
    }
    Ok(path)
}

fn sums(parts: &[(PathBuf, Record)], tensor: &str) -> Result<Sums> {
    let bits = parts.iter().find_map(|(_, r)| r.sums.get(tensor));
    let bits = bits.ok_or_else(|| Error::request(format!("no part holds tensor '{tensor}'")))?;
    let [delta, kept, error] = bits.map(f64::from_bits);
    Ok(Sums { delta, kept, error })
}
