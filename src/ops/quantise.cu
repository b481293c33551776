// Weights in a few bits each: quantise.rs has the same, bit for bit. tables: the 16 numbers of NF4, then the 256 of scales.

typedef unsigned char u8;

#define BLOCK 64
#define NESTED 256

// The place of the number in a sorted table that is nearest to x, the smaller one of two equally near.
__device__ __forceinline__ u32 nearest(const float* table, u32 count, float x) {
    u32 low = 0, high = count - 1;
    while (low < high) {
        u32 at = (low + high) / 2;
        if (__fadd_rn(table[at], table[at + 1]) / 2.0f < x) low = at + 1;
        else high = at;
    }
    return low;
}

__device__ __forceinline__ float share(float x, float most) {
    return most > 0.0f ? __fdiv_rn(x, most) : 0.0f;
}

// The largest size of each `block` neighbours among n. One warp per block.
KERNEL quantise_scales(const float* x, u64 n, u32 block, float* scales) {
    u64 own = (u64)blockIdx.x * WARPS + threadIdx.x / 32, first = own * block;
    if (first >= n) return; // the whole warp
    u64 end = first + block < n ? first + block : n;
    float most = 0.0f;
    for (u64 i = first + threadIdx.x % 32; i < end; i += 32) most = fmaxf(most, fabsf(x[i]));
    most = lanes_max(most, 32);
    if (threadIdx.x % 32 == 0) scales[own] = most;
}

// One thread per two elements, the first in the upper half of the byte.
KERNEL quantise_nf4(const float* x, u64 n, const float* scales, const float* tables, u8* codes) {
    FOR_EACH(pair, (n + 1) / 2) {
        u64 i = 2 * pair;
        float scale = scales[i / BLOCK];
        u32 high = nearest(tables, 16, share(x[i], scale));
        u32 low = nearest(tables, 16, i + 1 < n ? share(x[i + 1], scale) : 0.0f);
        codes[pair] = (u8)(high << 4 | low);
    }
}

KERNEL quantise_int8(const float* x, u64 n, u32 cols, const float* scales, signed char* codes) {
    FOR_EACH(i, n) {
        float scale = scales[i / cols];
        codes[i] = scale > 0.0f ? (signed char)rintf(__fmul_rn(x[i], __fdiv_rn(127.0f, scale))) : 0;
    }
}

// One block per NESTED scales. sum is that of all scales; offset their mean.
KERNEL quantise_nested(
    const float* scales, u64 n, const double* sum, const float* tables, u8* codes, float* nested, float* offset
) {
    float mean = (float)(*sum / (double)n);
    u64 i = (u64)blockIdx.x * NESTED + threadIdx.x;
    float distance = i < n ? __fadd_rn(scales[i], -mean) : 0.0f;
    float most = block_max(fabsf(distance));
    if (i < n) codes[i] = (u8)nearest(tables + 16, 256, share(distance, most));
    if (threadIdx.x == 0) nested[blockIdx.x] = most;
    if (i == 0) *offset = mean;
}

KERNEL dequantise_nested(
    const u8* codes, u64 n, const float* nested, const float* offset, const float* tables, float* scales
) {
    FOR_EACH(i, n) scales[i] = __fadd_rn(__fmul_rn(tables[16 + codes[i]], nested[i / NESTED]), *offset);
}

template <class T>
__device__ __forceinline__ void from_nf4(const u8* codes, u64 n, const float* scales, const float* tables, T* y) {
    FOR_EACH(pair, (n + 1) / 2) {
        u64 i = 2 * pair;
        u32 code = codes[pair];
        float scale = scales[i / BLOCK];
        put(y + i, __fmul_rn(tables[code >> 4], scale));
        if (i + 1 < n) put(y + i + 1, __fmul_rn(tables[code & 15], scale));
    }
}

template <class T>
__device__ __forceinline__ void from_int8(const signed char* codes, u64 n, u32 cols, const float* scales, T* y) {
    FOR_EACH(i, n) put(y + i, __fmul_rn(__fmul_rn((float)codes[i], scales[i / cols]), 1.0f / 127.0f));
}

#define KERNELS(T) \
    KERNEL dequantise_nf4_##T(const u8* codes, u64 n, const float* scales, const float* tables, T* y) { \
        from_nf4(codes, n, scales, tables, y); \
    } \
    KERNEL dequantise_int8_##T(const signed char* codes, u64 n, u32 cols, const float* scales, T* y) { \
        from_int8(codes, n, cols, scales, y); \
    }

KERNELS(f32)
KERNELS(bf16)
