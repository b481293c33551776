//! Random bits for every element of a buffer, without a state: Philox4x32-10 (Salmon et al., "Parallel random numbers: as
//! easy as 1, 2, 3", SC 2011), the generator of cuRAND and PyTorch's CUDA. The kernels have the same one in common.cu.
//!
//! One counter gives four words. Runs of [`RUN`] elements share [`LANES`] counters: word w of lane l is for element
//! `16 w + l` of the run, so that neighbours in memory are neighbours in a vector register or a warp.

/// Counters of a run.
pub(super) const LANES: usize = 16;

/// Elements of a run.
pub(super) const RUN: usize = 4 * LANES;

/// Philox4x32-10 of many counters at once.
#[inline(always)]
fn philox<const N: usize>([mut c0, mut c1, mut c2, mut c3]: [[u32; N]; 4], key: [u32; 2]) -> [[u32; N]; 4] {
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        for (((c0, c1), c2), c3) in c0.iter_mut().zip(&mut c1).zip(&mut c2).zip(&mut c3) {
            let a = u64::from(*c0) * 0xd251_1f53;
            let b = u64::from(*c2) * 0xcd9e_8d57;
            *c0 = (b >> 32) as u32 ^ *c1 ^ k0;
            *c1 = b as u32;
            *c2 = (a >> 32) as u32 ^ *c3 ^ k1;
            *c3 = a as u32;
        }
        k0 = k0.wrapping_add(0x9e37_79b9);
        k1 = k1.wrapping_add(0xbb67_ae85);
    }
    [c0, c1, c2, c3]
}

/// 32 random bits for each element of run number `run`; another key, other bits.
#[inline(always)]
pub(super) fn run_bits(run: usize, key: u64) -> [[u32; LANES]; 4] {
    let counter = |lane: usize| (run * LANES + lane) as u64;
    let low = std::array::from_fn(|lane| counter(lane) as u32);
    let high = std::array::from_fn(|lane| (counter(lane) >> 32) as u32);
    philox([low, high, [0; LANES], [0; LANES]], [key as u32, (key >> 32) as u32])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_gives_the_known_answers() {
        // kat_vectors of the authors' library Random123.
        let check = |counter: [u32; 4], key, expected: [u32; 4]| {
            assert_eq!(philox(counter.map(|word| [word]), key), expected.map(|word| [word]));
        };
        check([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        check([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        check(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        );
    }

    #[test]
    fn lanes_and_words_are_those_of_single_counters() {
        let key = 0x0123_4567_89ab_cdef_u64;
        for run in [0, 7, 1 << 29] {
            let bits = run_bits(run, key);
            for lane in [0, 5, 15] {
                let counter = (run * LANES + lane) as u64;
                let one =
                    philox([[counter as u32], [(counter >> 32) as u32], [0], [0]], [key as u32, (key >> 32) as u32]);
                assert_eq!(bits.map(|word| word[lane]), one.map(|word| word[0]), "{run} {lane}");
            }
        }
    }
}
