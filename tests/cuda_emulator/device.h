// What a kernel finds when it is compiled for the host: CUDA's keywords, built-in variables and functions. The threads of
// a block are fibers (driver.cpp); those that wait for others hand over to them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

struct Dim3 {
    unsigned x, y, z;
};

// Filled by the driver before a thread runs.
struct CudaEmulator {
    Dim3 thread, block, block_dim, grid_dim;
    void* dynamic_shared;
    void (*barrier)(int line);
    void (*exchange)(int line, const void* own, void* other, unsigned size, unsigned lane, unsigned mask);
};

extern "C" {
CudaEmulator* cuda_emulator;

void cuda_emulator_attach(CudaEmulator* from_driver) {
    cuda_emulator = from_driver;
}

// All __shared__ variables of the module.
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

void cuda_emulator_shared(char** start, char** stop) {
    *start = __start_cuda_shared;
    *stop = __stop_cuda_shared;
}
}

template <class... A, std::size_t... I>
static void cuda_emulator_call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<std::decay_t<A>*>(args[I])...);
}

template <class... A>
static void cuda_emulator_invoke(void (*kernel)(A...), void** args) {
    cuda_emulator_call(kernel, args, std::index_sequence_for<A...>());
}

// Bytes of each argument, then 0.
template <class... A>
static const unsigned* cuda_emulator_sizes(void (*)(A...)) {
    static const unsigned sizes[] = {sizeof(std::decay_t<A>)..., 0};
    return sizes;
}

#define __global__
#define __device__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))

#define threadIdx (cuda_emulator->thread)
#define blockIdx (cuda_emulator->block)
#define blockDim (cuda_emulator->block_dim)
#define gridDim (cuda_emulator->grid_dim)

#define __syncthreads() cuda_emulator->barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lanes) cuda_emulator_shuffle_xor(__LINE__, mask, value, lanes)

template <class T>
static T cuda_emulator_shuffle_xor(int line, unsigned mask, T value, int lanes) {
    T other;
    cuda_emulator->exchange(line, &value, &other, sizeof value, (cuda_emulator->thread.x % 32) ^ lanes, mask);
    return other;
}

static inline float __uint_as_float(unsigned x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}

static inline unsigned __float_as_uint(float x) {
    unsigned y;
    std::memcpy(&y, &x, 4);
    return y;
}

static inline float __int_as_float(int x) {
    return __uint_as_float(x);
}

// The compiler is told not to contract, so these are what every product and sum is.
static inline float __fmul_rn(float x, float y) {
    return x * y;
}

static inline float __fadd_rn(float x, float y) {
    return x + y;
}

static inline float __fdiv_rn(float x, float y) {
    return x / y;
}

// Threads are fibers of one thread.
static inline unsigned atomicAdd(unsigned* to, unsigned x) {
    unsigned before = *to;
    *to += x;
    return before;
}

static inline unsigned atomicMin(unsigned* to, unsigned x) {
    unsigned before = *to;
    if (x < *to) *to = x;
    return before;
}

using std::min;
