// Rotary embedding (arXiv:2104.09864) with Hugging Face's pairing: element i of a head turns with element i + D/2.

// In place on x (B, T, heads, D); cos, sin (at least T, D/2); n pairs. `direction` is 1, or -1 for the opposite turn.
extern "C" __global__ void rope(
    const float* cos, const float* sin, float* x, u64 n, u32 len, u32 heads, u32 half, float direction
) {
    FOR_EACH(i, n) {
        u32 pair = i % half;
        u64 head = i / half;
        u32 t = head / heads % len;
        float c = cos[(u64)t * half + pair], s = direction * sin[(u64)t * half + pair];
        float* first = x + head * 2 * half + pair;
        float a = first[0], b = first[half];
        first[0] = a * c - b * s;
        first[half] = b * c + a * s;
    }
}
