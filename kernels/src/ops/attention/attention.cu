// Attention without a score matrix (Dao 2023, FlashAttention-2): a block takes 128 query rows of one head, a
// warp 16 of them; keys and values come in tiles of 64, one tile ahead of the tensor cores. Of wide heads both are half
// as many.

/// Halves that keep the rows of a tile in different banks.
#define PAD 8
/// Query rows of a block of the plain kernel, and features that a lane holds, 32 apart.
#define PLAIN_WARPS 8
#define PLAIN_SLOTS 8

struct Batch {
    const u32* first_row;   // [sequences]: row of the sequence's first query
    const u32* rows;        // [sequences]: queries
    const u32* context;     // [sequences]: tokens in the cache before them
    const u32* table;       // all sequences' blocks, or null without a cache
    const u32* table_start; // [sequences]
};

/// Row of token `position`'s key: in its cache block, or in the batch itself.
__device__ __forceinline__ size_t key_row(const Batch& batch, int sequence, int position) {
    if (!batch.table) return batch.first_row[sequence] + position;
    return (size_t)batch.table[batch.table_start[sequence] + position / KV_BLOCK_ROWS] * KV_BLOCK_ROWS +
           position % KV_BLOCK_ROWS;
}

#if !F32
/// What a block takes of heads of D features.
template <int D>
struct Tile {
    static constexpr bool WIDE = D > 128;
    /// Query rows, warps with 16 of them each, and keys of a tile.
    static constexpr int Q = WIDE ? 64 : 128, WARPS = Q / 16, KV = WIDE ? 32 : 64;
};

/// Scores softly held below a cap, before the scale: cap tanh(scale x / cap) / scale.
struct SoftCap {
    float inner, outer;

    __device__ __forceinline__ SoftCap(float cap, float scale) : inner(2.88539008f * scale / cap), outer(cap / scale) {}

    /// tanh(z) = 1 - 2 / (1 + exp(2 z))
    __device__ __forceinline__ float of(float x) const {
        return outer - __fdividef(2.f * outer, 1.f + exp2_fast(inner * x));
    }
};

template <int D>
__device__ __forceinline__ void load_tile(real_t* tile, const real_t* source, const Batch& batch, int sequence,
                                          int first, int length, int kv_heads, int kv_head) {
    for (int i = threadIdx.x; i < Tile<D>::KV * (D / 8); i += 32 * Tile<D>::WARPS) {
        int r = i / (D / 8), c = i % (D / 8) * 8, position = first + r;
        bool valid = position < length;
        size_t row = valid ? key_row(batch, sequence, position) : 0;
        copy_async(shared_address(tile + r * (D + PAD) + c), source + (row * kv_heads + kv_head) * D + c, valid);
    }
}

template <int D>
__device__ void attend(real_t* y, const real_t* q, const real_t* k, const real_t* v, Batch batch, int heads,
                       int kv_heads, int window, float scale, float cap) {
    constexpr bool WIDE = Tile<D>::WIDE;
    constexpr int TILE_Q = Tile<D>::Q, TILE_KV = Tile<D>::KV, ATTENTION_WARPS = Tile<D>::WARPS;
    // Keys and values of two tiles in turns. The queries lie where the second tile will be: more memory than this most
    // GPUs do not give to a block. Those of wide heads, which do not fit into registers, stay where they are.
    static_assert(TILE_Q == 2 * TILE_KV, "");
    extern __shared__ real_t tiles[];
    real_t* q_tile = tiles;
    auto tile_of = [&](int stage) {
        if (WIDE) return tiles + (TILE_Q + stage * 2 * TILE_KV) * (D + PAD);
        return tiles + (stage ? 0 : TILE_Q * (D + PAD));
    };
    int sequence = blockIdx.z, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int rows = batch.rows[sequence], context = batch.context[sequence];
    // Later tiles have more keys to see: they start first.
    int tile = (rows + TILE_Q - 1) / TILE_Q - 1 - (int)blockIdx.x;
    if (tile < 0) return;
    int start = tile * TILE_Q, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const real_t* q_rows = q + ((size_t)(batch.first_row[sequence] + start) * heads + head) * D;
    for (int i = threadIdx.x; i < TILE_Q * (D / 8); i += 32 * ATTENTION_WARPS) {
        int r = i / (D / 8), c = i % (D / 8) * 8;
        bool valid = start + r < rows;
        copy_async(shared_address(q_tile + r * (D + PAD) + c), q_rows + (valid ? (size_t)r * heads * D + c : 0), valid);
    }
    int length = min(context + rows, context + start + TILE_Q);
    int first_seen = window > 0 ? max(0, context + start + 1 - window) : 0;
    int kv_first = first_seen / TILE_KV, kv_last = (length - 1) / TILE_KV;
    auto load = [&](int kv) {
        real_t* target = tile_of((kv - kv_first) % 2);
        load_tile<D>(target, k, batch, sequence, kv * TILE_KV, length, kv_heads, kv_head);
        load_tile<D>(target + TILE_KV * (D + PAD), v, batch, sequence, kv * TILE_KV, length, kv_heads, kv_head);
        copy_commit();
    };
    load(kv_first);
    copy_wait<0>();
    __syncthreads();

    u32 q_fragments[WIDE ? 1 : D / 16][4];
    u32 q_address = shared_address(q_tile + (warp * 16 + lane % 16) * (D + PAD) + lane / 16 * 8);
    if (!WIDE)
#pragma unroll
        for (int s = 0; s < D / 16; s++) load_matrices(q_fragments[WIDE ? 0 : s], q_address + s * 32);
    __syncthreads();

    float out[D / 8][4];
#pragma unroll
    for (int n = 0; n < D / 8; n++)
        for (int i = 0; i < 4; i++) out[n][i] = 0.f;
    float largest[2] = {-INFINITY_F, -INFINITY_F}, total[2] = {0.f, 0.f};
    int position[2];
    position[0] = context + start + warp * 16 + lane / 4;
    position[1] = position[0] + 8;
    float log2_scale = scale * 1.44269504f;

    for (int kv = kv_first; kv <= kv_last; kv++) {
        real_t *k_tile = tile_of((kv - kv_first) % 2), *v_tile = k_tile + TILE_KV * (D + PAD);
        if (kv < kv_last) load(kv + 1);

        float scores[TILE_KV / 8][4];
#pragma unroll
        for (int n = 0; n < TILE_KV / 8; n++)
            for (int i = 0; i < 4; i++) scores[n][i] = 0.f;
        u32 k_address = shared_address(k_tile + (lane / 16 * 8 + lane % 8) * (D + PAD) + lane / 8 % 2 * 8);
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
            u32(&queries)[4] = q_fragments[WIDE ? 0 : s];
            if (WIDE) load_matrices(queries, q_address + s * 32);
#pragma unroll
            for (int n = 0; n < TILE_KV / 16; n++) {
                u32 keys[4];
                load_matrices(keys, k_address + (n * 16 * (D + PAD) + s * 16) * 2);
                mma(scores[2 * n], queries, keys[0], keys[1]);
                mma(scores[2 * n + 1], queries, keys[2], keys[3]);
            }
        }
        if (cap != 0.f) {
            SoftCap softly(cap, scale);
#pragma unroll
            for (int n = 0; n < TILE_KV / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) scores[n][i] = softly.of(scores[n][i]);
        }

        int tile_first = kv * TILE_KV;
        bool inside = tile_first + TILE_KV - 1 <= context + start + warp * 16 &&
                      (window <= 0 || tile_first > context + start + warp * 16 + 15 - window);
        if (!inside) {
#pragma unroll
            for (int n = 0; n < TILE_KV / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int key = tile_first + n * 8 + lane % 4 * 2 + i % 2, own = position[i / 2];
                    if (key > own || (window > 0 && key <= own - window)) scores[n][i] = -INFINITY_F;
                }
        }

#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = largest[h];
#pragma unroll
            for (int n = 0; n < TILE_KV / 8; n++) top = fmaxf(top, fmaxf(scores[n][2 * h], scores[n][2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            float shift = top == -INFINITY_F ? 0.f : top * log2_scale;
            float keep = exp2_fast(largest[h] * log2_scale - shift);
            largest[h] = top;
            total[h] *= keep;
#pragma unroll
            for (int n = 0; n < TILE_KV / 8; n++)
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; i++) {
                    scores[n][i] = exp2_fast(scores[n][i] * log2_scale - shift);
                    total[h] += scores[n][i];
                }
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                out[n][2 * h] *= keep;
                out[n][2 * h + 1] *= keep;
            }
        }

        u32 v_address = shared_address(v_tile + (lane / 8 % 2 * 8 + lane % 8) * (D + PAD) + lane / 16 * 8);
#pragma unroll
        for (int s = 0; s < TILE_KV / 16; s++) {
            u32 weights[4] = {pack2(scores[2 * s][0], scores[2 * s][1]), pack2(scores[2 * s][2], scores[2 * s][3]),
                              pack2(scores[2 * s + 1][0], scores[2 * s + 1][1]),
                              pack2(scores[2 * s + 1][2], scores[2 * s + 1][3])};
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                u32 values[4];
                load_matrices_transposed(values, v_address + (s * 16 * (D + PAD) + n * 16) * 2);
                mma(out[2 * n], weights, values[0], values[1]);
                mma(out[2 * n + 1], weights, values[2], values[3]);
            }
        }
        copy_wait<0>();
        __syncthreads();
    }

#pragma unroll
    for (int h = 0; h < 2; h++) {
        total[h] += __shfl_xor_sync(FULL_WARP, total[h], 1);
        total[h] += __shfl_xor_sync(FULL_WARP, total[h], 2);
        int row = start + warp * 16 + lane / 4 + 8 * h;
        if (row >= rows) continue;
        float factor = 1.f / total[h];
        real_t* target = y + ((size_t)(batch.first_row[sequence] + row) * heads + head) * D + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(u32*)(target + n * 8) = pack2(out[n][2 * h] * factor, out[n][2 * h + 1] * factor);
    }
}

#define ATTENTION(D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(32 * Tile<D>::WARPS) attention_##D(                          \
        real_t* y, const real_t* q, const real_t* k, const real_t* v, Batch batch, int heads, int kv_heads,   \
        int window, float scale, float cap) {                                                                 \
        attend<D>(y, q, k, v, batch, heads, kv_heads, window, scale, cap);                                    \
    }

ATTENTION(16)
ATTENTION(32)
ATTENTION(64)
ATTENTION(96)
ATTENTION(128)
ATTENTION(256)
#endif

/// Attention on the plain cores, for f32 and for head sizes that the tensor cores have no kernel for. A block
/// takes a warp's query row each of one head; keys and values come in tiles of a warp's width.
extern "C" __global__ void attention_plain(
    real_t* y, const real_t* q, const real_t* k, const real_t* v, Batch batch, int heads, int kv_heads, int window,
    float scale, float cap, int head_dim) {
    extern __shared__ float floats[];
    float* keys = floats;                          // [32, head_dim + 1]
    float* values = keys + 32 * (head_dim + 1);    // [32, head_dim]
    float* queries = values + 32 * head_dim;       // [warps, head_dim]
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int sequence = blockIdx.z, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int rows = batch.rows[sequence], context = batch.context[sequence];
    int start = blockIdx.x * PLAIN_WARPS, row = start + warp;
    if (start >= rows) return;
    bool mine = row < rows;
    size_t place = ((size_t)(batch.first_row[sequence] + (mine ? row : 0)) * heads + head) * head_dim;
    for (int i = lane; i < head_dim; i += 32) queries[warp * head_dim + i] = to_float(q[place + i]);
    int last = min(context + rows, context + start + PLAIN_WARPS), own = context + row;
    float out[PLAIN_SLOTS] = {}, largest = -INFINITY_F, total = 0.f;
    int first = window > 0 ? max(0, context + start + 1 - window) : 0;
    for (int tile = first; tile < last; tile += 32) {
        __syncthreads();
        for (int i = threadIdx.x; i < 32 * head_dim; i += blockDim.x) {
            int r = i / head_dim, c = i % head_dim;
            bool valid = tile + r < last;
            size_t from = ((valid ? key_row(batch, sequence, tile + r) : 0) * kv_heads + kv_head) * head_dim + c;
            keys[r * (head_dim + 1) + c] = valid ? to_float(k[from]) : 0.f;
            values[r * head_dim + c] = valid ? to_float(v[from]) : 0.f;
        }
        __syncthreads();
        int key = tile + lane;
        bool seen = key <= own && (window <= 0 || key > own - window);
        float score = -INFINITY_F;
        if (seen) {
            score = 0.f;
            for (int i = 0; i < head_dim; i++) score += queries[warp * head_dim + i] * keys[lane * (head_dim + 1) + i];
            score *= scale;
            if (cap != 0.f) score = soft_cap(score, cap);
        }
        float top = fmaxf(largest, warp_max(score));
        float keep = top == -INFINITY_F ? 1.f : expf(largest - top), weight = seen ? expf(score - top) : 0.f;
        largest = top;
        total = total * keep + warp_sum(weight);
#pragma unroll
        for (int s = 0; s < PLAIN_SLOTS; s++) out[s] *= keep;
        for (int j = 0; j < 32; j++) {
            float share = __shfl_sync(FULL_WARP, weight, j);
#pragma unroll
            for (int s = 0; s < PLAIN_SLOTS; s++)
                if (lane + 32 * s < head_dim) out[s] += share * values[j * head_dim + lane + 32 * s];
        }
    }
    if (!mine) return;
#pragma unroll
    for (int s = 0; s < PLAIN_SLOTS; s++)
        if (lane + 32 * s < head_dim) y[place + lane + 32 * s] = to_real(out[s] / total);
}

/// Stores the batch's keys and values at their rows of the cache; one block a token.
extern "C" __global__ void kv_append(
    real_t* cache_k,     // [cache rows, width]
    real_t* cache_v,     // [cache rows, width]
    const real_t* k,     // [tokens, width]
    const real_t* v,     // [tokens, width]
    const u32* slots,    // [tokens]: row in the cache
    int width) {
    size_t from = (size_t)blockIdx.x * width, to = (size_t)slots[blockIdx.x] * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        cache_k[to + i] = k[from + i];
        cache_v[to + i] = v[from + i];
    }
}
