// The gate of the MLP (arXiv:2002.05202): y = silu(gate) * up, silu(x) = x * sigmoid(x).

__device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

extern "C" __global__ void swiglu_forward(const float* gate, const float* up, float* y, u64 n) {
    FOR_EACH(i, n) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// silu'(x) = s + x * s * (1 - s) with s = sigmoid(x). Gate and up are replaced by their gradients.
extern "C" __global__ void swiglu_backward(const float* dy, float* gate, float* up, u64 n) {
    FOR_EACH(i, n) {
        float s = sigmoid(gate[i]);
        float silu = gate[i] * s;
        gate[i] = dy[i] * up[i] * (s + silu * (1.0f - s));
        up[i] = dy[i] * silu;
    }
}
