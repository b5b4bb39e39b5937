// Attention for Hopper (Shah et al. 2024, FlashAttention-3, the part of it that needs no tensor maps): one warp
// group copies keys and values, two multiply them with 64 query rows each by `wgmma`. While a group's product
// of weights and values runs, it already makes the next tile's weights. The two groups ask for products in turns, so that
// one makes weights while the other multiplies.

#if HOPPER && !F32

#define ROWS 128
#define KEYS 128
#define STAGES 2
#define COPIERS 128
#define MULTIPLIERS 256
/// Bytes of 64 features of a tile: rows of 128 bytes, their 16-byte pieces permuted by the row's last three bits.
#define PANEL (128 * 128)

/// d = a b^T (+ d): 64 queries and 128 keys, 16 features of both in shared memory.
__device__ __forceinline__ void score(float (&d)[64], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." PAIR " " R64 ", %64, %65, p, 1, 1, 0, 0;\n}"
                 : D32(d, 0), D32(d, 32) : "l"(a), "l"(b), "r"(add));
}

/// d += a b: weights of 16 keys in registers, their values in shared memory, 128 features.
__device__ __forceinline__ void weigh(float (&d)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." PAIR " " R64 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : D32(d, 0), D32(d, 32) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

/// The same with 64 features.
__device__ __forceinline__ void weigh(float (&d)[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." PAIR " " R32 ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : D32(d, 0) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

/// What a thread of the copying group copies of every tile: one 16-byte piece of every STEP-th row.
template <int D>
struct Copier {
    static const int PIECES = D / 8, STEP = COPIERS / PIECES;
    int piece = threadIdx.x % PIECES, row = threadIdx.x / PIECES;
    u32 place = piece / 8 * PANEL + row * 128 + ((piece % 8 ^ row % 8) << 4);

    /// `count` rows of 128 that lie `stride` apart, zeros for the rest.
    __device__ __forceinline__ void copy(u32 tile, const real_t* source, size_t stride, int count) const {
        source += row * stride + piece * 8;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            bool valid = row + i * STEP < count;
            copy_async(tile + place + i * STEP * 128, source + (valid ? i * STEP * stride : 0), valid);
        }
    }

    /// The same from the blocks of a cache.
    __device__ __forceinline__ void copy_paged(u32 tile, const real_t* cache, const u32* table, size_t stride,
                                               int count) const {
        const int BLOCKS = KEYS / KV_BLOCK_ROWS;
        u32 blocks[BLOCKS];
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) blocks[i] = i * KV_BLOCK_ROWS < count ? table[i] : 0;
        cache += piece * 8;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int inside = row + i * STEP % KV_BLOCK_ROWS;
            size_t from = (size_t)blocks[i * STEP / KV_BLOCK_ROWS] * KV_BLOCK_ROWS + inside;
            bool valid = row + i * STEP < count;
            copy_async(tile + place + i * STEP * 128, cache + (valid ? from * stride : 0), valid);
        }
    }
};

/// A group's turn to multiply comes when the other has asked for its products. Barrier 0 is that of the block.
__device__ __forceinline__ void await_turn(int group) { asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(MULTIPLIERS) : "memory"); }
__device__ __forceinline__ void give_turn(int group) { asm volatile("bar.arrive %0, %1;" ::"r"(1 + group), "n"(MULTIPLIERS) : "memory"); }

struct Barriers {
    u32 q, full_k[STAGES], full_v[STAGES], empty_k[STAGES], empty_v[STAGES];
};

template <int D>
__device__ void attend_hopper(real_t* y, const real_t* q, const real_t* k, const real_t* v, Batch batch, int heads,
                              int kv_heads, int window, float scale) {
    extern __shared__ u8 memory[];
    __shared__ u64 storage[1 + 4 * STAGES];
    const int tile_bytes = D / 64 * PANEL;
    u32 q_tile = (shared_address(memory) + 1023) & ~1023u;
    u32 k_tiles = q_tile + tile_bytes, v_tiles = k_tiles + STAGES * tile_bytes;
    Barriers bars;
    u32 first_bar = shared_address(storage);
    bars.q = first_bar;
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
        bars.full_k[s] = first_bar + 8 * (1 + s);
        bars.full_v[s] = first_bar + 8 * (1 + STAGES + s);
        bars.empty_k[s] = first_bar + 8 * (1 + 2 * STAGES + s);
        bars.empty_v[s] = first_bar + 8 * (1 + 3 * STAGES + s);
    }
    int sequence = blockIdx.z, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int rows = batch.rows[sequence], context = batch.context[sequence];
    int tile = (rows + ROWS - 1) / ROWS - 1 - (int)blockIdx.x;
    if (tile < 0) return;
    int start = tile * ROWS;
    int length = min(context + rows, context + start + ROWS);
    int first_seen = window > 0 ? max(0, context + start + 1 - window) : 0;
    int kv_first = first_seen / KEYS, count = (length - 1) / KEYS - kv_first + 1;
    if (threadIdx.x == 0) {
        barrier_init(bars.q, COPIERS);
        for (int s = 0; s < STAGES; s++) {
            barrier_init(bars.full_k[s], COPIERS);
            barrier_init(bars.full_v[s], COPIERS);
            barrier_init(bars.empty_k[s], MULTIPLIERS / 32);
            barrier_init(bars.empty_v[s], MULTIPLIERS / 32);
        }
        publish();
    }
    __syncthreads();

    if (threadIdx.x < COPIERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        Copier<D> copier;
        size_t q_first = batch.first_row[sequence] + start, stride = (size_t)kv_heads * D;
        size_t kv_place = (batch.table ? 0 : (size_t)batch.first_row[sequence] * stride) + kv_head * D;
        const u32* table = batch.table ? batch.table + batch.table_start[sequence] : 0;
        copier.copy(q_tile, q + (q_first * heads + head) * D, (size_t)heads * D, rows - start);
        copy_commit();
        // The last tile first: it has the diagonal, and all rows see something in it.
        for (int n = 0; n < count; n++) {
            int stage = n % STAGES, before = (n + STAGES - 1) % STAGES, first = (kv_first + count - 1 - n) * KEYS;
            u32 parity = n / STAGES % 2 ^ 1;
            auto copy = [&](u32 tile, const real_t* from) {
                if (table) copier.copy_paged(tile, from + kv_place, table + first / KV_BLOCK_ROWS, stride, length - first);
                else copier.copy(tile, from + kv_place + first * stride, stride, length - first);
            };
            barrier_wait(bars.empty_k[stage], parity);
            copy(k_tiles + stage * tile_bytes, k);
            copy_commit();
            copy_wait<1>();
            publish();
            barrier_arrive(n > 0 ? bars.full_v[before] : bars.q);
            barrier_wait(bars.empty_v[stage], parity);
            copy(v_tiles + stage * tile_bytes, v);
            copy_commit();
            copy_wait<1>();
            publish();
            barrier_arrive(bars.full_k[stage]);
        }
        copy_wait<0>();
        publish();
        barrier_arrive(bars.full_v[(count - 1) % STAGES]);
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    int row = start + group * 64 + warp * 16 + lane / 4;
    int own[2] = {context + row, context + row + 8};
    int earliest = context + start + group * 64 + warp * 16;
    float log2_scale = scale * 1.44269504f;
    float scores[64], out[D / 2], largest[2] = {-INFINITY_F, -INFINITY_F}, total[2] = {0.f, 0.f};
    u32 weights[32];
#pragma unroll
    for (int i = 0; i < D / 2; i++) out[i] = 0.f;

    auto ask_scores = [&](int stage) {
        u32 q_own = q_tile + group * 64 * 128, k_tile = k_tiles + stage * tile_bytes;
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
            u32 offset = s / 4 * PANEL + s % 4 * 32;
            score(scores, matrix(q_own + offset, 16), matrix(k_tile + offset, 16), s > 0);
        }
        wgmma_commit();
    };
    auto ask_values = [&](int stage) {
        u32 v_tile = v_tiles + stage * tile_bytes;
#pragma unroll
        for (int s = 0; s < KEYS / 16; s++)
            weigh(out, weights[4 * s], weights[4 * s + 1], weights[4 * s + 2], weights[4 * s + 3],
                  matrix(v_tile + s * 16 * 128, PANEL));
        wgmma_commit();
    };
    // Turns scores into weights; returns by how much what was summed before shrinks.
    auto soften = [&](int n, float (&keep)[2]) {
        int first = (kv_first + count - 1 - n) * KEYS;
        bool inside = first + KEYS - 1 <= earliest && (window <= 0 || first > earliest + 15 - window);
        if (!inside) {
#pragma unroll
            for (int i = 0; i < 64; i++) {
                int key = first + i / 4 * 8 + lane % 4 * 2 + i % 2, mine = own[i / 2 % 2];
                if (key > mine || (window > 0 && key <= mine - window)) scores[i] = -INFINITY_F;
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = largest[h];
#pragma unroll
            for (int i = 0; i < 16; i++) top = fmaxf(top, fmaxf(scores[4 * i + 2 * h], scores[4 * i + 2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            float shift = top == -INFINITY_F ? 0.f : top * log2_scale;
            keep[h] = exp2_fast(largest[h] * log2_scale - shift);
            largest[h] = top;
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < 16; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float& x = scores[4 * i + 2 * h + j];
                    x = exp2_fast(x * log2_scale - shift);
                    sum += x;
                }
            total[h] = total[h] * keep[h] + sum;
        }
    };
    auto pack = [&]() {
#pragma unroll
        for (int i = 0; i < 32; i++) weights[i] = pack2(scores[2 * i], scores[2 * i + 1]);
    };

    float keep[2];
    barrier_wait(bars.q, 0);
    barrier_wait(bars.full_k[0], 0);
    wgmma_fence();
    ask_scores(0);
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(bars.empty_k[0]);
    soften(0, keep);
    pack();
    if (group == 1 && count > 1) give_turn(0);
    for (int n = 1; n < count; n++) {
        int stage = n % STAGES, before = (n - 1) % STAGES;
        barrier_wait(bars.full_k[stage], n / STAGES % 2);
        barrier_wait(bars.full_v[before], (n - 1) / STAGES % 2);
        await_turn(group);
        wgmma_fence();
        ask_scores(stage);
        ask_values(before);
        // After the second group's last turn there is none.
        if (group == 0 || n + 1 < count) give_turn(1 - group);
        wgmma_wait<1>();
        if (lane == 0) barrier_arrive(bars.empty_k[stage]);
        soften(n, keep);
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(bars.empty_v[before]);
#pragma unroll
        for (int i = 0; i < D / 2; i++) out[i] *= keep[i / 2 % 2];
        pack();
    }
    barrier_wait(bars.full_v[(count - 1) % STAGES], (count - 1) / STAGES % 2);
    wgmma_fence();
    ask_values((count - 1) % STAGES);
    wgmma_wait<0>();

#pragma unroll
    for (int h = 0; h < 2; h++) {
        total[h] += __shfl_xor_sync(FULL_WARP, total[h], 1);
        total[h] += __shfl_xor_sync(FULL_WARP, total[h], 2);
        if (row + 8 * h >= rows) continue;
        float factor = 1.f / total[h];
        real_t* target = y + ((size_t)(batch.first_row[sequence] + row + 8 * h) * heads + head) * D + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < D / 8; i++)
            *(u32*)(target + i * 8) = pack2(out[4 * i + 2 * h] * factor, out[4 * i + 2 * h + 1] * factor);
    }
}

#define HOPPER_ATTENTION(D)                                                                                   \
    extern "C" __global__ void __launch_bounds__(COPIERS + MULTIPLIERS, 1) attention_hopper_##D(              \
        real_t* y, const real_t* q, const real_t* k, const real_t* v, Batch batch, int heads, int kv_heads,   \
        int window, float scale) {                                                                            \
        attend_hopper<D>(y, q, k, v, batch, heads, kv_heads, window, scale);                                  \
    }

HOPPER_ATTENTION(64)
HOPPER_ATTENTION(128)

#endif
