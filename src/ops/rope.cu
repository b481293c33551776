// Rotary embedding (arXiv:2104.09864) with Hugging Face's pairing: element i of a head turns with element i + D/2.

// In place on x (B, T, heads, D); cos, sin (at least T, D/2); n pairs. `direction` is 1, or -1 for the opposite turn.
template <class T>
__device__ __forceinline__ void turn(
    const float* cos, const float* sin, T* x, u64 n, u32 len, u32 heads, u32 half, float direction
) {
    FOR_EACH(i, n) {
        u32 pair = i % half;
        u64 head = i / half;
        u32 t = head / heads % len;
        float c = cos[(u64)t * half + pair], s = direction * sin[(u64)t * half + pair];
        T* first = x + head * 2 * half + pair;
        float a = get(first[0]), b = get(first[half]);
        put(first, a * c - b * s);
        put(first + half, b * c + a * s);
    }
}

#define KERNELS(T) \
    KERNEL rope_##T( \
        const float* cos, const float* sin, T* x, u64 n, u32 len, u32 heads, u32 half, float direction \
    ) { \
        turn(cos, sin, x, n, len, heads, half, direction); \
    }

KERNELS(f32)
KERNELS(bf16)
