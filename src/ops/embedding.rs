//! Token embedding: a gather, and a scatter-add in the order of the rows.

use rayon::prelude::*;

pub fn forward(tokens: &[u32], table: &[f32], y: &mut [f32]) {
    let width = y.len() / tokens.len();
    assert_eq!(y.len(), tokens.len() * width, "embedding: rows");
    y.par_chunks_mut(width * 64).zip(tokens.par_chunks(64)).for_each(|(y, tokens)| {
        for (y, &token) in y.chunks_mut(width).zip(tokens) {
            y.copy_from_slice(&table[token as usize * width..][..width]);
        }
    });
}

/// Each task owns a range of ids, and walks all tokens: every sum runs in the order of the rows, whatever the threads.
pub fn backward(tokens: &[u32], dy: &[f32], dtable: &mut [f32]) {
    let width = dy.len() / tokens.len();
    assert_eq!(dy.len(), tokens.len() * width, "embedding: rows");
    let ids = (dtable.len() / width).div_ceil(rayon::current_num_threads());
    dtable.par_chunks_mut(ids * width).enumerate().for_each(|(i, dtable)| {
        let first = i * ids;
        let own = first..first + dtable.len() / width;
        for (dy, &token) in dy.chunks(width).zip(tokens) {
            let token = token as usize;
            if own.contains(&token) {
                for (d, g) in dtable[(token - first) * width..][..width].iter_mut().zip(dy) {
                    *d += g;
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, noise, wide};

    #[test]
    fn rows_are_gathered_and_gradients_of_repeated_tokens_add_up() {
        let (vocab, width, tokens) = (11, 7, [3u32, 0, 3, 10, 5, 3, 0]);
        let table = noise(1, vocab * width);
        let mut y = vec![9.0; tokens.len() * width];
        forward(&tokens, &table, &mut y);
        let dy = noise(2, y.len());
        let mut dtable = noise(3, table.len());
        let mut expected = wide(&dtable);
        for (n, &t) in tokens.iter().enumerate() {
            for c in 0..width {
                assert_eq!(y[n * width + c], table[t as usize * width + c]);
                expected[t as usize * width + c] += f64::from(dy[n * width + c]);
            }
        }
        backward(&tokens, &dy, &mut dtable);
        assert_close("dtable", &dtable, &expected, 1e-6);
    }
}
