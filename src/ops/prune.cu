// What a restart does to the moments of a tensor: prune.rs has the same, bit for bit.

// 0 where chance says so: the bits of an element are those of dropout. A thread takes the four elements of a counter.
KERNEL prune_random(float* m, float* v, u64 n, u64 key, u32 threshold) {
    FOR_EACH(counter, counters_for(n)) {
        Words bits = philox(counter, key);
        for (int w = 0; w < 4; w++) {
            u64 i = element_of(counter, w);
            if (i < n && bits.word[w] < threshold) m[i] = v[i] = 0.0f;
        }
    }
}

// The k-th smallest size of an element, exactly, by its digits: sizes of floats are ordered as their bits are. Four rounds of
// 8 bits, each a count of the elements that begin like the result. Whole numbers are counted, so their order does not matter.
struct Select {
    u32 prefix;         // bits of the result that are known
    u32 skip;           // elements that begin like it and are smaller than it: k at first
    u32 equal;          // after the last round: elements of its size
    u32 above;          // smallest size above it
    u32 count[256];
};

__device__ __forceinline__ u32 size_bits(float x) {
    return __float_as_uint(x) & 0x7fffffffu;
}

KERNEL select_count(const float* x, u64 n, u32 shift, Select* select) {
    __shared__ u32 count[256];
    count[threadIdx.x] = 0;
    __syncthreads();
    // What has been decided, without the digit of this round: nothing at first.
    u32 decided = shift == 24 ? 0 : 0xffffffffu << (shift + 8);
    u32 prefix = select->prefix;
    FOR_EACH(i, n) {
        u32 bits = size_bits(x[i]);
        if ((bits & decided) == prefix) atomicAdd(&count[bits >> shift & 255], 1u);
    }
    __syncthreads();
    if (count[threadIdx.x] > 0) atomicAdd(&select->count[threadIdx.x], count[threadIdx.x]);
}

// One block. Decides the digit, and clears the counts.
KERNEL select_digit(u32 shift, Select* select) {
    if (threadIdx.x == 0) {
        u32 digit = 0, skip = select->skip;
        while (digit < 255 && skip >= select->count[digit]) skip -= select->count[digit++];
        select->prefix |= digit << shift;
        select->skip = skip;
        select->equal = select->count[digit];
        select->above = 0xffffffffu;
    }
    __syncthreads();
    select->count[threadIdx.x] = 0;
}

KERNEL select_above(const float* x, u64 n, Select* select) {
    u32 low = select->prefix, least = 0xffffffffu;
    FOR_EACH(i, n) {
        u32 bits = size_bits(x[i]);
        if (bits > low && bits < least) least = bits;
    }
    if (least < 0xffffffffu) atomicMin(&select->above, least);
}

// x = 0 where the size of `by` is not above the quantile: the k-th smallest size and a fraction of the way to the next.
KERNEL prune_below(float* x, const float* by, u64 n, const Select* select, double fraction) {
    bool last = select->skip + 1 >= select->equal && select->above < 0xffffffffu;
    double low = __uint_as_float(select->prefix), high = __uint_as_float(last ? select->above : select->prefix);
    float threshold = (float)(low + fraction * (high - low));
    FOR_EACH(i, n) {
        if (!(fabsf(by[i]) > threshold)) x[i] = 0.0f;
    }
}
