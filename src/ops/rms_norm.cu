// RMSNorm over the last axis (arXiv:1910.07467): y = weight * x * rstd. x, y (N, C); weight (C), rstd (N) in f32.

// Rows of which one thread adds up a column of dweight.
#define ROWS 64

// One warp per row. With a branch, x becomes x + branch in `sum` first: the norm is that of what is stored there.
template <class T, bool ADD>
__device__ __forceinline__ void forward(
    const T* x, const T* branch, T* sum, const float* weight, float eps, T* y, float* rstd, u32 rows, u32 width
) {
    u32 row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return; // the whole warp
    u64 first = (u64)row * width;
    x += first;
    y += first;
    if (ADD) {
        branch += first;
        sum += first;
        for (u32 c = lane; c < width; c += 32) put(sum + c, get(x[c]) + get(branch[c]));
        x = sum; // each lane reads what it has written
    }
    float squares = 0.0f;
    for (u32 c = lane; c < width; c += 32) squares += get(x[c]) * get(x[c]);
    double mean = warp_sum((double)squares) / width;
    float r = (float)(1.0 / sqrt(mean + (double)eps));
    for (u32 c = lane; c < width; c += 32) put(y + c, weight[c] * (get(x[c]) * r));
    if (lane == 0) rstd[row] = r;
}

// One warp per row. With n = x * rstd and g = weight * dy: dx += rstd * (g - n * mean(g * n)).
template <class T>
__device__ __forceinline__ void backward(
    const T* x, const float* weight, const float* rstd, const T* dy, T* dx, u32 rows, u32 width
) {
    u32 row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return; // the whole warp
    x += (u64)row * width;
    dy += (u64)row * width;
    dx += (u64)row * width;
    float r = rstd[row];
    float sum = 0.0f;
    for (u32 c = lane; c < width; c += 32) sum += get(dy[c]) * weight[c] * get(x[c]);
    float mean = (float)(warp_sum((double)sum) * (double)r / width);
    for (u32 c = lane; c < width; c += 32) {
        put(dx + c, get(dx[c]) + r * (get(dy[c]) * weight[c] - get(x[c]) * r * mean));
    }
}

// parts (ceil(N / ROWS), C): blockIdx.y's rows of dweight = sum over rows of dy * x * rstd. One thread per column.
template <class T>
__device__ __forceinline__ void dweight_parts(
    const T* x, const float* rstd, const T* dy, float* parts, u32 rows, u32 width
) {
    u32 c = blockIdx.x * THREADS + threadIdx.x;
    if (c >= width) return;
    u32 first = blockIdx.y * ROWS, end = min(first + ROWS, rows);
    float sum = 0.0f;
    for (u32 n = first; n < end; n++) sum += get(dy[(u64)n * width + c]) * (get(x[(u64)n * width + c]) * rstd[n]);
    parts[(u64)blockIdx.y * width + c] = sum;
}

// dweight += the parts, in their order. One thread per column.
KERNEL rms_norm_dweight(const float* parts, float* dweight, u32 count, u32 width) {
    u32 c = blockIdx.x * THREADS + threadIdx.x;
    if (c >= width) return;
    float sum = dweight[c];
    for (u32 i = 0; i < count; i++) sum += parts[(u64)i * width + c];
    dweight[c] = sum;
}

#define KERNELS(T) \
    KERNEL rms_norm_forward_##T( \
        const T* x, const float* weight, float eps, T* y, float* rstd, u32 rows, u32 width \
    ) { \
        forward<T, false>(x, nullptr, nullptr, weight, eps, y, rstd, rows, width); \
    } \
    KERNEL add_rms_norm_forward_##T( \
        const T* x, const T* branch, T* sum, const float* weight, float eps, T* y, float* rstd, u32 rows, u32 width \
    ) { \
        forward<T, true>(x, branch, sum, weight, eps, y, rstd, rows, width); \
    } \
    KERNEL rms_norm_backward_##T( \
        const T* x, const float* weight, const float* rstd, const T* dy, T* dx, u32 rows, u32 width \
    ) { \
        backward(x, weight, rstd, dy, dx, rows, width); \
    } \
    KERNEL rms_norm_dweight_parts_##T( \
        const T* x, const float* rstd, const T* dy, float* parts, u32 rows, u32 width \
    ) { \
        dweight_parts(x, rstd, dy, parts, rows, width); \
    }

KERNELS(f32)
KERNELS(bf16)
