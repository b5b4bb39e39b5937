/// y[t, i] = silu(x[t, i]) * x[t, i + n]; one thread an output.
extern "C" __global__ void silu_mul(
    half_t* y,        // [tokens, n]
    const half_t* x,  // [tokens, 2 n]
    int n, size_t count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const half_t* row = x + i / n * 2 * n + i % n;
    float gate = to_float(row[0]), up = to_float(row[n]);
    y[i] = to_half(gate / (1.f + expf(-gate)) * up);
}
