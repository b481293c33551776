//! Micro-batches per process: how the sequences of an update are sharded over the processes of a job.

use super::config::Config;
use crate::error::{Error, Result};

/// One process's sequences of every update: a contiguous range of the update's batch, so that the number of processes does not
/// change which sequences an update sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MicroBatches {
    /// Sequences of an update, over all processes.
    pub total: usize,
    /// Index of this process's first sequence within the update.
    pub first: usize,
    /// Sequences of one micro-batch: at most `train.batch_size`.
    pub batch: usize,
    /// Gradient accumulation steps of this process per update.
    pub passes: usize,
}

impl MicroBatches {
    /// The micro-batches of process `rank` of `world_size`. An error if the update's sequences cannot be divided evenly.
    pub fn new(config: &Config, rank: usize, world_size: usize) -> Result<MicroBatches> {
        let (most, accumulation) = (config.train.batch_size, config.train.gradient_accumulation);
        let total = most * accumulation;
        if !total.is_multiple_of(world_size) {
            return Err(Error::request(format!(
                "an update has {total} sequences (train.batch_size {most} x gradient_accumulation {accumulation}), which {world_size} processes cannot divide evenly"
            ))
            .help(format!("make train.total_batch_size a multiple of {world_size}")));
        }
        let own = total / world_size;
        let batch = (1..=own.min(most)).rev().find(|batch| own.is_multiple_of(*batch)).unwrap_or(1);
        Ok(MicroBatches { total, first: rank * own, batch, passes: own / batch })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn every_window_is_one_processs_and_no_pass_exceeds_the_batch() {
        for (batch_size, accumulation) in [(8, 1), (8, 3), (3, 4), (1, 16), (12, 1)] {
            let text = format!(
                "[model]\npreset = \"llama_9m\"\n[data]\ntrain = \"t\"\nmax_length = 8\n[train]\nmode = \"full\"\n\
                 batch_size = {batch_size}\ngradient_accumulation = {accumulation}\nnum_training_steps = 9\nlr = 1e-3\n\
                 scheduler = \"constant\"\n"
            );
            let config = Config::parse(&text, Path::new("test.toml"), &[]).unwrap();
            let total = batch_size * accumulation;
            let alone = MicroBatches { total, first: 0, batch: batch_size, passes: accumulation };
            assert_eq!(MicroBatches::new(&config, 0, 1).unwrap(), alone);
            for world_size in 2..=total {
                let shares: Result<Vec<MicroBatches>> =
                    (0..world_size).map(|rank| MicroBatches::new(&config, rank, world_size)).collect();
                let Ok(shares) = shares else {
                    assert!(total % world_size > 0);
                    continue;
                };
                let mut next = 0;
                for share in shares {
                    assert!(share.first == next && share.batch <= batch_size, "{share:?}");
                    next += share.batch * share.passes;
                }
                assert_eq!(next, total);
            }
        }
    }
}
