//! What a restart does to the optimiser state of A and B, from the configuration's keys.

use super::config::{PruningMask, ReloraConfig};
use crate::ops::Pruning;

/// How one tensor's moments are treated; `None`: they stay. `key` is the tensor's own.
pub fn pruning(config: &ReloraConfig, key: u64) -> Option<Pruning> {
    let (random, magnitude) = (config.optimizer_random_pruning, config.optimizer_magnitude_pruning);
    if magnitude > 0.0 {
        Some(Pruning::Magnitude { ratio: magnitude, joint: config.pruning_mask == PruningMask::Joint })
    } else if random > 0.0 {
        Some(Pruning::Random { ratio: random, key })
    } else {
        config.reset_optimizer_on_relora.then_some(Pruning::Zero)
    }
}
