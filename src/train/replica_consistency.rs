//! Replica consistency: all processes of a job must have the same configuration, data and weights. Checked before the first update
//! and after every restart.

use crate::{
    collective::Collective,
    error::{Error, Result},
    model::Model,
    ops::Device,
    run::Hashed,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// What must be the same everywhere.
#[derive(Serialize, Deserialize)]
struct Facts {
    /// The resolved configuration.
    config: String,
    /// Training and validation data -> sha256.
    data: BTreeMap<String, String>,
    /// See [`digest`].
    weights: String,
    /// Updates made.
    step: u64,
}

/// Refuses to train where another process has another configuration, other data or other weights than the first, by name.
pub(super) fn check<D: Device>(
    collective: &dyn Collective<D>,
    config: String,
    data: &BTreeMap<String, Hashed>,
    model: &Model<D>,
    step: u64,
) -> Result<()> {
    if collective.world_size() == 1 {
        return Ok(());
    }
    let data = data.iter().map(|(name, hashed)| (name.clone(), hashed.sha256.clone())).collect();
    let own = Facts { config, data, weights: digest(model)?, step };
    let json = serde_json::to_vec(&own).map_err(|e| Error::environment(e.to_string()))?;
    let read = |bytes: &Vec<u8>| serde_json::from_slice::<Facts>(bytes).map_err(|e| Error::environment(e.to_string()));
    let all = collective.gather(&json)?.iter().map(read).collect::<Result<Vec<_>>>()?;
    let first = &all[0];
    for (rank, other) in all.iter().enumerate().skip(1) {
        let differs = |what: String| {
            Err(Error::request(format!("{} has {what} than rank 0", collective.name(rank)))
                .help("give all processes the same configuration, data and model"))
        };
        if let Some((here, there)) = first_difference(&first.config, &other.config) {
            return differs(format!("another configuration ('{there}' instead of '{here}')"));
        }
        if let Some(name) = first.data.keys().find(|name| first.data.get(*name) != other.data.get(*name)) {
            return differs(format!("other {name} data"));
        }
        if (&first.weights, first.step) != (&other.weights, other.step) {
            return differs(format!("another model at the start, after update {},", other.step));
        }
    }
    Ok(())
}

/// The first line in which two texts differ.
pub(super) fn first_difference(a: &str, b: &str) -> Option<(String, String)> {
    let line = |text: &str, at: usize| text.lines().nth(at).unwrap_or("nothing").to_owned();
    let lines = a.lines().count().max(b.lines().count());
    (0..lines).map(|at| (line(a, at), line(b, at))).find(|(a, b)| a != b)
}

/// Makes sure that a restart left the same weights in every process.
pub(super) fn check_weights<D: Device>(collective: &dyn Collective<D>, model: &Model<D>, step: u64) -> Result<()> {
    if collective.world_size() == 1 {
        return Ok(());
    }
    let all = collective.gather(digest(model)?.as_bytes())?;
    match all.iter().position(|other| *other != all[0]) {
        None => Ok(()),
        Some(rank) => Err(Error::environment(format!(
            "{} has other weights than rank 0 after the restart at update {step}",
            collective.name(rank)
        ))
        .help("run all processes on the same kind of device; resume from the last checkpoint")),
    }
}

/// sha256 of the bits of all values.
fn digest<D: Device>(model: &Model<D>) -> Result<String> {
    let mut hasher = Sha256::new();
    for param in model.params() {
        hasher.update(bytemuck::cast_slice::<f32, u8>(&param.values(model.device())));
    }
    model.device().status()?;
    Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_differs_is_found_also_where_one_text_ends() {
        let found = |a, b| first_difference(a, b);
        assert_eq!(found("a\nb\nc", "a\nb\nc"), None);
        assert_eq!(found("a\nb\nc", "a\nx\ny"), Some(("b".into(), "x".into())));
        assert_eq!(found("a\nb", "a"), Some(("b".into(), "nothing".into())));
    }
}
