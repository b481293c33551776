// A stand-in for libcublas.so.12: what the program asks for, with plain sums. TF32 rounds as the hardware
// does, so that its being on or off can be seen.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <dlfcn.h>
#include <vector>

enum Status { OK = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13 };

struct Handle {
    void* stream;
    int mode;
};

struct Product {
    bool ta, tb;
    int m, n, k;
    float alpha;
    const float* a;
    int lda;
    const float* b;
    int ldb;
    float beta;
    float* c;
    int ldc;
    bool tf32;
};

static float tf32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x1000) & 0xffffe000u;
    memcpy(&x, &bits, 4);
    return x;
}

// The matrix by columns, not transposed any more: rows x cols.
static std::vector<float> plain(const float* x, int ld, int rows, int cols, bool transposed, bool round) {
    std::vector<float> y((size_t)rows * cols);
    for (int j = 0; j < cols; j++) {
        for (int i = 0; i < rows; i++) {
            float value = transposed ? x[(size_t)i * ld + j] : x[(size_t)j * ld + i];
            y[(size_t)j * rows + i] = round ? tf32(value) : value;
        }
    }
    return y;
}

static void run(void* argument) {
    const Product& p = *(Product*)argument;
    auto a = plain(p.a, p.lda, p.m, p.k, p.ta, p.tf32);
    auto b = plain(p.b, p.ldb, p.k, p.n, p.tb, p.tf32);
    std::vector<float> sums(4 * (size_t)p.m);
    for (int first = 0; first < p.n; first += 4) {
        int count = p.n - first < 4 ? p.n - first : 4;
        std::fill(sums.begin(), sums.end(), 0.0f);
        float *s0 = &sums[0], *s1 = s0 + p.m, *s2 = s1 + p.m, *s3 = s2 + p.m;
        for (int l = 0; l < p.k; l++) {
            const float* column = &a[(size_t)l * p.m];
            float x[4] = {};
            for (int j = 0; j < count; j++) x[j] = b[(size_t)(first + j) * p.k + l];
            for (int i = 0; i < p.m; i++) {
                s0[i] += column[i] * x[0];
                s1[i] += column[i] * x[1];
                s2[i] += column[i] * x[2];
                s3[i] += column[i] * x[3];
            }
        }
        for (int j = 0; j < count; j++) {
            float* c = p.c + (size_t)(first + j) * p.ldc;
            for (int i = 0; i < p.m; i++) {
                float sum = p.alpha * sums[(size_t)j * p.m + i];
                c[i] = p.beta == 0.0f ? sum : sum + p.beta * c[i];
            }
        }
    }
}

// driver.cpp's, which turns a touch of foreign memory into a failure of the GPU.
typedef int (*Protect)(const char*, void (*)(void*), void*);

static Protect protect() {
    void* driver = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
    return driver ? (Protect)dlsym(driver, "cuda_double_protect") : nullptr;
}

extern "C" {

Status cublasCreate_v2(Handle** handle) {
    if (!protect()) return NOT_INITIALIZED;
    *handle = new Handle{nullptr, 0};
    return OK;
}

Status cublasDestroy_v2(Handle* handle) {
    delete handle;
    return OK;
}

Status cublasSetStream_v2(Handle* handle, void* stream) {
    handle->stream = stream;
    return OK;
}

Status cublasSetMathMode(Handle* handle, int mode) {
    handle->mode = mode;
    return OK;
}

Status cublasSgemm_v2(
    Handle* handle, int ta, int tb, int m, int n, int k, const float* alpha, const float* a, int lda, const float* b,
    int ldb, const float* beta, float* c, int ldc
) {
    if (!handle->stream || m < 0 || n < 0 || k < 0 || lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m) {
        return INVALID_VALUE;
    }
    Product product = {ta != 0, tb != 0, m, n, k, *alpha, a, lda, b, ldb, *beta, c, ldc, handle->mode == 3};
    return protect()("cublasSgemm", run, &product) == 0 ? OK : EXECUTION_FAILED;
}
}

// ---- f64, for spectra.

struct RankUpdate {
    bool lower, transposed;
    int n, k;
    double alpha;
    const double* a;
    int lda;
    double beta;
    double* c;
    int ldc;
};

// One triangle; the other is neither read nor written.
static void rank_update(void* argument) {
    const RankUpdate& p = *(RankUpdate*)argument;
    for (int j = 0; j < p.n; j++) {
        for (int i = p.lower ? j : 0; i < (p.lower ? p.n : j + 1); i++) {
            double sum = 0.0;
            for (int l = 0; l < p.k; l++) {
                sum += p.transposed ? p.a[(size_t)i * p.lda + l] * p.a[(size_t)j * p.lda + l]
                                    : p.a[(size_t)l * p.lda + i] * p.a[(size_t)l * p.lda + j];
            }
            double& c = p.c[(size_t)j * p.ldc + i];
            c = p.beta == 0.0 ? p.alpha * sum : p.alpha * sum + p.beta * c;
        }
    }
}

struct SizeSum {
    int n;
    const double* x;
    int step;
    double* sum;
};

static void size_sum(void* argument) {
    const SizeSum& p = *(SizeSum*)argument;
    *p.sum = 0.0;
    for (int i = 0; i < p.n; i++) *p.sum += p.x[(size_t)i * p.step] < 0.0 ? -p.x[(size_t)i * p.step] : p.x[(size_t)i * p.step];
}

extern "C" {

Status cublasDsyrk_v2(
    Handle* handle, int uplo, int operation, int n, int k, const double* alpha, const double* a, int lda,
    const double* beta, double* c, int ldc
) {
    if (!handle->stream || uplo > 1 || n < 0 || k < 0 || lda < (operation ? k : n) || ldc < n) return INVALID_VALUE;
    RankUpdate update = {uplo == 0, operation != 0, n, k, *alpha, a, lda, *beta, c, ldc};
    return protect()("cublasDsyrk", rank_update, &update) == 0 ? OK : EXECUTION_FAILED;
}

Status cublasDasum_v2(Handle* handle, int n, const double* x, int step, double* result) {
    if (!handle->stream || n < 0 || step < 1) return INVALID_VALUE;
    SizeSum sum = {n, x, step, result};
    return protect()("cublasDasum", size_sum, &sum) == 0 ? OK : EXECUTION_FAILED;
}
}
