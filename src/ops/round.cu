// Rounding to bf16: the upper half of an f32, to the nearest (ties to even) or by chance.

KERNEL round_nearest(float* x, u64 n) {
    FOR_EACH(i, n) {
        u32 bits = __float_as_uint(x[i]);
        u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
        if (is_finite(bits)) x[i] = __uint_as_float(rounded);
    }
}

// Adds 16 random bits below the last one that stays. A thread takes the four elements of a counter.
KERNEL round_stochastic(float* x, u64 n, u64 key) {
    FOR_EACH(counter, counters_for(n)) {
        Words random = philox(counter, key);
        for (int w = 0; w < 4; w++) {
            u64 i = element_of(counter, w);
            if (i >= n) continue;
            u32 bits = __float_as_uint(x[i]);
            u32 rounded = (bits + (random.word[w] >> 16)) & 0xffff0000u;
            if (is_finite(bits)) x[i] = __uint_as_float(rounded);
        }
    }
}
