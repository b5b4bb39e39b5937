/// y[t, i] = x[t, i] * weight[i] / sqrt(mean_j x[t, j]^2 + eps); one block a token.
extern "C" __global__ void rms_norm(
    half_t* y,             // [tokens, hidden]
    const half_t* x,       // [tokens, hidden]
    const half_t* weight,  // [hidden]
    int hidden, float eps) {
    const half_t* row = x + (size_t)blockIdx.x * hidden;
    float sum = 0.f;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) {
        float value = to_float(row[i]);
        sum += value * value;
    }
    float factor = rsqrtf(block_sum(sum) / hidden + eps);
    for (int i = threadIdx.x; i < hidden; i += blockDim.x)
        y[(size_t)blockIdx.x * hidden + i] = to_half(to_float(row[i]) * factor * to_float(weight[i]));
}
