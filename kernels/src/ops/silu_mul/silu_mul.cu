__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.f + expf(-gate)) * up; }

/// y[t, i] = silu(x[t, i]) * x[t, i + n]; one block a token, a thread eight outputs at a time where n allows.
extern "C" __global__ void silu_mul(
    real_t* y,        // [tokens, n]
    const real_t* x,  // [tokens, 2 n]
    int n) {
    const real_t* row = x + (size_t)blockIdx.x * 2 * n;
    real_t* out = y + (size_t)blockIdx.x * n;
    int wide = n % 8 == 0 ? n : 0;
    for (int i = 8 * threadIdx.x; i < wide; i += 8 * blockDim.x) {
        float gate[8], up[8];
        load8(gate, row + i);
        load8(up, row + n + i);
#pragma unroll
        for (int j = 0; j < 8; j++) gate[j] = gated(gate[j], up[j]);
        store8(out + i, gate);
    }
    for (int i = wide + threadIdx.x; i < n; i += blockDim.x) out[i] = to_real(gated(to_float(row[i]), to_float(row[n + i])));
}
