// Dropout whose mask is a function of a key and the element's index: bit for bit that of the CPU. A thread takes the four
// elements of a counter.

extern "C" __global__ void dropout_forward(const float* x, float* y, u64 n, u64 key, u32 threshold, float factor) {
    FOR_EACH(counter, counters_for(n)) {
        Words bits = philox(counter, key);
        for (int w = 0; w < 4; w++) {
            u64 i = element_of(counter, w);
            if (i < n) y[i] = bits.word[w] >= threshold ? __fmul_rn(x[i], factor) : 0.0f;
        }
    }
}

// dx += dy * factor where kept.
extern "C" __global__ void dropout_backward(const float* dy, float* dx, u64 n, u64 key, u32 threshold, float factor) {
    FOR_EACH(counter, counters_for(n)) {
        Words bits = philox(counter, key);
        for (int w = 0; w < 4; w++) {
            u64 i = element_of(counter, w);
            // Rounded twice, as on the CPU: no fused multiply-add.
            if (i < n && bits.word[w] >= threshold) dx[i] = __fadd_rn(dx[i], __fmul_rn(dy[i], factor));
        }
    }
}
