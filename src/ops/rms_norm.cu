// RMSNorm over the last axis (arXiv:1910.07467): y = weight * x * rstd. x, y (N, C); weight (C); rstd (N).

// Rows of which one thread adds up a column of dweight.
#define ROWS 64

// One warp per row.
extern "C" __global__ void rms_norm_forward(
    const float* x, const float* weight, float eps, float* y, float* rstd, u32 rows, u32 width
) {
    u32 row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return; // the whole warp
    x += (u64)row * width;
    y += (u64)row * width;
    float sum = 0.0f;
    for (u32 c = lane; c < width; c += 32) sum += x[c] * x[c];
    double mean = warp_sum((double)sum) / width;
    float r = (float)(1.0 / sqrt(mean + (double)eps));
    for (u32 c = lane; c < width; c += 32) y[c] = weight[c] * (x[c] * r);
    if (lane == 0) rstd[row] = r;
}

// One warp per row. With n = x * rstd and g = weight * dy: dx += rstd * (g - n * mean(g * n)).
extern "C" __global__ void rms_norm_backward(
    const float* x, const float* weight, const float* rstd, const float* dy, float* dx, u32 rows, u32 width
) {
    u32 row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return; // the whole warp
    x += (u64)row * width;
    dy += (u64)row * width;
    dx += (u64)row * width;
    float r = rstd[row];
    float sum = 0.0f;
    for (u32 c = lane; c < width; c += 32) sum += dy[c] * weight[c] * x[c];
    float mean = (float)(warp_sum((double)sum) * (double)r / width);
    for (u32 c = lane; c < width; c += 32) dx[c] += r * (dy[c] * weight[c] - x[c] * r * mean);
}

// parts (ceil(N / ROWS), C): blockIdx.y's rows of dweight = sum over rows of dy * x * rstd. One thread per column.
extern "C" __global__ void rms_norm_dweight_parts(
    const float* x, const float* rstd, const float* dy, float* parts, u32 rows, u32 width
) {
    u32 c = blockIdx.x * THREADS + threadIdx.x;
    if (c >= width) return;
    u32 first = blockIdx.y * ROWS, end = min(first + ROWS, rows);
    float sum = 0.0f;
    for (u32 n = first; n < end; n++) sum += dy[(u64)n * width + c] * (x[(u64)n * width + c] * rstd[n]);
    parts[(u64)blockIdx.y * width + c] = sum;
}

// dweight += the parts, in their order. One thread per column.
extern "C" __global__ void rms_norm_dweight(const float* parts, float* dweight, u32 count, u32 width) {
    u32 c = blockIdx.x * THREADS + threadIdx.x;
    if (c >= width) return;
    float sum = dweight[c];
    for (u32 i = 0; i < count; i++) sum += parts[(u64)i * width + c];
    dweight[c] = sum;
}
