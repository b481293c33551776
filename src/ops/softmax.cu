// From the scores of attention to its probabilities, and back: for heads whose products are cuBLAS's. Scores are f32,
// (heads, T, T); lse and delta (B, H, T). One warp per row: row r is query r % T of the (r / T)-th of the heads, whose place
// among all is `first`, `first + step`, ...

struct Extents {
    u32 len, heads, kv_heads, dim;
    float scale;
};

// p = softmax of the scaled scores of the keys that the query sees, 0 for the others.
template <class T>
__device__ __forceinline__ void forward(
    Extents e, const float* scores, T* p, float* lse, u64 rows, u32 first, u32 step
) {
    u64 row = (u64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return; // the whole warp
    u32 lane = threadIdx.x % 32, query = row % e.len;
    scores += row * e.len;
    p += row * e.len;
    float top = negative_infinity();
    for (u32 key = lane; key <= query; key += 32) top = fmaxf(top, e.scale * scores[key]);
    top = lanes_max(top, 32);
    float sum = 0.0f;
    for (u32 key = lane; key <= query; key += 32) sum += expf(e.scale * scores[key] - top);
    sum = lanes_sum(sum, 32);
    for (u32 key = lane; key < e.len; key += 32) {
        put(p + key, key <= query ? expf(e.scale * scores[key] - top) / sum : 0.0f);
    }
    if (lane == 0) lse[(first + row / e.len * step) * e.len + query] = top + logf(sum);
}

// p again, and ds = p * (dp - delta); 0 for keys that the query does not see.
template <class T>
__device__ __forceinline__ void backward(
    Extents e, const float* scores, const float* dp, const float* lse, const float* delta, T* p, T* ds, u64 rows,
    u32 first, u32 step
) {
    u64 row = (u64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    u32 query = row % e.len;
    u64 own = (first + row / e.len * step) * e.len + query;
    float row_lse = lse[own], row_delta = delta[own];
    for (u32 key = threadIdx.x % 32; key < e.len; key += 32) {
        u64 i = row * e.len + key;
        float x = key <= query ? expf(e.scale * scores[i] - row_lse) : 0.0f;
        put(p + i, x);
        put(ds + i, key <= query ? x * (dp[i] - row_delta) : 0.0f);
    }
}

#define KERNELS(T) \
    KERNEL softmax_forward_##T(Extents e, const float* scores, T* p, float* lse, u64 rows, u32 first, u32 step) { \
        forward(e, scores, p, lse, rows, first, step); \
    } \
    KERNEL softmax_backward_##T( \
        Extents e, const float* scores, const float* dp, const float* lse, const float* delta, T* p, T* ds, u64 rows, \
        u32 first, u32 step \
    ) { \
        backward(e, scores, dp, lse, delta, p, ds, rows, first, step); \
    }

KERNELS(f32)
KERNELS(bf16)
