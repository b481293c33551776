//! Measures sources: the whole, or one part of the matrices.

use super::{
    Options, Part, Skipped, SourceSpec, Spectrum, against,
    complete::complete,
    judge,
    measure::{Measured, measure_all},
    parts,
    sources::OpenSource,
    svd::{SMALL, SvdOptions},
    task::Task,
};
use crate::{
    collective::Job,
    error::{Error, Result},
    job_array::ArrayTask,
    ops::Solver,
    progress::Progress,
};
use std::path::PathBuf;

/// The sources fit, and every gate is about something.
struct Prepared<'a> {
    opened: &'a [OpenSource],
    tasks: Vec<Task<'a>>,
    skipped: Vec<Skipped>,
    gpu: Option<Solver>,
}

fn open(options: &Options, progress: &Progress) -> Result<Vec<OpenSource>> {
    check_labels(options)?;
    let opened: Vec<OpenSource> =
        options.sources.iter().map(|spec| OpenSource::open(spec, options.roundings)).collect::<Result<_>>()?;
    for source in &opened {
        if let Some(known) = source.history().and_then(|history| history.contradicted()) {
            progress.warn(&format!(
                "'{}' was rounded {known} times by what its files say; --roundings replaces that",
                source.label()
            ));
        }
    }
    Ok(opened)
}

impl<'a> Prepared<'a> {
    fn new(opened: &'a [OpenSource], options: &Options, progress: &Progress) -> Result<Prepared<'a>> {
        let (mut tasks, mut skipped) = (Vec::new(), Vec::new());
        for source in opened {
            source.list(options, &mut tasks, &mut skipped)?;
        }
        judge::check_filters(options, &tasks, &skipped)?;
        for source in opened {
            judge::check_not_empty(source.label(), options, &tasks, &skipped)?;
            judge::check_roundings(&options.gates, source.label(), source.roundings().as_ref())?;
        }
        let covered: Vec<judge::Covered> = tasks.iter().map(judge::Covered::by_task).collect();
        judge::check_gates(&options.gates, opened.iter().map(OpenSource::label), &covered, &skipped)?;
        let gpu = options.gpu.as_ref().map(Solver::open).transpose()?;
        if let Some(gpu) = &gpu {
            progress.detail(&format!("device {} is {}", gpu.name(), gpu.model()));
        }
        Ok(Prepared { opened, tasks, skipped, gpu })
    }

    fn svd(&self, options: &Options) -> SvdOptions<'_> {
        SvdOptions { method: options.method, small: options.small.unwrap_or(SMALL), gpu: self.gpu.as_ref() }
    }
}

/// Measures every matrix of every source, or one part of them.
pub fn run(options: &Options, progress: &Progress) -> Result<Spectrum> {
    let before = options.against.as_deref().map(against::read).transpose()?;
    let opened = open(options, progress)?;
    let mut prepared = Prepared::new(&opened, options, progress)?;
    if let Some(part) = options.part {
        if !options.gates.is_empty() || options.against.is_some() {
            return Err(Error::request(format!("gates and earlier results need all parts, but this is part {part}"))
                .help("pass them when the parts are joined"));
        }
        return run_part(part, options, prepared, progress);
    }
    let (mut matrices, mut skipped) = (Vec::new(), std::mem::take(&mut prepared.skipped));
    let (svd, tasks): (SvdOptions, Vec<&Task>) = (prepared.svd(options), prepared.tasks.iter().collect());
    for measured in measure_all(&tasks, prepared.tasks.len(), options, svd, progress)? {
        match measured {
            Measured::Matrices(found) => matrices.extend(found),
            Measured::Skipped(skip) => skipped.push(skip),
        }
    }
    let sources = opened.iter().map(|o| o.describe(|_| options.hashes)).collect::<Result<Vec<_>>>()?;
    complete(options, sources, matrices, skipped, before)
}

/// [`run`] in several processes: each measures one part, and the first joins them. The others get nothing.
pub fn run_together(options: &Options, job: &Job, progress: &Progress) -> Result<Option<Spectrum>> {
    // Read again when the parts are joined: here it only says early what is wrong with it.
    options.against.as_deref().map(against::read).transpose()?;
    let opened = open(options, progress)?;
    let prepared = Prepared::new(&opened, options, progress)?;
    let ranks = job.ranks();
    let part = ArrayTask { index: ranks.rank + 1, count: ranks.world_size };
    // The verdict is that on the whole.
    let own = Options { gates: Vec::new(), against: None, ..options.clone() };
    let part = run_part(part, &own, prepared, progress)?;
    let json = serde_json::to_vec(&part).map_err(|e| Error::environment(e.to_string()))?;
    let parts = job.collect(&json)?;
    if !job.is_leader() {
        return Ok(None);
    }
    let parts = parts.into_iter().enumerate().map(|(rank, json)| (PathBuf::from(job.name(rank)), json)).collect();
    parts::join_read(parts, options).map(Some)
}

/// Measures one part. It holds all singular values, and the hashes of its part of the files: joining may need both.
fn run_part(array: ArrayTask, options: &Options, mut prepared: Prepared, progress: &Progress) -> Result<Spectrum> {
    let options = &Options { sigma: true, ..options.clone() };
    let mut skipped = std::mem::take(&mut prepared.skipped);
    let (svd, tasks, opened) = (prepared.svd(options), &prepared.tasks, prepared.opened);
    let costs: Vec<f64> = tasks.iter().map(|task| task.need(svd).cost).collect();
    let owned = array.owns(&costs);
    let (indices, own): (Vec<usize>, Vec<&Task>) = tasks.iter().enumerate().filter(|(i, _)| owned[*i]).unzip();
    let mut part = Part::new(array, options, opened, tasks.len())?;
    part.skipped_by_all = skipped.len();
    let mut matrices = Vec::new();
    for (index, measured) in indices.into_iter().zip(measure_all(&own, tasks.len(), options, svd, progress)?) {
        let found = match measured {
            Measured::Matrices(found) => found,
            Measured::Skipped(skip) => {
                skipped.push(skip);
                Vec::new()
            }
        };
        part.measured.push(parts::MeasuredWeight::new(index, &found));
        matrices.extend(found);
    }
    let hashed = parts::own_files(array, opened)?;
    let sources = opened.iter().map(|o| o.describe(|file| hashed.contains(file))).collect::<Result<Vec<_>>>()?;
    let mut spectrum = Spectrum { part: Some(part), ..complete(options, sources, matrices, skipped, None)? };
    spectrum.forget_sigma();
    Ok(spectrum)
}

fn check_labels(options: &Options) -> Result<()> {
    let labels: Vec<&str> = options.sources.iter().map(SourceSpec::label).collect();
    match labels.iter().enumerate().find(|(i, label)| labels[..*i].contains(label)) {
        None => Ok(()),
        Some((_, label)) => {
            Err(Error::request(format!("two sources are called '{label}'"))
                .help("give each a name of its own: LABEL=PATH"))
        }
    }
}
