//! Changes of one stored weight, computed in row blocks: in f32 for merging, in f64 for measuring and where a method needs it.

pub mod forms;
mod low_rank;
mod product;
mod real;
mod update;

pub use low_rank::LowRank;
pub use real::Real;
pub use update::{Effect, Planned, Stacked, Update, Visit, Weight};

/// Position of the flat index `i` in a tensor of the given shape, row-major.
pub fn unravel(mut i: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (place, &extent) in index.iter_mut().zip(shape).rev() {
        *place = i % extent.max(1);
        i /= extent.max(1);
    }
    index
}
