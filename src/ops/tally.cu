// The factor that clips a gradient, as tally.rs has it. tally: loss, sum of squares, factor.

// One thread.
KERNEL clip(double* tally, double max_norm) {
    if (threadIdx.x > 0) return;
    double norm = sqrt(tally[1]);
    double finite = (tally[0] + norm) * 0.0; // NaN, if one of them is not
    tally[2] = finite + (max_norm > 0.0 ? fmin(1.0, max_norm / (norm + 1e-6)) : 1.0);
}
