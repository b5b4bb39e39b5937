/// Splits q|k|v, normalises q and k per head where weights are given, rotates them. One block a token, one warp
/// a head at a time.
extern "C" __global__ void rope(
    real_t* q,                // [tokens, heads * head_dim]
    real_t* k,                // [tokens, kv_heads * head_dim]
    real_t* v,                // [tokens, kv_heads * head_dim]
    const real_t* qkv,        // [tokens, (heads + 2 kv_heads) * head_dim]
    const u32* positions,     // [tokens]
    const float* inv_freq,    // [tables, head_dim / 2]
    const u32* tables,        // [tokens]: row of inv_freq; null where there is one
    const real_t* q_norm,     // [head_dim] or null
    const real_t* k_norm,     // [head_dim] or null
    int heads, int kv_heads, int head_dim, float eps) {
    int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, half_dim = head_dim / 2;
    size_t token = blockIdx.x;
    float position = (float)positions[token];
    if (tables) inv_freq += (size_t)tables[token] * half_dim;
    for (int head = warp; head < heads + 2 * kv_heads; head += warps) {
        const real_t* x = qkv + (token * (heads + 2 * kv_heads) + head) * head_dim;
        bool is_q = head < heads, is_v = head >= heads + kv_heads;
        real_t* y = is_q   ? q + (token * heads + head) * head_dim
                    : is_v ? v + (token * kv_heads + head - heads - kv_heads) * head_dim
                           : k + (token * kv_heads + head - heads) * head_dim;
        if (is_v) {
            for (int i = lane; i < head_dim; i += 32) y[i] = x[i];
            continue;
        }
        const real_t* norm = is_q ? q_norm : k_norm;
        float factor = 1.f;
        if (norm) {
            float sum = 0.f;
            for (int i = lane; i < head_dim; i += 32) sum += to_float(x[i]) * to_float(x[i]);
            factor = rsqrtf(warp_sum(sum) / head_dim + eps);
        }
        for (int i = lane; i < half_dim; i += 32) {
            float a = to_float(x[i]) * factor, b = to_float(x[i + half_dim]) * factor;
            if (norm) {
                a *= to_float(norm[i]);
                b *= to_float(norm[i + half_dim]);
            }
            float sine, cosine;
            sincosf(position * inv_freq[i], &sine, &cosine);
            y[i] = to_real(a * cosine - b * sine);
            y[i + half_dim] = to_real(b * cosine + a * sine);
        }
    }
}
