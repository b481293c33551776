// A stand-in for libcublas.so.12: what the program asks for, with plain sums. TF32 rounds as the hardware
// does, so that its being on or off can be seen.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <dlfcn.h>
#include <vector>

enum Status { OK = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };

struct Handle {
    void* stream;
    int mode;
    bool factors_on_gpu;
};

// Of elements: f32, bf16.
enum Type { F32 = 0, BF16 = 14 };

struct Matrix {
    char* data;
    int type, ld;
    long long stride;
    bool transposed;
};

struct Product {
    int m, n, k, count;
    // On the host, or on the GPU.
    float alpha, beta;
    const float *alpha_on_gpu, *beta_on_gpu;
    Matrix a, b, c;
    bool tf32;
};

static float tf32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x1000) & 0xffffe000u;
    memcpy(&x, &bits, 4);
    return x;
}

static float get(const Matrix& x, size_t i) {
    if (x.type == F32) return ((float*)x.data)[i];
    uint32_t bits = (uint32_t)((uint16_t*)x.data)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void put(const Matrix& x, size_t i, float value) {
    if (x.type == F32) {
        ((float*)x.data)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    if (finite) bits += 0x7fff + ((bits >> 16) & 1);
    ((uint16_t*)x.data)[i] = bits >> 16;
}

// The matrix by columns, not transposed any more: rows x cols.
static std::vector<float> plain(const Matrix& x, int rows, int cols, bool round) {
    std::vector<float> y((size_t)rows * cols);
    for (int j = 0; j < cols; j++) {
        for (int i = 0; i < rows; i++) {
            float value = get(x, x.transposed ? (size_t)i * x.ld + j : (size_t)j * x.ld + i);
            y[(size_t)j * rows + i] = round ? tf32(value) : value;
        }
    }
    return y;
}

static void multiply(const Product& p) {
    auto a = plain(p.a, p.m, p.k, p.tf32);
    auto b = plain(p.b, p.k, p.n, p.tf32);
    std::vector<float> sums(4 * (size_t)p.m);
    float alpha = p.alpha_on_gpu ? *p.alpha_on_gpu : p.alpha, beta = p.beta_on_gpu ? *p.beta_on_gpu : p.beta;
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
            size_t column = (size_t)(first + j) * p.c.ld;
            for (int i = 0; i < p.m; i++) {
                float sum = alpha * sums[(size_t)j * p.m + i];
                put(p.c, column + i, beta == 0.0f ? sum : sum + beta * get(p.c, column + i));
            }
        }
    }
}

static void run(void* argument) {
    Product p = *(Product*)argument;
    for (int i = 0; i < p.count; i++) {
        multiply(p);
        for (Matrix* x : {&p.a, &p.b, &p.c}) x->data += x->stride * (x->type == F32 ? 4 : 2);
    }
}

// driver.cpp's, which turns a touch of foreign memory into a failure of the GPU.
typedef int (*Protect)(const char*, void (*)(void*), void*);

static Protect protect() {
    void* driver = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
    return driver ? (Protect)dlsym(driver, "cuda_emulator_protect") : nullptr;
}

// driver.cpp's, too: does the work, or notes it.
typedef int (*Ask)(void*, const char*, void (*)(void*), void*, size_t);

static Ask ask() {
    void* driver = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
    return (Ask)dlsym(driver, "cuda_emulator_ask");
}

extern "C" {

Status cublasCreate_v2(Handle** handle) {
    if (!protect()) return NOT_INITIALIZED;
    *handle = new Handle{nullptr, 0, false};
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

// Memory of the GPU, after the stream.
Status cublasSetWorkspace_v2(Handle* handle, void* workspace, size_t bytes) {
    return handle->stream && workspace && bytes ? OK : INVALID_VALUE;
}

Status cublasSetMathMode(Handle* handle, int mode) {
    handle->mode = mode;
    return OK;
}

Status cublasSetPointerMode_v2(Handle* handle, int mode) {
    handle->factors_on_gpu = mode == 1;
    return OK;
}

// The product with its factors: copies of them, or where they are on the GPU.
static Product factors(
    Handle* handle, int m, int n, int k, int count, const float* alpha, const float* beta, Matrix a, Matrix b, Matrix c
) {
    Product p = {m, n, k, count, 0.0f, 0.0f, nullptr, nullptr, a, b, c, false};
    if (handle->factors_on_gpu) {
        p.alpha_on_gpu = alpha;
        p.beta_on_gpu = beta;
    } else {
        p.alpha = *alpha;
        p.beta = *beta;
    }
    return p;
}

// The kinds of elements and of sums that a product may have: those that the program asks for.
static Status check(Handle* handle, Product& p, int compute, int algorithm) {
    bool a_fits = p.a.ld >= (p.a.transposed ? p.k : p.m), b_fits = p.b.ld >= (p.b.transposed ? p.n : p.k);
    bool known = (p.a.type == F32 || p.a.type == BF16) && p.a.type == p.b.type && (p.c.type == F32 || p.c.type == p.a.type);
    if (!handle->stream || p.m <= 0 || p.n <= 0 || p.k <= 0 || p.count <= 0 || !a_fits || !b_fits || p.c.ld < p.m) {
        return INVALID_VALUE;
    }
    if (!known || compute != 68 || algorithm != -1) return NOT_SUPPORTED;
    p.tf32 = handle->mode == 3 && p.a.type == F32;
    return OK;
}

static Status product(Handle* handle, Product& p, int compute, int algorithm) {
    Status refused = check(handle, p, compute, algorithm);
    if (refused != OK) return refused;
    return ask()(handle->stream, "a product", run, &p, sizeof p) == 0 ? OK : EXECUTION_FAILED;
}

Status cublasGemmEx(
    Handle* handle, int ta, int tb, int m, int n, int k, const float* alpha, char* a, int at, int lda, char* b, int bt,
    int ldb, const float* beta, char* c, int ct, int ldc, int compute, int algorithm
) {
    Product p = factors(
        handle, m, n, k, 1, alpha, beta, {a, at, lda, 0, ta != 0}, {b, bt, ldb, 0, tb != 0}, {c, ct, ldc, 0, false}
    );
    return product(handle, p, compute, algorithm);
}

Status cublasGemmStridedBatchedEx(
    Handle* handle, int ta, int tb, int m, int n, int k, const float* alpha, char* a, int at, int lda, long long sa,
    char* b, int bt, int ldb, long long sb, const float* beta, char* c, int ct, int ldc, long long sc, int count,
    int compute, int algorithm
) {
    Product p = factors(
        handle, m, n, k, count, alpha, beta, {a, at, lda, sa, ta != 0}, {b, bt, ldb, sb, tb != 0}, {c, ct, ldc, sc, false}
    );
    return product(handle, p, compute, algorithm);
}

// The addresses lie on the GPU: they are read when the product is made.
struct Batch {
    Product each;
    char **a, **b, **c;
};

static void run_batch(void* argument) {
    Batch& batch = *(Batch*)argument;
    for (int i = 0; i < batch.each.count; i++) {
        Product p = batch.each;
        p.count = 1;
        p.a.data = batch.a[i];
        p.b.data = batch.b[i];
        p.c.data = batch.c[i];
        run(&p);
    }
}

Status cublasGemmBatchedEx(
    Handle* handle, int ta, int tb, int m, int n, int k, const float* alpha, char** a, int at, int lda, char** b, int bt,
    int ldb, const float* beta, char** c, int ct, int ldc, int count, int compute, int algorithm
) {
    Product p = factors(
        handle, m, n, k, count, alpha, beta, {nullptr, at, lda, 0, ta != 0}, {nullptr, bt, ldb, 0, tb != 0},
        {nullptr, ct, ldc, 0, false}
    );
    Status refused = check(handle, p, compute, algorithm);
    if (refused != OK) return refused;
    Batch batch = {p, a, b, c};
    return ask()(handle->stream, "a product", run_batch, &batch, sizeof batch) == 0 ? OK : EXECUTION_FAILED;
}

Status cublasSgemm_v2(
    Handle* handle, int ta, int tb, int m, int n, int k, const float* alpha, char* a, int lda, char* b, int ldb,
    const float* beta, char* c, int ldc
) {
    return cublasGemmEx(handle, ta, tb, m, n, k, alpha, a, F32, lda, b, F32, ldb, beta, c, F32, ldc, 68, -1);
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
