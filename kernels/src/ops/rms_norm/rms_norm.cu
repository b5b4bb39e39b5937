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
    int wide = hidden % 8 == 0 ? hidden : 0;
    float sum = 0.f, values[8], weights[8];
    start_next_early();
    prefetch_words(order, hidden);
    prefetch_words(weight, hidden * (int)sizeof(real_t) / 4);
    await_previous();
    for (int i = 8 * threadIdx.x; i < wide; i += 8 * blockDim.x) {
        load8(values, row + i);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += values[j] * values[j];
    }
    for (int i = wide + threadIdx.x; i < hidden; i += blockDim.x) sum += to_float(row[i]) * to_float(row[i]);
    float factor = rsqrtf(block_sum(sum) / hidden + eps);
    for (int i = 8 * threadIdx.x; i < wide; i += 8 * blockDim.x) {
        load8(values, row + i);
        load8(weights, weight + i);
#pragma unroll
        for (int j = 0; j < 8; j++) values[j] *= factor * weights[j];
        store8(target + i, values);
    }
    for (int i = wide + threadIdx.x; i < hidden; i += blockDim.x)
        target[i] = to_real(to_float(row[i]) * factor * to_float(weight[i]));
    if (!order) return;
    __syncthreads();
    store_row(y, normed, order, blockIdx.x, hidden, panel_tokens);
}
