// What all kernels share; stands before each of the other files when it is compiled. Nothing is included: NVRTC brings
// the mathematical functions along.
//
// No result depends on the order of blocks or on timing: sums run in a fixed order, and only whole numbers are counted
// atomically.

typedef unsigned int u32;
typedef unsigned long long u64;

// Threads of a block, for every kernel.
#define THREADS 256
#define WARPS (THREADS / 32)
#define ALL_LANES 0xffffffffu

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

// What elements are: f32, or bf16, the upper half of one. Every kernel computes in f32: it gets what it reads and puts what
// it has computed. Kernels for both are templates, and have names that end in the type.
typedef float f32;
struct bf16 {
    unsigned short bits;
};

__device__ __forceinline__ float get(f32 x) {
    return x;
}

__device__ __forceinline__ float get(bf16 x) {
    return __uint_as_float((u32)x.bits << 16);
}

__device__ __forceinline__ void put(f32* to, float x) {
    *to = x;
}

__device__ __forceinline__ bool is_finite(u32 bits) {
    return (bits & 0x7f800000u) != 0x7f800000u;
}

// The nearest bf16, the even one of two equally near. What is not finite stays so: a NaN keeps a bit that makes it one.
__device__ __forceinline__ void put(bf16* to, float x) {
    u32 bits = __float_as_uint(x);
    u32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    if (!is_finite(bits)) rounded = bits | (bits & 0xffffu ? 0x400000u : 0u);
    to->bits = (unsigned short)(rounded >> 16);
}

// Elements i of n, shared by all threads of the grid.
#define FOR_EACH(i, n) \
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (u64)gridDim.x * blockDim.x)

__device__ __forceinline__ float negative_infinity() {
    return __int_as_float((int)0xff800000u);
}

// The sum over `lanes` neighbouring threads (a power of two up to 32), on each of them.
__device__ __forceinline__ float lanes_sum(float x, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ __forceinline__ float lanes_max(float x, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

__device__ __forceinline__ double warp_sum(double x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// The sum over the block, on each thread. All threads call it.
__device__ __forceinline__ double block_sum(double x) {
    __shared__ double parts[WARPS];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0.0;
    for (int i = 0; i < WARPS; i++) total += parts[i];
    __syncthreads();
    return total;
}

// The largest over the block, on each thread; NaN are passed over. All threads call it.
__device__ __forceinline__ float block_max(float x) {
    __shared__ float parts[WARPS];
    x = lanes_max(x, 32);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float top = negative_infinity();
    for (int i = 0; i < WARPS; i++) top = fmaxf(top, parts[i]);
    __syncthreads();
    return top;
}

// Four words of Philox4x32-10 (Salmon et al., SC 2011): philox.rs has the same generator and the same use of its words.
struct Words {
    u32 word[4];
};

__device__ __forceinline__ Words philox(u64 counter, u64 key) {
    u32 c0 = (u32)counter, c1 = (u32)(counter >> 32), c2 = 0, c3 = 0;
    u32 k0 = (u32)key, k1 = (u32)(key >> 32);
    for (int round = 0; round < 10; round++) {
        u64 a = (u64)c0 * 0xd2511f53u, b = (u64)c2 * 0xcd9e8d57u;
        c0 = (u32)(b >> 32) ^ c1 ^ k0;
        c1 = (u32)b;
        c2 = (u32)(a >> 32) ^ c3 ^ k1;
        c3 = (u32)a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return {{c0, c1, c2, c3}};
}

// Counters that serve n elements.
__device__ __forceinline__ u64 counters_for(u64 n) {
    return (n + 63) / 64 * 16;
}

// The element that a word of a counter is for.
__device__ __forceinline__ u64 element_of(u64 counter, int word) {
    return counter / 16 * 64 + 16 * word + counter % 16;
}
