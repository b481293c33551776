// Token embedding: a gather, and a scatter-add in the order of the rows.

// y (N, C) = table[tokens]
extern "C" __global__ void embedding_forward(const u32* tokens, const float* table, float* y, u64 n, u32 width) {
    FOR_EACH(i, n) y[i] = table[(u64)tokens[i / width] * width + i % width];
}

// One block per distinct token: `rows` are the row numbers sorted by token, in their order within a token; the rows of
// the block's token are rows[starts[b] .. starts[b + 1]].
extern "C" __global__ void embedding_backward(
    const u32* tokens, const u32* rows, const u32* starts, const float* dy, float* dtable, u32 width
) {
    u32 first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    u64 token = tokens[rows[first]];
    for (u32 c = threadIdx.x; c < width; c += THREADS) {
        float sum = dtable[token * width + c];
        for (u32 i = first; i < end; i++) sum += dy[(u64)rows[i] * width + c];
        dtable[token * width + c] = sum;
    }
}
