/// A thread's part of a row: eight features, weighted and stored.
__device__ __forceinline__ void store_normed(real_t* y, const float (&values)[8], const float (&weights)[8], float factor) {
    float normed[8];
#pragma unroll
    for (int j = 0; j < 8; j++) normed[j] = values[j] * (factor * weights[j]);
    store8(y, normed);
}

/// y[t, i] = x[t, i] * weight[i] / sqrt(mean_j x[t, j]^2 + eps), stored in another order of features where one is
/// given; one block a token, a thread eight features at a time where the width allows.
extern "C" __global__ void rms_norm(
    real_t* y,             // [tokens, hidden]
    const real_t* x,       // [tokens, hidden]
    const real_t* weight,  // [hidden]
    const u32* order,      // [hidden] or null: feature at each place
    int hidden, float eps, int panel_tokens) {
    // [hidden] where an order is given
    extern __shared__ real_t normed[];
    const real_t* row = x + (size_t)blockIdx.x * hidden;
    real_t* out = y + (size_t)blockIdx.x * hidden;
    real_t* target = order ? normed : out;
    int wide = hidden % 8 == 0 ? hidden : 0, first = 8 * threadIdx.x, next = first + 8 * blockDim.x;
    bool here = first < wide;
    float sum = 0.f, values[8] = {}, weights[8] = {}, more[8], more_weights[8];
    start_next_early();
    // What does not depend on x is read before x is there.
    if (here) load8(weights, weight + first);
#if !F32
    Places places;
    if (order && here) places.read(order + first);
#endif
    await_previous();
    if (here) load8(values, row + first);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += values[j] * values[j];
    for (int i = next; i < wide; i += 8 * blockDim.x) {
        load8(more, row + i);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += more[j] * more[j];
    }
    for (int i = wide + threadIdx.x; i < hidden; i += blockDim.x) sum += to_float(row[i]) * to_float(row[i]);
    float factor = rsqrtf(block_sum(sum) / hidden + eps);
    if (here) store_normed(target + first, values, weights, factor);
    for (int i = next; i < wide; i += 8 * blockDim.x) {
        load8(more, row + i);
        load8(more_weights, weight + i);
        store_normed(target + i, more, more_weights, factor);
    }
    for (int i = wide + threadIdx.x; i < hidden; i += blockDim.x)
        target[i] = to_real(to_float(row[i]) * factor * to_float(weight[i]));
    if (!order) return;
    __syncthreads();
    int from = 0;
#if !F32
    if (here) places.store(y, normed, blockIdx.x, first, hidden, panel_tokens);
    if (wide) from = 8 * blockDim.x;
#endif
    store_row(y, normed, order, blockIdx.x, from, hidden, panel_tokens);
}
