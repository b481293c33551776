// Token embedding: a gather, and a scatter-add in the order of the rows. The table and its gradient are f32.

// y (N, C) = table[tokens]
template <class T>
__device__ __forceinline__ void gather(const u32* tokens, const float* table, T* y, u64 n, u32 width) {
    FOR_EACH(i, n) put(y + i, table[(u64)tokens[i / width] * width + i % width]);
}

// One block per distinct token: `rows` are the row numbers sorted by token, in their order within a token; the rows of
// the block's token are rows[starts[b] .. starts[b + 1]].
template <class T>
__device__ __forceinline__ void scatter_add(
    const u32* tokens, const u32* rows, const u32* starts, const T* dy, float* dtable, u32 width
) {
    u32 first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    u64 token = tokens[rows[first]];
    for (u32 c = threadIdx.x; c < width; c += THREADS) {
        float sum = dtable[token * width + c];
        for (u32 i = first; i < end; i++) sum += get(dy[(u64)rows[i] * width + c]);
        dtable[token * width + c] = sum;
    }
}

#define KERNELS(T) \
    KERNEL embedding_forward_##T(const u32* tokens, const float* table, T* y, u64 n, u32 width) { \
        gather(tokens, table, y, n, width); \
    } \
    KERNEL embedding_backward_##T( \
        const u32* tokens, const u32* rows, const u32* starts, const T* dy, float* dtable, u32 width \
    ) { \
        scatter_add(tokens, rows, starts, dy, dtable, width); \
    }

KERNELS(f32)
KERNELS(bf16)
