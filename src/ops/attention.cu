// Causal attention with grouped key/value heads, in tiles of TILE queries by TILE keys (arXiv:2205.14135): the T x T
// scores never exist. q, o (B, T, H, D); k, v (B, T, K, D); lse, delta (B, H, T).
//
// A block has THREADS threads. Row r of a tile belongs to the LANES = THREADS / TILE neighbouring threads of one warp;
// of that row, such a thread has the columns lane, lane + LANES, ... A row of D elements takes D + 1 places in shared
// memory, so that threads that read one column of neighbouring rows find them in different banks.

#define LANES (THREADS / TILE)
// Scores of a row that one thread has.
#define COLS ((TILE + LANES - 1) / LANES)
// Elements of a row of D that one thread has at most; the caller chooses TILE so that D <= LANES * most.
#define FORWARD_MOST 16
#define BACKWARD_MOST 8

// Unrolled, so that what is indexed by j stays in registers.
#define EACH(j, most) _Pragma("unroll") for (int j = 0; j < most; j++)

struct Extents {
    u32 len, heads, kv_heads, dim;
    float scale;
};

// tile (TILE, D) = rows first .. first + TILE of one head, 0 beyond the end. `head` points to its row 0.
template <int TILE, class T>
__device__ __forceinline__ void load_tile(float* tile, const T* head, u32 first, u32 len, u32 stride, u32 dim) {
    for (u32 i = threadIdx.x; i < TILE * dim; i += THREADS) {
        u32 r = i / dim, d = i % dim;
        tile[r * (dim + 1) + d] = first + r < len ? get(head[(u64)(first + r) * stride + d]) : 0.0f;
    }
}

// <a[r], b[c]> for row r and this thread's columns.
template <int TILE>
__device__ __forceinline__ void products(const float* a, const float* b, u32 r, u32 lane, u32 dim, float* out) {
    EACH(j, COLS) out[j] = 0.0f;
    for (u32 d = 0; d < dim; d++) {
        float x = a[r * (dim + 1) + d];
        EACH(j, COLS) {
            u32 c = lane + j * LANES;
            if (c < TILE) out[j] += x * b[c * (dim + 1) + d];
        }
    }
}

// o and lse of one tile of queries. Grid: (ceil(T / TILE), H, B).
template <int TILE, class T>
__device__ __forceinline__ void forward(Extents e, const T* q, const T* k, const T* v, T* o, float* lse) {
    extern __shared__ float shared[];
    float* q_tile = shared;
    float* kv_tile = q_tile + TILE * (e.dim + 1);
    float* p_tile = kv_tile + TILE * (e.dim + 1);
    u32 r = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    u32 first = blockIdx.x * TILE, row = first + r;
    u32 h = blockIdx.y, kv = h / (e.heads / e.kv_heads);
    u32 q_stride = e.heads * e.dim, kv_stride = e.kv_heads * e.dim;
    u64 window = (u64)blockIdx.z * e.len;
    q += window * q_stride + h * e.dim;
    o += window * q_stride + h * e.dim;
    k += window * kv_stride + kv * e.dim;
    v += window * kv_stride + kv * e.dim;

    load_tile<TILE>(q_tile, q, first, e.len, q_stride, e.dim);
    float top = negative_infinity(), total = 0.0f, acc[FORWARD_MOST];
    EACH(j, FORWARD_MOST) acc[j] = 0.0f;
    for (u32 key = 0; key <= first; key += TILE) {
        load_tile<TILE>(kv_tile, k, key, e.len, kv_stride, e.dim);
        __syncthreads();
        float s[COLS];
        products<TILE>(q_tile, kv_tile, r, lane, e.dim, s);
        float new_top = top;
        EACH(j, COLS) {
            u32 c = lane + j * LANES;
            bool seen = c < TILE && key + c <= row;
            s[j] = seen ? e.scale * s[j] : negative_infinity();
            new_top = fmaxf(new_top, s[j]);
        }
        // The first key of the first tile is seen by every row: from here on the maximum is finite.
        new_top = lanes_max(new_top, LANES);
        float sum = 0.0f;
        EACH(j, COLS) {
            u32 c = lane + j * LANES;
            float p = expf(s[j] - new_top);
            sum += p;
            if (c < TILE) p_tile[r * (TILE + 1) + c] = p;
        }
        float fade = expf(top - new_top);
        total = total * fade + lanes_sum(sum, LANES);
        top = new_top;
        __syncthreads();
        load_tile<TILE>(kv_tile, v, key, e.len, kv_stride, e.dim);
        __syncthreads();
        EACH(j, FORWARD_MOST) acc[j] *= fade;
        for (u32 c = 0; c < TILE; c++) {
            float p = p_tile[r * (TILE + 1) + c];
            EACH(j, FORWARD_MOST) {
                u32 d = lane + j * LANES;
                if (d < e.dim) acc[j] += p * kv_tile[c * (e.dim + 1) + d];
            }
        }
        __syncthreads();
    }
    if (row < e.len) {
        EACH(j, FORWARD_MOST) {
            u32 d = lane + j * LANES;
            if (d < e.dim) put(o + (u64)row * q_stride + d, acc[j] / total);
        }
        if (lane == 0) lse[((u64)blockIdx.z * e.heads + h) * e.len + row] = top + logf(total);
    }
}

// delta = rowsum(dO * O). One warp per row (b, t, h).
template <class T>
__device__ __forceinline__ void row_delta(Extents e, const T* o, const T* d_o, float* delta, u64 rows) {
    u64 i = (u64)blockIdx.x * WARPS + threadIdx.x / 32;
    float sum = 0.0f;
    if (i < rows) {
        for (u32 d = threadIdx.x % 32; d < e.dim; d += 32) sum += get(d_o[i * e.dim + d]) * get(o[i * e.dim + d]);
    }
    sum = lanes_sum(sum, 32);
    if (i < rows && threadIdx.x % 32 == 0) {
        u64 h = i % e.heads, t = i / e.heads % e.len, b = i / e.heads / e.len;
        delta[(b * e.heads + h) * e.len + t] = sum;
    }
}

// This thread's columns of P, the probabilities, and of dS = P * (dP - delta), dP = dO V^T; 0 where a key is not seen.
template <int TILE>
__device__ __forceinline__ void probabilities(
    Extents e, const float* q_tile, const float* k_tile, const float* d_o_tile, const float* v_tile, u32 r, u32 lane,
    u32 row, u32 key, float lse, float delta, float* p, float* ds
) {
    products<TILE>(q_tile, k_tile, r, lane, e.dim, p);
    products<TILE>(d_o_tile, v_tile, r, lane, e.dim, ds);
    EACH(j, COLS) {
        bool seen = row < e.len && key + lane + j * LANES <= row;
        p[j] = seen ? expf(e.scale * p[j] - lse) : 0.0f;
        ds[j] = p[j] * (ds[j] - delta);
    }
}

// dq = scale * dS K of one tile of queries; dq may lie where q does. Grid: (ceil(T / TILE), H, B).
template <int TILE, class T>
__device__ __forceinline__ void backward_q(
    Extents e, const T* q, const T* k, const T* v, const float* lse, const float* delta, const T* d_o, T* dq
) {
    extern __shared__ float shared[];
    u32 size = TILE * (e.dim + 1);
    float *q_tile = shared, *d_o_tile = shared + size, *k_tile = shared + 2 * size, *v_tile = shared + 3 * size;
    float* ds_tile = shared + 4 * size;
    u32 r = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    u32 first = blockIdx.x * TILE, row = first + r;
    u32 h = blockIdx.y, kv = h / (e.heads / e.kv_heads);
    u32 q_stride = e.heads * e.dim, kv_stride = e.kv_heads * e.dim;
    u64 window = (u64)blockIdx.z * e.len, own = ((u64)blockIdx.z * e.heads + h) * e.len + row;
    u64 q_head = window * q_stride + h * e.dim, kv_head = window * kv_stride + kv * e.dim;

    load_tile<TILE>(q_tile, q + q_head, first, e.len, q_stride, e.dim);
    load_tile<TILE>(d_o_tile, d_o + q_head, first, e.len, q_stride, e.dim);
    float own_lse = row < e.len ? lse[own] : 0.0f, own_delta = row < e.len ? delta[own] : 0.0f;
    float acc[BACKWARD_MOST];
    EACH(j, BACKWARD_MOST) acc[j] = 0.0f;
    for (u32 key = 0; key <= first; key += TILE) {
        load_tile<TILE>(k_tile, k + kv_head, key, e.len, kv_stride, e.dim);
        load_tile<TILE>(v_tile, v + kv_head, key, e.len, kv_stride, e.dim);
        __syncthreads();
        float p[COLS], ds[COLS];
        probabilities<TILE>(e, q_tile, k_tile, d_o_tile, v_tile, r, lane, row, key, own_lse, own_delta, p, ds);
        EACH(j, COLS) {
            u32 c = lane + j * LANES;
            if (c < TILE) ds_tile[r * (TILE + 1) + c] = ds[j];
        }
        __syncthreads();
        for (u32 c = 0; c < TILE; c++) {
            float x = ds_tile[r * (TILE + 1) + c];
            EACH(j, BACKWARD_MOST) {
                u32 d = lane + j * LANES;
                if (d < e.dim) acc[j] += x * k_tile[c * (e.dim + 1) + d];
            }
        }
        __syncthreads();
    }
    if (row < e.len) {
        EACH(j, BACKWARD_MOST) {
            u32 d = lane + j * LANES;
            if (d < e.dim) put(dq + q_head + (u64)row * q_stride + d, e.scale * acc[j]);
        }
    }
}

// dk = scale * dS^T Q and dv = P^T dO of one tile of keys, summed over the query heads that read them.
// Grid: (ceil(T / TILE), K, B).
template <int TILE, class T>
__device__ __forceinline__ void backward_kv(
    Extents e, const T* q, const T* k, const T* v, const float* lse, const float* delta, const T* d_o, T* dk, T* dv
) {
    extern __shared__ float shared[];
    u32 size = TILE * (e.dim + 1);
    float *q_tile = shared, *d_o_tile = shared + size, *k_tile = shared + 2 * size, *v_tile = shared + 3 * size;
    float *ds_tile = shared + 4 * size, *p_tile = ds_tile + TILE * (TILE + 1);
    u32 r = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    u32 key = blockIdx.x * TILE;
    u32 group = e.heads / e.kv_heads, kv = blockIdx.y;
    u32 q_stride = e.heads * e.dim, kv_stride = e.kv_heads * e.dim;
    u64 window = (u64)blockIdx.z * e.len;
    u64 kv_head = window * kv_stride + kv * e.dim;

    load_tile<TILE>(k_tile, k + kv_head, key, e.len, kv_stride, e.dim);
    load_tile<TILE>(v_tile, v + kv_head, key, e.len, kv_stride, e.dim);
    float acc_k[BACKWARD_MOST], acc_v[BACKWARD_MOST];
    EACH(j, BACKWARD_MOST) acc_k[j] = acc_v[j] = 0.0f;
    for (u32 h = kv * group; h < (kv + 1) * group; h++) {
        u64 q_head = window * q_stride + h * e.dim, rows = ((u64)blockIdx.z * e.heads + h) * e.len;
        for (u32 first = key; first < e.len; first += TILE) {
            load_tile<TILE>(q_tile, q + q_head, first, e.len, q_stride, e.dim);
            load_tile<TILE>(d_o_tile, d_o + q_head, first, e.len, q_stride, e.dim);
            __syncthreads();
            u32 row = first + r;
            float row_lse = row < e.len ? lse[rows + row] : 0.0f, row_delta = row < e.len ? delta[rows + row] : 0.0f;
            float p[COLS], ds[COLS];
            probabilities<TILE>(e, q_tile, k_tile, d_o_tile, v_tile, r, lane, row, key, row_lse, row_delta, p, ds);
            EACH(j, COLS) {
                u32 c = lane + j * LANES;
                if (c < TILE) {
                    p_tile[r * (TILE + 1) + c] = p[j];
                    ds_tile[r * (TILE + 1) + c] = ds[j];
                }
            }
            __syncthreads();
            // From here on, r is this thread's key.
            for (u32 i = 0; i < TILE; i++) {
                float x = p_tile[i * (TILE + 1) + r], y = ds_tile[i * (TILE + 1) + r];
                EACH(j, BACKWARD_MOST) {
                    u32 d = lane + j * LANES;
                    if (d < e.dim) {
                        acc_v[j] += x * d_o_tile[i * (e.dim + 1) + d];
                        acc_k[j] += y * q_tile[i * (e.dim + 1) + d];
                    }
                }
            }
            __syncthreads();
        }
    }
    if (key + r < e.len) {
        EACH(j, BACKWARD_MOST) {
            u32 d = lane + j * LANES;
            if (d < e.dim) {
                put(dk + kv_head + (u64)(key + r) * kv_stride + d, e.scale * acc_k[j]);
                put(dv + kv_head + (u64)(key + r) * kv_stride + d, acc_v[j]);
            }
        }
    }
}

#define TILED extern "C" __global__ void __launch_bounds__(THREADS, 2)

#define FORWARD(TILE, T) \
    TILED attention_forward_##TILE##_##T(Extents e, const T* q, const T* k, const T* v, T* o, float* lse) { \
        forward<TILE>(e, q, k, v, o, lse); \
    }

#define BACKWARD(TILE, T) \
    TILED attention_backward_q_##TILE##_##T( \
        Extents e, const T* q, const T* k, const T* v, const float* lse, const float* delta, const T* d_o, T* dq \
    ) { \
        backward_q<TILE>(e, q, k, v, lse, delta, d_o, dq); \
    } \
    TILED attention_backward_kv_##TILE##_##T( \
        Extents e, const T* q, const T* k, const T* v, const float* lse, const float* delta, const T* d_o, T* dk, T* dv \
    ) { \
        backward_kv<TILE>(e, q, k, v, lse, delta, d_o, dk, dv); \
    }

#define KERNELS(T) \
    FORWARD(32, T) \
    FORWARD(16, T) \
    KERNEL attention_delta_##T(Extents e, const T* o, const T* d_o, float* delta, u64 rows) { \
        row_delta(e, o, d_o, delta, rows); \
    } \
    BACKWARD(32, T) \
    BACKWARD(16, T) \
    BACKWARD(8, T)

KERNELS(f32)
KERNELS(bf16)
