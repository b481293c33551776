//! Dropout whose mask is a function of a key and the element's index: the same in forward, in a forward that is run
//! again, in backward and after a resume, on any number of threads, and never stored.

use super::{
    elementwise::BLOCK,
    philox::{LANES, RUN, run_bits},
};
use multiversion::multiversion;
use rayon::prelude::*;

/// Which elements are dropped: each with probability `p`; the others are divided by `1 - p`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Below 1.
    pub p: f32,
    /// Other keys drop other elements.
    pub key: u64,
    /// Runs of elements before the buffer's first, see [`Dropout::after`].
    pub first_run: u64,
}

impl Dropout {
    /// The same probability, another mask.
    pub fn fork(self, n: u64) -> Dropout {
        let mixed = (self.key ^ n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xd134_2543_de82_ef95);
        Dropout { key: mixed ^ (mixed >> 29), ..self }
    }

    /// The mask of what follows so many elements of something larger. That of a whole is that of its parts if these are
    /// multiples of 64 elements; other parts begin with the next such multiple.
    pub fn after(self, elements: usize) -> Dropout {
        Dropout { first_run: elements.div_ceil(RUN) as u64, ..self }
    }

    /// The random bits of the elements of run number `run`.
    #[inline(always)]
    fn bits(self, run: usize) -> [[u32; LANES]; 4] {
        run_bits(self.first_run as usize + run, self.key)
    }

    /// The counter of the first element's bits.
    pub(super) fn first_counter(self) -> u64 {
        self.first_run * LANES as u64
    }

    /// Elements whose random bits are below are dropped.
    pub(super) fn threshold(self) -> u32 {
        (f64::from(self.p) * f64::from(1u32 << 31) * 2.0) as u32
    }

    /// What the others are multiplied with.
    pub(super) fn factor(self) -> f32 {
        1.0 / (1.0 - self.p)
    }
}

impl Dropout {
    /// 0 where dropped; the others stay.
    pub(super) fn zero(self, x: &mut [f32]) {
        x.par_chunks_mut(BLOCK).enumerate().for_each(|(i, x)| zero_block(self, i * BLOCK, x));
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn zero_block(dropout: Dropout, first: usize, x: &mut [f32]) {
    for (run, x) in x.chunks_mut(RUN).enumerate() {
        let bits = dropout.bits(first / RUN + run);
        for (x, bits) in x.iter_mut().zip(bits.as_flattened()) {
            *x = if *bits >= dropout.threshold() { *x } else { 0.0 };
        }
    }
}

/// As many elements as x and y both have.
pub fn forward(dropout: Dropout, x: &[f32], y: &mut [f32]) {
    let blocks = y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).enumerate();
    blocks.for_each(|(i, (y, x))| forward_block(dropout, i * BLOCK, x, y));
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn forward_block(dropout: Dropout, first: usize, x: &[f32], y: &mut [f32]) {
    let (threshold, factor) = (dropout.threshold(), dropout.factor());
    for (run, (y, x)) in y.chunks_mut(RUN).zip(x.chunks(RUN)).enumerate() {
        let bits = dropout.bits(first / RUN + run);
        for ((y, x), bits) in y.iter_mut().zip(x).zip(bits.as_flattened()) {
            *y = if *bits >= threshold { x * factor } else { 0.0 };
        }
    }
}

/// `dx += dy / (1 - p)` where kept; as many elements as both have.
pub fn backward(dropout: Dropout, dy: &[f32], dx: &mut [f32]) {
    let blocks = dx.par_chunks_mut(BLOCK).zip(dy.par_chunks(BLOCK)).enumerate();
    blocks.for_each(|(i, (dx, dy))| backward_block(dropout, i * BLOCK, dy, dx));
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn backward_block(dropout: Dropout, first: usize, dy: &[f32], dx: &mut [f32]) {
    let (threshold, factor) = (dropout.threshold(), dropout.factor());
    for (run, (dx, dy)) in dx.chunks_mut(RUN).zip(dy.chunks(RUN)).enumerate() {
        let bits = dropout.bits(first / RUN + run);
        for ((dx, dy), bits) in dx.iter_mut().zip(dy).zip(bits.as_flattened()) {
            *dx += if *bits >= threshold { dy * factor } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::noise;

    #[test]
    fn the_share_that_is_dropped_is_p_and_neighbours_are_independent() {
        let n = 1 << 20;
        let dropout = Dropout { p: 0.1, key: 7, first_run: 0 };
        let mut y = vec![9.0; n];
        forward(dropout, &vec![1.0; n], &mut y);
        let dropped: Vec<bool> = y.iter().map(|y| *y == 0.0).collect();
        assert!(y.iter().all(|y| *y == 0.0 || (*y - 1.0 / 0.9).abs() < 1e-6));
        let count = dropped.iter().filter(|d| **d).count() as f64;
        // Binomial: standard deviations 307 and 102.
        assert!((count - 0.1 * n as f64).abs() < 5.0 * 307.0, "{count}");
        for lag in [1, 64, 4096] {
            let both = dropped.iter().zip(&dropped[lag..]).filter(|(a, b)| **a && **b).count() as f64;
            assert!((both - 0.01 * n as f64).abs() < 5.0 * 102.0, "{lag}: {both}");
        }
        let mut other = vec![0.0; n];
        forward(dropout.fork(1), &vec![1.0; n], &mut other);
        let both = y.iter().zip(&other).filter(|(a, b)| **a == 0.0 && **b == 0.0).count() as f64;
        assert!((both - 0.01 * n as f64).abs() < 5.0 * 102.0, "{both}");
    }

    #[test]
    fn the_mask_of_a_whole_is_that_of_its_parts() {
        let (n, dropout) = (10 * RUN, Dropout { p: 0.5, key: 7, first_run: 0 });
        let mask = |dropout, n| {
            let mut y = vec![9.0; n];
            forward(dropout, &vec![1.0; n], &mut y);
            y
        };
        let whole = mask(dropout, n);
        for first in [0, RUN, 7 * RUN] {
            assert_eq!(mask(dropout.after(first), n - first), whole[first..], "{first}");
        }
        // No element is another one's, too.
        assert_eq!(mask(dropout.after(RUN + 1), RUN), whole[2 * RUN..3 * RUN]);
    }

    #[test]
    fn backward_drops_what_forward_dropped() {
        let n = BLOCK + 17;
        let dropout = Dropout { p: 0.4, key: 3, first_run: 0 };
        let (dy, start) = (noise(1, n + 5), noise(2, n));
        let (mut mask, mut dx) = (vec![0.0; n + 5], start.clone());
        forward(dropout, &vec![1.0; n], &mut mask);
        backward(dropout, &dy, &mut dx);
        for i in 0..n {
            assert!((dx[i] - (start[i] + mask[i] * dy[i])).abs() < 1e-6, "{i}");
        }
    }
}
