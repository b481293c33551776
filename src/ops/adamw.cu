// AdamW (arXiv:1711.05101) in one pass, in PyTorch's order of operations. The factors are those of adamw.rs; the gradient is
// multiplied with stats[2] (step_stats.cu). Nothing moves if that is NaN.

KERNEL adamw(
    float* p, const float* g, float* m, float* v, u64 n, const double* stats,
    float keep, float b1, float c1, float b2, float c2, float size, float root, float eps
) {
    float grad_scale = (float)stats[2];
    if (grad_scale != grad_scale) return;
    FOR_EACH(i, n) {
        float grad = g[i] * grad_scale;
        m[i] = b1 * m[i] + c1 * grad;
        v[i] = b2 * v[i] + c2 * (grad * grad);
        p[i] = p[i] * keep - size * m[i] / (sqrtf(v[i]) * root + eps);
    }
}
