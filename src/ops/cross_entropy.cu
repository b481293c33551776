// Cross-entropy of logits against token ids, and its gradient in place.

#define IGNORE 0xffffffffu

// One block per row of logits (rows, V); targets and losses begin at the first of these rows. With `backward`, the
// logits become scale * (softmax - one_hot), 0 in rows without a target.
template <class T>
__device__ __forceinline__ void row(
    const u32* targets, T* logits, float* losses, u32 vocab, u32 backward, float scale
) {
    logits += (u64)blockIdx.x * vocab;
    u32 target = targets[blockIdx.x];
    if (target == IGNORE) {
        if (backward) {
            for (u32 i = threadIdx.x; i < vocab; i += THREADS) put(logits + i, 0.0f);
        }
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
        return;
    }
    float top = negative_infinity();
    for (u32 i = threadIdx.x; i < vocab; i += THREADS) top = fmaxf(top, get(logits[i]));
    top = block_max(top);
    float at_target = get(logits[target]) - top;
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < vocab; i += THREADS) sum += (double)expf(get(logits[i]) - top);
    // Everyone has read the target's logit and its own before any is replaced: block_sum waits for all.
    double total = block_sum(sum);
    if (backward) {
        float factor = (float)((double)scale / total);
        for (u32 i = threadIdx.x; i < vocab; i += THREADS) {
            put(logits + i, expf(get(logits[i]) - top) * factor - (i == target ? scale : 0.0f));
        }
    }
    if (threadIdx.x == 0) losses[blockIdx.x] = (float)(log(total) - (double)at_target);
}

#define KERNELS(T) \
    KERNEL cross_entropy_##T( \
        const u32* targets, T* logits, float* losses, u32 vocab, u32 backward, float scale \
    ) { \
        row(targets, logits, losses, vocab, backward, scale); \
    }

KERNELS(f32)
KERNELS(bf16)
