//! PyTorch's generator on a CPU (`torch.Generator("cpu").manual_seed(seed)`): the 32-bit Mersenne Twister of Matsumoto and Nishimura
//! (1998), and what `uniform_` and `randperm` make of its numbers.

use std::collections::HashMap;

const SIZE: usize = 624;

/// The largest extent plus one whose permutation takes one 32-bit number per step (aten/src/ATen/native/TensorFactories.cpp).
pub const LARGEST_PERMUTATION: usize = (u32::MAX / 20) as usize;

/// The generator.
pub struct Mt19937 {
    state: [u32; SIZE],
    next: usize,
}

impl Mt19937 {
    /// Seeded as `manual_seed` does.
    pub fn new(seed: u32) -> Mt19937 {
        let mut state = [seed; SIZE];
        for i in 1..SIZE {
            let before = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(before ^ (before >> 30)).wrapping_add(i as u32);
        }
        Mt19937 { state, next: SIZE }
    }

    /// 32 random bits.
    pub fn bits(&mut self) -> u32 {
        if self.next == SIZE {
            for i in 0..SIZE {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % SIZE] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + 397) % SIZE] ^ (y >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// One number of `uniform_(low, high)` in f32: 24 bits, scaled, rounded once.
    pub fn uniform(&mut self, low: f64, high: f64) -> f32 {
        let (low, high) = (low as f32, high as f32);
        let x = f64::from(self.bits() & 0x00ff_ffff) / f64::from(1 << 24);
        (x * f64::from(high - low) + f64::from(low)) as f32
    }

    /// The first `count` numbers of `randperm(n)`, for n below [`LARGEST_PERMUTATION`].
    pub fn permutation(&mut self, n: usize, count: usize) -> Vec<usize> {
        // Only what was swapped is kept: the permutation itself may be as large as a weight.
        let mut moved: HashMap<usize, usize> = HashMap::new();
        let mut first = Vec::with_capacity(count.min(n));
        for i in 0..count.min(n) {
            let own = moved.get(&i).copied().unwrap_or(i);
            if i + 1 == n {
                first.push(own);
                break;
            }
            let with = i + self.bits() as usize % (n - i);
            first.push(if with == i { own } else { moved.insert(with, own).unwrap_or(with) });
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `torch.manual_seed(777); torch.randperm(10)`, and `torch.empty(3).uniform_(-1, 1)` after `torch.manual_seed(5)`.
    #[test]
    fn the_numbers_are_those_of_torch() {
        assert_eq!(Mt19937::new(777).permutation(10, 10), PERMUTATION);
        let mut generator = Mt19937::new(5);
        assert_eq!([(); 3].map(|()| generator.uniform(-1.0, 1.0)), UNIFORM);
        // The reference implementation's 10,000th number for the seed 5489 (C++ standard, [rand.predef]).
        let mut generator = Mt19937::new(5489);
        assert_eq!((0..10_000).map(|_| generator.bits()).last(), Some(4_123_659_995));
    }

    const PERMUTATION: [usize; 10] = [5, 9, 0, 3, 1, 7, 4, 8, 6, 2];
    const UNIFORM: [f32; 3] = [0.66050375, -0.7477782, 0.8149394];
}
