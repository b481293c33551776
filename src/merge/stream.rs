//! Carries out a plan: every worker takes the next piece in the order of the output, so that reading, computing and
//! writing overlap and files grow from front to back.

use super::{
    apply::{self, Scratch, Sums},
    device::Gpu,
    plan::{Output, Plan},
    prepared::{Element, Prepared},
    rounding::Rounding,
};
use crate::{
    checkpoint::Writer,
    error::{Error, Result},
    progress::{Cancellation, Progress},
    threads,
};
use indicatif::ProgressBar;
use rayon::prelude::*;
use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
};

/// Elements of one block of rows. Large enough for BLAS to be fast, small enough to stay in the cache.
const BLOCK: usize = 1 << 19;

/// Bytes of one copied piece.
const COPY: u64 = 16 << 20;

/// After so many bytes the disk is told to take what has been written, so that the sync at the end finds little left.
const WRITE_BACK: u64 = 32 << 20;

/// A piece of work: rows of a changed tensor, or bytes of a copied one.
enum Piece {
    Rows(Range<usize>),
    Bytes(Range<u64>),
}

/// Writes every tensor of the plan. Returns the sums of each, in the plan's order.
pub(super) fn run(
    plan: &Plan,
    rounding: Rounding,
    gpu: Option<&Gpu>,
    writer: &Writer,
    progress: &Progress,
) -> Result<Vec<Sums>> {
    let pieces = split(plan);
    let mut counts = vec![0; plan.outputs.len()];
    pieces.iter().for_each(|(i, _)| counts[*i] += 1);
    let states = counts.into_iter().map(State::new).collect();
    let total = plan.outputs.iter().map(|o| o.spec.bytes()).sum();
    let bar = progress.bytes("merging", total);
    let job = Job {
        plan,
        rounding,
        gpu,
        pieces,
        states,
        writer,
        next: AtomicUsize::new(0),
        bar,
        cancellation: progress.cancellation(),
    };
    let (written, behind) = channel();
    std::thread::scope(|scope| {
        let write_back = scope.spawn(|| write_back(behind, || writer.sync()).inspect_err(|_| job.stop()));
        let workers = (0..threads::count()).into_par_iter().with_max_len(1);
        let work = threads::with_serial_blas(|| workers.try_for_each_with(written, |written, _| job.work(written)));
        let write_back = write_back.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        work.and(write_back)
    })?;
    job.bar.finish_and_clear();
    Ok(job.states.into_iter().map(|s| s.sums.into_inner().unwrap_or_default()).collect())
}

fn write_back(written: Receiver<u64>, mut sync: impl FnMut() -> Result<()>) -> Result<()> {
    let mut pending = 0;
    for bytes in written {
        pending += bytes;
        if pending >= WRITE_BACK {
            sync()?;
            pending = 0;
        }
    }
    Ok(())
}

fn split(plan: &Plan) -> Vec<(usize, Piece)> {
    let mut pieces = Vec::new();
    for (i, output) in plan.outputs.iter().enumerate() {
        if output.is_copy() {
            let total = output.spec.bytes();
            pieces.extend((0..total).step_by(COPY as usize).map(|at| (i, Piece::Bytes(at..total.min(at + COPY)))));
        } else {
            pieces.extend(row_blocks(output).map(|rows| (i, Piece::Rows(rows))));
        }
    }
    pieces
}

/// The blocks of rows that a changed tensor is computed in.
pub(super) fn row_blocks(output: &Output) -> impl Iterator<Item = Range<usize>> + use<> {
    output.row_blocks(BLOCK)
}

struct Job<'p, 'a> {
    plan: &'p Plan<'a>,
    rounding: Rounding,
    gpu: Option<&'p Gpu>,
    pieces: Vec<(usize, Piece)>,
    states: Vec<State>,
    writer: &'p Writer,
    next: AtomicUsize,
    bar: ProgressBar,
    cancellation: &'p Cancellation,
}

/// What the blocks of one output share.
struct State {
    left: AtomicUsize,
    single: Mutex<Option<Arc<Prepared<f32>>>>,
    double: Mutex<Option<Arc<Prepared<f64>>>>,
    sums: Mutex<Sums>,
}

impl State {
    fn new(pieces: usize) -> Self {
        State {
            left: AtomicUsize::new(pieces),
            single: Mutex::new(None),
            double: Mutex::new(None),
            sums: Mutex::default(),
        }
    }
}

impl Job<'_, '_> {
    /// Every worker ends before its next piece.
    fn stop(&self) {
        self.next.store(self.pieces.len(), Ordering::Relaxed);
    }

    fn work(&self, written: &Sender<u64>) -> Result<()> {
        let (mut single, mut double) = (Scratch::<f32>::new(), Scratch::<f64>::new());
        while let Some((i, piece)) = self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            self.cancellation.check()?;
            let (output, state) = (&self.plan.outputs[*i], &self.states[*i]);
            let result = match piece {
                Piece::Bytes(bytes) => copy(output, bytes.clone(), self.writer),
                Piece::Rows(rows) if output.in_double() => {
                    self.compute(output, rows, state, &state.double, &mut double)
                }
                Piece::Rows(rows) => self.compute(output, rows, state, &state.single, &mut single),
            };
            let bytes = result.inspect_err(|_| self.stop())?;
            self.bar.inc(bytes);
            // The receiver ends early only with an error of its own, which stops the workers and which `run` returns.
            let _ = written.send(bytes);
            if state.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                lock(&state.single).take();
                lock(&state.double).take();
            }
        }
        Ok(())
    }

    fn compute<T: Element>(
        &self,
        output: &Output,
        rows: &Range<usize>,
        state: &State,
        shared: &Mutex<Option<Arc<Prepared<T>>>>,
        scratch: &mut Scratch<T>,
    ) -> Result<u64> {
        let prepared = {
            let mut shared = lock(shared);
            match &*shared {
                Some(prepared) => prepared.clone(),
                None => shared.insert(Arc::new(Prepared::new(output, self.rounding, self.gpu)?)).clone(),
            }
        };
        let sums = apply::rows(output, output.spec.dtype, &prepared, rows.clone(), scratch)?;
        *lock(&state.sums) += sums;
        let row_bytes = output.matrix_shape().1 * output.spec.dtype.bitsize() / 8;
        self.writer.write(&output.spec.name, (rows.start * row_bytes) as u64, &scratch.bytes)?;
        Ok(scratch.bytes.len() as u64)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic elsewhere ends the run anyway; the data behind these locks are never half-written.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Copies bytes of an unchanged tensor inside the kernel, or through the mapping where the kernel cannot.
fn copy(output: &Output, bytes: Range<u64>, writer: &Writer) -> Result<u64> {
    let len = bytes.end - bytes.start;
    let (file, path, at) = writer.claim(&output.spec.name, bytes.start, len)?;
    let source = output.source;
    let mut done = 0;
    while done < len {
        let (mut from, mut to) = (source.offset() + bytes.start + done, at + done);
        match rustix::fs::copy_file_range(
            source.file().file(),
            Some(&mut from),
            file,
            Some(&mut to),
            (len - done) as usize,
        ) {
            Ok(0) | Err(_) => break,
            Ok(n) => done += n as u64,
        }
    }
    if done < len {
        let rest = &source.bytes()[(bytes.start + done) as usize..bytes.end as usize];
        std::os::unix::fs::FileExt::write_all_at(file, rest, at + done).map_err(|e| Error::io("write", path, e))?;
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_synced_in_portions_until_that_fails() {
        let syncs = |fail_at: usize| {
            let (written, behind) = channel();
            (0..9).for_each(|_| written.send(WRITE_BACK / 2).unwrap());
            drop(written);
            let mut syncs = 0;
            let result = write_back(behind, || {
                syncs += 1;
                if syncs == fail_at { Err(Error::environment("the disk is gone")) } else { Ok(()) }
            });
            (syncs, result.is_err())
        };
        assert_eq!((syncs(100), syncs(3)), ((4, false), (3, true)));
    }
}
