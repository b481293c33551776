//! What an extraction found.

use serde::Serialize;
use std::path::PathBuf;

/// The result of an extraction. Norms are Frobenius norms.
#[derive(Clone, Debug, Serialize)]
pub struct ExtractReport {
    /// Version of this layout.
    pub schema: u32,
    /// The checkpoint before.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub base: PathBuf,
    /// The checkpoint after.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub tuned: PathBuf,
    /// The adapter that was written.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub output: PathBuf,
    /// Every matrix that became a pair of factors.
    pub matrices: Vec<ExtractedMatrix>,
    /// Changed tensors that are stored in full.
    pub saved_in_full: Vec<ChangedTensor>,
    /// Changed tensors that the adapter lacks.
    pub left_out: Vec<ChangedTensor>,
    /// Tensors that are the same in both checkpoints.
    pub unchanged: usize,
    /// Over all matrices.
    pub totals: ExtractTotals,
}

/// One matrix.
#[derive(Clone, Debug, Serialize)]
pub struct ExtractedMatrix {
    /// Name as stored.
    pub name: String,
    /// Extents.
    pub shape: Vec<usize>,
    /// Rank of its factors.
    pub rank: usize,
    /// `||dW||`
    pub delta_norm: f64,
    /// Share of `||dW||^2` that the singular values up to the rank hold.
    pub energy: f64,
    /// `||dW - B A|| / ||dW||`, with the factors as they are stored.
    pub relative_error: f64,
}

/// A changed tensor that is no pair of factors.
#[derive(Clone, Debug, Serialize)]
pub struct ChangedTensor {
    /// Name as stored.
    pub name: String,
    /// Extents.
    pub shape: Vec<usize>,
    /// `||dW||`
    pub delta_norm: f64,
}

/// All matrices taken as one vector.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ExtractTotals {
    /// Number of factored matrices.
    pub matrices: usize,
    /// Smallest rank.
    pub rank_min: usize,
    /// Largest rank.
    pub rank_max: usize,
    /// Elements of all factors.
    pub parameters: usize,
    /// `||dW||`
    pub delta_norm: f64,
    /// Share of `||dW||^2` that was captured.
    pub energy: f64,
    /// `||dW - B A|| / ||dW||`
    pub relative_error: f64,
}
