// Loops over whole buffers: scale, axpy, sums.

extern "C" __global__ void scale(float* x, u64 n, float factor) {
    FOR_EACH(i, n) x[i] *= factor;
}

extern "C" __global__ void axpy(float alpha, const float* x, float* y, u64 n) {
    FOR_EACH(i, n) y[i] += alpha * x[i];
}

// parts[block] = this block's share of sum x * y. The shares depend on n and the size of the grid alone.
extern "C" __global__ void dot_parts(const float* x, const float* y, u64 n, double* parts) {
    double sum = 0.0;
    FOR_EACH(i, n) sum += (double)x[i] * (double)y[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

extern "C" __global__ void sum_parts(const float* x, u64 n, double* parts) {
    double sum = 0.0;
    FOR_EACH(i, n) sum += (double)x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// One block: total += scale * the sum of all parts.
extern "C" __global__ void add_parts(const double* parts, u32 count, double scale, double* total) {
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) sum += parts[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *total += scale * sum;
}
