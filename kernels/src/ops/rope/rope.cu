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

/// How heads are turned.
struct Turning {
    const float2* turns;  // [head_dim / 2]: cosine and sine of each pair's angle; 1 and 0 from turned / 2 on
    int head_dim, turned, neighbours;

    /// Whether pairs are i and i + head_dim / 2, and two of them lie side by side.
    __device__ __forceinline__ bool plain() const {
        return turned == head_dim && !neighbours && head_dim % 4 == 0;
    }

    /// The features of pair i: what is not turned is in pairs of neighbours.
    __device__ __forceinline__ int2 pair(int i) const {
        bool apart = !neighbours && i < turned / 2;
        return apart ? make_int2(i, i + turned / 2) : make_int2(2 * i, 2 * i + 1);
    }
};

/// A head turned, and normalised where `norm` is there, by one warp. factor: of the norm, where all heads share it
template <int N>
__device__ __forceinline__ void turn_head(real_t* y, const real_t* x, Turning turning, const real_t* norm, bool whole,
                                          float factor, float growth, float eps) {
    int lane = threadIdx.x % 32, head_dim = turning.head_dim, half_dim = head_dim / 2;
    if (norm && !whole) {
        float sum = 0.f;
        for (int i = lane; i < head_dim; i += 32) sum += to_float(x[i]) * to_float(x[i]);
        factor = rsqrtf(warp_sum(sum) / head_dim + eps);
    }
    for (int i = N * lane; i < half_dim; i += 32 * N) {
        int2 at = N > 1 ? make_int2(i, i + half_dim) : turning.pair(i);
        float a[N], b[N];
        read_values(a, x + at.x);
        read_values(b, x + at.y);
#pragma unroll
        for (int j = 0; j < N; j++) {
            a[j] *= factor, b[j] *= factor;
            if (norm) a[j] *= to_float(norm[at.x + j]), b[j] *= to_float(norm[at.y + j]);
            float2 turn = turning.turns[i + j];
            float turned = a[j] * turn.x - b[j] * turn.y;
            b[j] = (b[j] * turn.x + a[j] * turn.y) * growth;
            a[j] = turned * growth;
        }
        write_values(y + at.x, a);
        write_values(y + at.y, b);
    }
}

/// What a norm of a token's heads together multiplies with; all threads of the block take part.
__device__ __forceinline__ float norm_factor(const real_t* x, int width, float eps) {
    float sum = 0.f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += to_float(x[i]) * to_float(x[i]);
    return rsqrtf(block_sum(sum) / width + eps);
}

/// By how much queries grow: 1 + beta ln(1 + position / original).
__device__ __forceinline__ float query_growth(u32 position, float beta, u32 original) {
    return beta != 0.f ? 1.f + beta * logf(1.f + (float)(position / original)) : 1.f;
}

/// Cosine and sine of each pair's angle at a position, by all threads of the block.
__device__ __forceinline__ void find_turns(float2* turns, const float* inv_freq, u32 position, int half_dim, int turned,
                                           float stretch) {
    for (int i = threadIdx.x; i < half_dim; i += blockDim.x) {
        float2 turn = make_float2(1.f, 0.f);
        if (i < turned / 2) {
            sincosf((float)position * inv_freq[i], &turn.y, &turn.x);
            turn.x *= stretch, turn.y *= stretch;
        }
        turns[i] = turn;
    }
}

/// Splits q|k|v, normalises q and k where weights are given, rotates them. One block a token, one warp a head at a time.
extern "C" __global__ void rope(
    real_t* q,                // [tokens, heads * head_dim]
    real_t* k,                // [rows, kv_heads * head_dim]
    real_t* v,                // [rows, kv_heads * head_dim]
    const real_t* qkv,        // [tokens, (heads + 2 kv_heads) * head_dim]
    const u32* positions,     // [tokens]
    const u32* slots,         // [tokens]: row of k and v, as of a cache; null for the token's own
    const float* inv_freq,    // [tables, head_dim / 2]
    const u32* tables,        // [tokens]: row of inv_freq; null where there is one
    const real_t* q_norm,     // [head_dim], or [heads * head_dim] where that norm is of all heads together, or null
    const real_t* k_norm,     // [head_dim], [kv_heads * head_dim] or null
    int heads, int kv_heads, int head_dim, float eps,
    int q_whole, int k_whole, int turned, int neighbours, float stretch, float beta, u32 original) {
    extern __shared__ float2 turns[];  // [head_dim / 2]
    int warps = blockDim.x / 32, warp = threadIdx.x / 32, half_dim = head_dim / 2;
    size_t token = blockIdx.x, row = slots ? slots[token] : token;
    u32 place = positions[token];
    if (tables) inv_freq += (size_t)tables[token] * half_dim;
    find_turns(turns, inv_freq, place, half_dim, turned, stretch);
    qkv += token * (heads + 2 * kv_heads) * head_dim;
    float q_factor = q_whole ? norm_factor(qkv, heads * head_dim, eps) : 1.f;
    float k_factor = k_whole ? norm_factor(qkv + heads * head_dim, kv_heads * head_dim, eps) : 1.f;
    float growth = query_growth(place, beta, original);
    __syncthreads();
    Turning turning{turns, head_dim, turned, neighbours};
    for (int head = warp; head < heads + 2 * kv_heads; head += warps) {
        const real_t* x = qkv + head * head_dim;
        bool is_q = head < heads, is_v = head >= heads + kv_heads, whole = is_q ? q_whole : k_whole;
        real_t* y = is_q   ? q + (token * heads + head) * head_dim
                    : is_v ? v + (row * kv_heads + head - heads - kv_heads) * head_dim
                           : k + (row * kv_heads + head - heads) * head_dim;
        const real_t* norm = is_q ? q_norm : k_norm;
        if (norm && whole) norm += (is_q ? head : head - heads) * head_dim;
        float factor = is_q ? q_factor : k_factor, grown = is_q ? growth : 1.f;
        if (is_v && head_dim % 4 == 0) copy_head<2>(y, x, head_dim);
        else if (is_v) copy_head<1>(y, x, head_dim);
        else if (turning.plain()) turn_head<2>(y, x, turning, norm, whole, factor, grown, eps);
        else turn_head<1>(y, x, turning, norm, whole, factor, grown, eps);
    }
}

/// Pairs of eight features that a lane has on their way at once.
#define ROPE_AHEAD (F32 ? 1 : 3)

struct __align__(16) Eight {
    real_t values[8];
};

/// The same where heads are turned whole, in halves, and each has a norm of its own: a lane takes eight features of both
/// halves, so that head_dim / 16 neighbouring lanes share a head. One block a token.
extern "C" __global__ void __launch_bounds__(256, 4) rope_halves(
    real_t* q, real_t* k, real_t* v, const real_t* qkv, const u32* positions, const u32* slots, const float* inv_freq,
    const u32* tables, const real_t* q_norm, const real_t* k_norm, int heads, int kv_heads, int head_dim, float eps,
    float stretch, float beta, u32 original) {
    extern __shared__ float2 turns[];  // [head_dim / 2]
    int half_dim = head_dim / 2, lanes = head_dim / 16, part = threadIdx.x % lanes * 8;
    int units = (heads + 2 * kv_heads) * lanes;
    size_t token = blockIdx.x, row = slots ? slots[token] : token;
    u32 place = positions[token];
    if (tables) inv_freq += (size_t)tables[token] * half_dim;
    qkv += token * (heads + 2 * kv_heads) * head_dim + part;
    Eight x[ROPE_AHEAD][2] = {};
    auto read = [&](int first) {
#pragma unroll
        for (int i = 0; i < ROPE_AHEAD; i++) {
            int unit = first + i * blockDim.x;
            if (unit >= units) continue;
            x[i][0] = *(const Eight*)(qkv + unit / lanes * head_dim);
            x[i][1] = *(const Eight*)(qkv + unit / lanes * head_dim + half_dim);
        }
    };
    read(threadIdx.x);
    find_turns(turns, inv_freq, place, half_dim, head_dim, stretch);
    float growth = query_growth(place, beta, original);
    __syncthreads();
    // All lanes of a warp go through all of it, since those of a head add up.
    for (int first = threadIdx.x; first - threadIdx.x % 32 < units; first += ROPE_AHEAD * blockDim.x) {
#pragma unroll
        for (int i = 0; i < ROPE_AHEAD; i++) {
            int unit = first + i * blockDim.x, head = unit / lanes;
            bool is_q = head < heads, is_v = head >= heads + kv_heads;
            const real_t* norm = is_v ? 0 : is_q ? q_norm : k_norm;
            float a[8], b[8];
            load8(a, x[i][0].values);
            load8(b, x[i][1].values);
            if (q_norm || k_norm) {
                float sum = 0.f;
#pragma unroll
                for (int j = 0; j < 8; j++) sum += a[j] * a[j] + b[j] * b[j];
                for (int offset = lanes / 2; offset > 0; offset >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, offset);
                if (norm) {
                    float weights[2][8], factor = rsqrtf(sum / head_dim + eps);
                    load8(weights[0], norm + part);
                    load8(weights[1], norm + part + half_dim);
#pragma unroll
                    for (int j = 0; j < 8; j++) a[j] *= factor * weights[0][j], b[j] *= factor * weights[1][j];
                }
            }
            if (unit >= units) continue;
            if (!is_v)
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float2 turn = turns[part + j];
                    float turned = a[j] * turn.x - b[j] * turn.y;
                    b[j] = b[j] * turn.x + a[j] * turn.y;
                    a[j] = turned;
                    if (is_q) a[j] *= growth, b[j] *= growth;
                }
            real_t* y = is_q   ? q + (token * heads + head) * head_dim
                        : is_v ? v + (row * kv_heads + head - heads - kv_heads) * head_dim
                               : k + (row * kv_heads + head - heads) * head_dim;
            store8(y + part, a);
            store8(y + part + half_dim, b);
        }
        read(first + ROPE_AHEAD * blockDim.x);
    }
}
