// The gate of the MLP (arXiv:2002.05202): y = silu(gate) * up, silu(x) = x * sigmoid(x).

__device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

template <class T>
__device__ __forceinline__ void forward(const T* gate, const T* up, T* y, u64 n) {
    FOR_EACH(i, n) {
        float x = get(gate[i]);
        put(y + i, x * sigmoid(x) * get(up[i]));
    }
}

// silu'(x) = s + x * s * (1 - s) with s = sigmoid(x). Gate and up are replaced by their gradients.
template <class T>
__device__ __forceinline__ void backward(const T* dy, T* gate, T* up, u64 n) {
    FOR_EACH(i, n) {
        float x = get(gate[i]), d = get(dy[i]);
        float s = sigmoid(x);
        float silu = x * s;
        put(gate + i, d * get(up[i]) * (s + silu * (1.0f - s)));
        put(up + i, d * silu);
    }
}

#define KERNELS(T) \
    KERNEL swiglu_forward_##T(const T* gate, const T* up, T* y, u64 n) { \
        forward(gate, up, y, n); \
    } \
    KERNEL swiglu_backward_##T(const T* dy, T* gate, T* up, u64 n) { \
        backward(dy, gate, up, n); \
    }

KERNELS(f32)
KERNELS(bf16)
