// Loops over whole buffers: scale, axpy, conversions, sums.

KERNEL scale(float* x, u64 n, float factor) {
    FOR_EACH(i, n) x[i] *= factor;
}

KERNEL axpy(float alpha, const float* x, float* y, u64 n) {
    FOR_EACH(i, n) y[i] += alpha * x[i];
}

KERNEL to_bf16(const float* x, bf16* y, u64 n) {
    FOR_EACH(i, n) put(y + i, x[i]);
}

KERNEL to_f32(const bf16* x, float* y, u64 n) {
    FOR_EACH(i, n) y[i] = get(x[i]);
}

// parts[block] = this block's share of sum x * y. The shares depend on n and the size of the grid alone.
template <class T>
__device__ __forceinline__ void dot(const T* x, const T* y, u64 n, double* parts) {
    double sum = 0.0;
    FOR_EACH(i, n) sum += (double)get(x[i]) * (double)get(y[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

KERNEL dot_parts_f32(const f32* x, const f32* y, u64 n, double* parts) {
    dot(x, y, n, parts);
}

KERNEL dot_parts_bf16(const bf16* x, const bf16* y, u64 n, double* parts) {
    dot(x, y, n, parts);
}

KERNEL sum_parts(const float* x, u64 n, double* parts) {
    double sum = 0.0;
    FOR_EACH(i, n) sum += (double)x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// One block: total += scale * the sum of all parts.
KERNEL add_parts(const double* parts, u32 count, double scale, double* total) {
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) sum += parts[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *total += scale * sum;
}

// One thread. factors = tanh(p), beta: what a product is told that has its factors on the GPU.
KERNEL tanh_factors(const float* p, float beta, float* factors) {
    if (threadIdx.x > 0) return;
    factors[0] = tanhf(*p);
    factors[1] = beta;
}

// One thread. dp += (1 - tanh(p)^2) * product
KERNEL tanh_backward(const float* p, const double* product, float* dp) {
    if (threadIdx.x > 0) return;
    double s = (double)tanhf(*p);
    *dp = (float)((double)*dp + (1.0 - s * s) * *product);
}

// Where the matrices of three kinds are, of each kind `rows` times `columns` that follow each other in two steps of bytes.
KERNEL places(
    u64* to, u32 rows, u32 columns, u64 a, u64 a_row, u64 a_column, u64 b, u64 b_row, u64 b_column, u64 c, u64 c_row,
    u64 c_column
) {
    u64 count = (u64)rows * columns;
    FOR_EACH(i, count) {
        u64 row = i / columns, column = i % columns;
        to[i] = a + row * a_row + column * a_column;
        to[count + i] = b + row * b_row + column * b_column;
        to[2 * count + i] = c + row * c_row + column * c_column;
    }
}
