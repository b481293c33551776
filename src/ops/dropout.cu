// Dropout whose mask is a function of a key and the element's index: bit for bit that of the CPU. A thread takes the four
// elements of a counter. `first`: the counter of the first.

template <class T>
__device__ __forceinline__ void forward(const T* x, T* y, u64 n, u64 first, u64 key, u32 threshold, float factor) {
    FOR_EACH(counter, counters_for(n)) {
        Words bits = philox(first + counter, key);
        for (int w = 0; w < 4; w++) {
            u64 i = element_of(counter, w);
            if (i < n) put(y + i, bits.word[w] >= threshold ? __fmul_rn(get(x[i]), factor) : 0.0f);
        }
    }
}

// dx += dy * factor where kept.
template <class T>
__device__ __forceinline__ void backward(const T* dy, T* dx, u64 n, u64 first, u64 key, u32 threshold, float factor) {
    FOR_EACH(counter, counters_for(n)) {
        Words bits = philox(first + counter, key);
        for (int w = 0; w < 4; w++) {
            u64 i = element_of(counter, w);
            // Rounded twice, as on the CPU: no fused multiply-add.
            if (i < n && bits.word[w] >= threshold) put(dx + i, __fadd_rn(get(dx[i]), __fmul_rn(get(dy[i]), factor)));
        }
    }
}

#define KERNELS(T) \
    KERNEL dropout_forward_##T(const T* x, T* y, u64 n, u64 first, u64 key, u32 threshold, float factor) { \
        forward(x, y, n, first, key, threshold, factor); \
    } \
    KERNEL dropout_backward_##T(const T* dy, T* dx, u64 n, u64 first, u64 key, u32 threshold, float factor) { \
        backward(dy, dx, n, first, key, threshold, factor); \
    }

KERNELS(f32)
KERNELS(bf16)
