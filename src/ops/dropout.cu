// Dropout whose mask is a function of a key and the element's index: bit for bit that of the CPU.

extern "C" __global__ void dropout_forward(const float* x, float* y, u64 n, u64 key, u32 threshold, float factor) {
    FOR_EACH(i, n) y[i] = hash((u32)i, key) >= threshold ? __fmul_rn(x[i], factor) : 0.0f;
}

// dx += dy * factor where kept.
extern "C" __global__ void dropout_backward(const float* dy, float* dx, u64 n, u64 key, u32 threshold, float factor) {
    FOR_EACH(i, n) {
        // Rounded twice, as on the CPU: no fused multiply-add.
        if (hash((u32)i, key) >= threshold) dx[i] = __fadd_rn(dx[i], __fmul_rn(dy[i], factor));
    }
}
