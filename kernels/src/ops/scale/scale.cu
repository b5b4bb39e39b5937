/// x softly held below a cap: cap tanh(x / cap).
__device__ __forceinline__ float soft_cap(float x, float cap) { return cap * tanhf(x / cap); }

/// y = a + factor b, or factor b where there is no a; one thread eight elements, one by one where they do not lie on 16
/// bytes.
extern "C" __global__ void add_scaled(real_t* y, const real_t* a, const real_t* b, float factor, size_t count) {
    size_t i = 8 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    bool aligned = ((size_t)y | (size_t)a | (size_t)b) % 16 == 0;
    start_next_early();
    await_previous();
    if (aligned && i + 8 <= count) {
        float x[8] = {}, z[8];
        if (a) load8(x, a + i);
        load8(z, b + i);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] += factor * z[j];
        store8(y + i, x);
    } else {
        for (size_t end = min(i + 8, count); i < end; i++)
            y[i] = to_real((a ? to_float(a[i]) : 0.f) + factor * to_float(b[i]));
    }
}

/// y = factor x, held below a cap where that is not 0; one thread an element.
extern "C" __global__ void cap_scores(float* y, const float* x, float factor, float cap, size_t count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    start_next_early();
    await_previous();
    if (i >= count) return;
    float score = factor * x[i];
    y[i] = cap != 0.f ? soft_cap(score, cap) : score;
}
