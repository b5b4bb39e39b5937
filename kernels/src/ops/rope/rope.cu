/// One value or two neighbours, which go together where they can.
__device__ __forceinline__ void read_values(float (&x)[1], const real_t* from) { x[0] = to_float(*from); }
__device__ __forceinline__ void write_values(real_t* to, const float (&x)[1]) { *to = to_real(x[0]); }
#if F32
__device__ __forceinline__ void read_values(float (&x)[2], const real_t* from) {
    float2 pair = *(const float2*)from;
    x[0] = pair.x, x[1] = pair.y;
}
__device__ __forceinline__ void write_values(real_t* to, const float (&x)[2]) { *(float2*)to = make_float2(x[0], x[1]); }
#else
__device__ __forceinline__ void read_values(float (&x)[2], const real_t* from) {
    u32 pair = *(const u32*)from;
    x[0] = to_float((real_t)pair), x[1] = to_float((real_t)(pair >> 16));
}
__device__ __forceinline__ void write_values(real_t* to, const float (&x)[2]) { *(u32*)to = pack2(x[0], x[1]); }
#endif

/// A head as it is, by one warp.
template <int N>
__device__ __forceinline__ void copy_head(real_t* y, const real_t* x, int head_dim) {
    for (int i = N * (threadIdx.x % 32); i < head_dim; i += 32 * N) {
        float values[N];
        read_values(values, x + i);
        write_values(y + i, values);
    }
}

/// A head turned, and normalised where `norm` is there, by one warp. turns: cosine and sine of each pair's angle
template <int N>
__device__ __forceinline__ void turn_head(real_t* y, const real_t* x, const float2* turns, const real_t* norm,
                                          int head_dim, float eps) {
    int lane = threadIdx.x % 32, half_dim = head_dim / 2;
    float factor = 1.f;
    if (norm) {
        float sum = 0.f;
        for (int i = lane; i < head_dim; i += 32) sum += to_float(x[i]) * to_float(x[i]);
        factor = rsqrtf(warp_sum(sum) / head_dim + eps);
    }
    for (int i = N * lane; i < half_dim; i += 32 * N) {
        float a[N], b[N];
        read_values(a, x + i);
        read_values(b, x + i + half_dim);
#pragma unroll
        for (int j = 0; j < N; j++) {
            a[j] *= factor, b[j] *= factor;
            if (norm) a[j] *= to_float(norm[i + j]), b[j] *= to_float(norm[i + j + half_dim]);
            float2 turn = turns[i + j];
            float turned = a[j] * turn.x - b[j] * turn.y;
            b[j] = b[j] * turn.x + a[j] * turn.y;
            a[j] = turned;
        }
        write_values(y + i, a);
        write_values(y + i + half_dim, b);
    }
}

/// Splits q|k|v, normalises q and k per head where weights are given, rotates them. One block a token, one warp
/// a head at a time.
extern "C" __global__ void rope(
    real_t* q,                // [tokens, heads * head_dim]
    real_t* k,                // [rows, kv_heads * head_dim]
    real_t* v,                // [rows, kv_heads * head_dim]
    const real_t* qkv,        // [tokens, (heads + 2 kv_heads) * head_dim]
    const u32* positions,     // [tokens]
    const u32* slots,         // [tokens]: row of k and v, as of a cache; null for the token's own
    const float* inv_freq,    // [tables, head_dim / 2]
    const u32* tables,        // [tokens]: row of inv_freq; null where there is one
    const real_t* q_norm,     // [head_dim] or null
    const real_t* k_norm,     // [head_dim] or null
    int heads, int kv_heads, int head_dim, float eps) {
    extern __shared__ float2 turns[];  // [head_dim / 2]
    int warps = blockDim.x / 32, warp = threadIdx.x / 32, half_dim = head_dim / 2;
    size_t token = blockIdx.x, row = slots ? slots[token] : token;
    float position = (float)positions[token];
    if (tables) inv_freq += (size_t)tables[token] * half_dim;
    for (int i = threadIdx.x; i < half_dim; i += blockDim.x) sincosf(position * inv_freq[i], &turns[i].y, &turns[i].x);
    __syncthreads();
    bool pairs = half_dim % 2 == 0;
    for (int head = warp; head < heads + 2 * kv_heads; head += warps) {
        const real_t* x = qkv + (token * (heads + 2 * kv_heads) + head) * head_dim;
        bool is_q = head < heads, is_v = head >= heads + kv_heads;
        real_t* y = is_q   ? q + (token * heads + head) * head_dim
                    : is_v ? v + (row * kv_heads + head - heads - kv_heads) * head_dim
                           : k + (row * kv_heads + head - heads) * head_dim;
        const real_t* norm = is_q ? q_norm : k_norm;
        if (is_v && pairs) copy_head<2>(y, x, head_dim);
        else if (is_v) copy_head<1>(y, x, head_dim);
        else if (pairs) turn_head<2>(y, x, turns, norm, head_dim, eps);
        else turn_head<1>(y, x, turns, norm, head_dim, eps);
    }
}
