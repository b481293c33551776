//! How the processes of a job share out the windows of an update.

use super::config::Config;
use crate::error::{Error, Result};

/// One process's windows of every update: a stretch of the order that all of them follow, so that their number changes nothing
/// about the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    /// Windows of an update, over all processes.
    pub total: usize,
    /// Those before the first of this process.
    pub first: usize,
    /// Windows of one pass: `train.batch_size` at most.
    pub batch: usize,
    /// Passes of an update.
    pub passes: usize,
}

impl Share {
    /// The share of process `rank` of `world_size`.
    pub fn new(config: &Config, rank: usize, world_size: usize) -> Result<Share> {
        let (most, accumulation) = (config.train.batch_size, config.train.gradient_accumulation);
        let total = most * accumulation;
        if !total.is_multiple_of(world_size) {
            return Err(Error::request(format!(
                "an update has {total} windows (train.batch_size {most} x gradient_accumulation {accumulation}), which {world_size} processes cannot share evenly"
            ))
            .help(format!("make train.total_batch_size a multiple of {world_size}")));
        }
        let own = total / world_size;
        let batch = (1..=own.min(most)).rev().find(|batch| own.is_multiple_of(*batch)).unwrap_or(1);
        Ok(Share { total, first: rank * own, batch, passes: own / batch })
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
            let alone = Share { total, first: 0, batch: batch_size, passes: accumulation };
            assert_eq!(Share::new(&config, 0, 1).unwrap(), alone);
            for world_size in 2..=total {
                let shares: Result<Vec<Share>> =
                    (0..world_size).map(|rank| Share::new(&config, rank, world_size)).collect();
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
