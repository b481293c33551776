// The factor that clips a gradient, as tally.rs has it. tally: loss, sum of squares, factor, signals.

// One thread.
KERNEL clip(double* tally, double max_norm) {
    if (threadIdx.x > 0) return;
    double norm = sqrt(tally[1]);
    double finite = (tally[0] + norm) * 0.0; // NaN, if one of them is not
    tally[2] = finite + (max_norm > 0.0 ? fmin(1.0, max_norm / (norm + 1e-6)) : 1.0);
}

// One thread. The loss in three numbers that add up to it, and a signal.
KERNEL share_tally(const double* tally, float signal, float* share) {
    if (threadIdx.x > 0) return;
    double rest = tally[0];
    for (int i = 0; i < 3; i++) {
        share[i] = (float)rest;
        rest -= share[i];
    }
    share[3] = signal;
}

// One thread. The sums of `count` shares, in their order.
KERNEL join_tally(const float* shares, u64 count, double* tally) {
    if (threadIdx.x > 0) return;
    double loss = 0.0, signals = 0.0;
    for (u64 i = 0; i < count; i++) {
        const float* share = shares + 4 * i;
        loss += (double)share[0] + share[1] + share[2];
        signals += share[3];
    }
    tally[0] = loss;
    tally[3] = signals;
}
