// A stand-in for libcusolver.so.11: eigenvalues of symmetric matrices, by reduction to tridiagonal form (Householder) and
// implicit QL steps, in f64.

#include <cmath>
#include <cstring>
#include <dlfcn.h>
#include <algorithm>
#include <vector>

enum Status { OK = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 3, EXECUTION_FAILED = 6 };

struct Handle {
    void* stream;
};

struct Problem {
    bool lower;
    int n;
    double* a;
    int lda;
    double *values, *work;
    int* info;
};

// The tridiagonal form of the symmetric a (n x n, whole): its diagonal d and, from e[1] on, what is beside it.
static void reduce(std::vector<double>& a, int n, double* d, double* e) {
    std::vector<double> v(n), p(n);
    for (int k = 0; k + 2 < n; k++) {
        double* column = &a[(size_t)k * n];
        double norm = 0.0;
        for (int i = k + 1; i < n; i++) norm = std::hypot(norm, column[i]);
        if (norm == 0.0) {
            e[k + 1] = 0.0;
            continue;
        }
        double alpha = column[k + 1] > 0.0 ? -norm : norm;
        // H = I - 2 v vᵀ / vᵀv, v = x - alpha e1; both sides of the rest: A - v wᵀ - w vᵀ.
        double square = 0.0;
        for (int i = k + 1; i < n; i++) {
            v[i] = column[i] / norm - (i == k + 1 ? alpha / norm : 0.0);
            square += v[i] * v[i];
        }
        std::fill(p.begin(), p.end(), 0.0);
        for (int j = k + 1; j < n; j++) {
            const double* from = &a[(size_t)j * n];
            for (int i = k + 1; i < n; i++) p[i] += from[i] * v[j];
        }
        double inner = 0.0;
        for (int i = k + 1; i < n; i++) {
            p[i] *= 2.0 / square;
            inner += p[i] * v[i];
        }
        for (int i = k + 1; i < n; i++) p[i] -= inner / square * v[i];
        for (int j = k + 1; j < n; j++) {
            double* to = &a[(size_t)j * n];
            for (int i = k + 1; i < n; i++) to[i] -= v[i] * p[j] + p[i] * v[j];
        }
        e[k + 1] = alpha;
    }
    if (n > 1) e[n - 1] = a[(size_t)(n - 2) * n + n - 1];
    for (int i = 0; i < n; i++) d[i] = a[(size_t)i * n + i];
}

// Eigenvalues of the tridiagonal matrix into d. False if they do not settle.
static bool diagonalise(int n, double* d, std::vector<double> e) {
    for (int i = 1; i < n; i++) e[i - 1] = e[i];
    e[n - 1] = 0.0;
    double norm = 0.0;
    for (int i = 0; i < n; i++) norm = std::max(norm, std::fabs(d[i]) + std::fabs(e[i]));
    for (int l = 0; l < n; l++) {
        for (int turn = 0;; turn++) {
            int m = l;
            while (m + 1 < n && std::fabs(e[m]) > 1e-16 * norm) m++;
            if (m == l) break;
            if (turn == 60) return false;
            double g = (d[l + 1] - d[l]) / (2.0 * e[l]), r = std::hypot(g, 1.0);
            g = d[m] - d[l] + e[l] / (g + std::copysign(r, g));
            double s = 1.0, c = 1.0, p = 0.0;
            int i = m - 1;
            for (; i >= l; i--) {
                double f = s * e[i], b = c * e[i];
                e[i + 1] = r = std::hypot(f, g);
                if (r == 0.0) {
                    d[i + 1] -= p;
                    e[m] = 0.0;
                    break;
                }
                s = f / r;
                c = g / r;
                g = d[i + 1] - p;
                r = (d[i] - g) * s + 2.0 * c * b;
                d[i + 1] = g + (p = s * r);
                g = c * r - b;
            }
            if (r == 0.0 && i >= l) continue;
            d[l] -= p;
            e[l] = g;
            e[m] = 0.0;
        }
    }
    return true;
}

static void run(void* argument) {
    const Problem& problem = *(Problem*)argument;
    int n = problem.n;
    // Only one triangle is read; the other may hold anything.
    std::vector<double> a((size_t)n * n), e(n);
    for (int j = 0; j < n; j++) {
        for (int i = j; i < n; i++) {
            double entry = problem.lower ? problem.a[(size_t)j * problem.lda + i] : problem.a[(size_t)i * problem.lda + j];
            a[(size_t)j * n + i] = a[(size_t)i * n + j] = entry;
        }
    }
    // As much of the workspace as was asked for is used, and the matrix is lost.
    for (int i = 0; i < 3 * n; i++) problem.work[i] = NAN;
    for (int j = 0; j < n; j++) memset(problem.a + (size_t)j * problem.lda, 0xff, sizeof(double) * n);
    reduce(a, n, problem.values, e.data());
    *problem.info = diagonalise(n, problem.values, e) ? 0 : 1;
    std::sort(problem.values, problem.values + n);
}

// driver.cpp's, which turns a touch of foreign memory into a failure of the GPU.
typedef int (*Protect)(const char*, void (*)(void*), void*);

static Protect protect() {
    void* driver = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
    return driver ? (Protect)dlsym(driver, "cuda_emulator_protect") : nullptr;
}

extern "C" {

Status cusolverDnCreate(Handle** handle) {
    if (!protect()) return NOT_INITIALIZED;
    *handle = new Handle{nullptr};
    return OK;
}

Status cusolverDnDestroy(Handle* handle) {
    delete handle;
    return OK;
}

Status cusolverDnSetStream(Handle* handle, void* stream) {
    handle->stream = stream;
    return OK;
}

Status cusolverDnDsyevd_bufferSize(
    Handle* handle, int vectors, int uplo, int n, const double*, int lda, const double*, int* size
) {
    if (!handle->stream || vectors || uplo > 1 || n < 0 || lda < n) return INVALID_VALUE;
    *size = 3 * n;
    return OK;
}

Status cusolverDnDsyevd(
    Handle* handle, int vectors, int uplo, int n, double* a, int lda, double* values, double* work, int size, int* info
) {
    if (!handle->stream || vectors || uplo > 1 || n < 1 || lda < n || size < 3 * n) return INVALID_VALUE;
    Problem problem = {uplo == 0, n, a, lda, values, work, info};
    return protect()("cusolverDnDsyevd", run, &problem) == 0 ? OK : EXECUTION_FAILED;
}
}
