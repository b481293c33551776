// The factor that clips a gradient, as step_stats.rs has it. stats: loss, sum of squares, factor, signals.

// One thread.
KERNEL clip(double* stats, double max_norm) {
    if (threadIdx.x > 0) return;
    double norm = sqrt(stats[1]);
    double finite = (stats[0] + norm) * 0.0; // NaN, if one of them is not
    stats[2] = finite + (max_norm > 0.0 ? fmin(1.0, max_norm / (norm + 1e-6)) : 1.0);
}

// One thread. The loss in three numbers that add up to it, and a signal.
KERNEL pack_step_stats(const double* stats, float signal, float* share) {
    if (threadIdx.x > 0) return;
    double rest = stats[0];
    for (int i = 0; i < 3; i++) {
        share[i] = (float)rest;
        rest -= share[i];
    }
    share[3] = signal;
}

// One thread. The sums of `count` shares, in their order.
KERNEL reduce_step_stats(const float* shares, u64 count, double* stats) {
    if (threadIdx.x > 0) return;
    double loss = 0.0, signals = 0.0;
    for (u64 i = 0; i < count; i++) {
        const float* share = shares + 4 * i;
        loss += (double)share[0] + share[1] + share[2];
        signals += share[3];
    }
    stats[0] = loss;
    stats[3] = signals;
}
