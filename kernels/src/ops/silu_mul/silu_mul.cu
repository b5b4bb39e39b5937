__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.f + expf(-gate)) * up; }

/// y[t, i] = silu(gate_j) * up_j with j = order[i], or i where no order is given. Gates and what they gate lie in runs of
/// `run` after each other: n of them, or 8 as a gated product leaves them. One block a token, a thread eight at a
/// time where the run allows.
extern "C" __global__ void silu_mul(
    real_t* y,         // [tokens, n]
    const real_t* x,   // [tokens, 2 n]
    const u32* order,  // [n] or null: feature at each place
    int n, int run) {
    // [n] where an order is given: scattered stores to memory would cost as much as a product.
    extern __shared__ real_t products[];
    const real_t* row = x + (size_t)blockIdx.x * 2 * n;
    real_t* out = y + (size_t)blockIdx.x * n;
    real_t* target = order ? products : out;
    int wide = run % 8 == 0 ? n : 0;
    for (int i = 8 * threadIdx.x; i < wide; i += 8 * blockDim.x) {
        const real_t* from = row + i / run * 2 * run + i % run;
        float gate[8], up[8];
        load8(gate, from);
        load8(up, from + run);
#pragma unroll
        for (int j = 0; j < 8; j++) gate[j] = gated(gate[j], up[j]);
        store8(target + i, gate);
    }
    for (int i = wide + threadIdx.x; i < n; i += blockDim.x) {
        const real_t* from = row + i / run * 2 * run + i % run;
        target[i] = to_real(gated(to_float(from[0]), to_float(from[run])));
    }
    if (!order) return;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = products[order[i]];
}
