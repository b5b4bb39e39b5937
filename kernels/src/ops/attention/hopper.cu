// Attention for Hopper (Shah et al. 2024, FlashAttention-3). A block takes one tile of queries of one head after another,
// so that what the next tile needs is on its way before this one is stored. One warp copies queries and keys, another
// values (`hopper_copy.cu`); two warp groups multiply them with 64 query rows each by `wgmma`. While a group's product of
// weights and values runs, it already makes the next tile's weights. The two groups ask for products in turns, so that
// one makes weights while the other multiplies.

#if HOPPER && !F32

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

/// A group's turn to multiply comes when the other has asked for its products. Barrier 0 is that of the block.
__device__ __forceinline__ void await_turn(int group) { asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(MULTIPLIERS) : "memory"); }
__device__ __forceinline__ void give_turn(int group) { asm volatile("bar.arrive %0, %1;" ::"r"(1 + group), "n"(MULTIPLIERS) : "memory"); }

/// A multiplying group's 64 rows of every tile.
template <int D>
__device__ __forceinline__ void multiply_tiles(const Memory& memory, const AttentionCall& call, real_t* y, float scale) {
    constexpr int TILE = D / 64 * PANEL;
    int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    int all = call.sequences * call.heads * call.tiles;
    float log2_scale = scale * 1.44269504f, scores[64], out[D / 2], largest[2], total[2], keep[2];
    u32 weights[32];
    RingPlace<STAGES> place, before;
    RingPlace<2> item_place;
    RingPlace<STAGES> q_place;

    auto release = [&](u32 barrier) {
        if (lane == 0) barrier_arrive(barrier);
    };
    auto ask_scores = [&]() {
        u32 q_own = memory.q_tiles + q_place.index * TILE + group * 64 * 128, k_tile = memory.k_tiles + place.index * TILE;
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
            u32 offset = s / 4 * PANEL + s % 4 * 32;
            score(scores, matrix(q_own + offset, 16), matrix(k_tile + offset, 16), s > 0);
        }
        wgmma_commit();
    };
    auto ask_values = [&]() {
        u32 v_tile = memory.v_tiles + before.index * TILE;
#pragma unroll
        for (int s = 0; s < KEYS / 16; s++)
            weigh(out, weights[4 * s], weights[4 * s + 1], weights[4 * s + 2], weights[4 * s + 3],
                  matrix(v_tile + s * 16 * 128, PANEL));
        wgmma_commit();
    };
    // Values from `count` on belong to other sequences or were never written: an infinity among them, times a weight of
    // zero, would spoil the sum.
    auto clear_values = [&](int count) {
        constexpr int PIECES = D / 8;
        for (int i = threadIdx.x % 128 + count * PIECES; i < KEYS * PIECES; i += 128) {
            u32 at = memory.v_tiles + before.index * TILE + i % PIECES / 8 * PANEL + i / PIECES * 128 + i % 8 * 16;
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
        }
        publish();
        asm volatile("bar.sync %0, 128;" ::"r"(3 + group) : "memory");
    };
    // Turns scores into weights; `keep` is what sums over the tiles before are multiplied by.
    auto soften = [&](int first, const int (&own)[2], int earliest) {
        int window = call.window;
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

    for (;;) {
        int item = next_item(memory, item_place);
        if (item >= all) break;
        QueryTile tile(call, item);
        if (tile.count == 0) continue;
        int row = tile.start + group * 64 + warp * 16 + lane / 4, earliest = tile.context + row - lane / 4;
        int own[2] = {tile.context + row, tile.context + row + 8}, seen = tile.length - tile.first_key(0);
        largest[0] = largest[1] = -INFINITY_F, total[0] = total[1] = 0.f;
#pragma unroll
        for (int i = 0; i < D / 2; i++) out[i] = 0.f;

        barrier_wait(memory.q.full + 8 * q_place.index, q_place.parity);
        barrier_wait(memory.k.full + 8 * place.index, place.parity);
        wgmma_fence();
        ask_scores();
        wgmma_wait<0>();
        release(memory.k.empty + 8 * place.index);
        if (tile.count == 1) release(memory.q.empty + 8 * q_place.index);
        soften(tile.first_key(0), own, earliest);
        pack();
        before = place;
        place.next();
        if (group == 1 && tile.count > 1) give_turn(0);
        for (int n = 1; n < tile.count; n++) {
            barrier_wait(memory.k.full + 8 * place.index, place.parity);
            barrier_wait(memory.v.full + 8 * before.index, before.parity);
            if (n == 1 && seen < KEYS) clear_values(seen);
            await_turn(group);
            wgmma_fence();
            ask_scores();
            ask_values();
            // After the second group's last turn there is none.
            if (group == 0 || n + 1 < tile.count) give_turn(1 - group);
            wgmma_wait<1>();
            release(memory.k.empty + 8 * place.index);
            if (n + 1 == tile.count) release(memory.q.empty + 8 * q_place.index);
            soften(tile.first_key(n), own, earliest);
            wgmma_wait<0>();
            release(memory.v.empty + 8 * before.index);
#pragma unroll
            for (int i = 0; i < D / 2; i++) out[i] *= keep[i / 2 % 2];
            pack();
            before = place;
            place.next();
        }
        barrier_wait(memory.v.full + 8 * before.index, before.parity);
        if (tile.count == 1 && seen < KEYS) clear_values(seen);
        wgmma_fence();
        ask_values();
        wgmma_wait<0>();
        release(memory.v.empty + 8 * before.index);
        q_place.next();

#pragma unroll
        for (int h = 0; h < 2; h++) {
            total[h] += __shfl_xor_sync(FULL_WARP, total[h], 1);
            total[h] += __shfl_xor_sync(FULL_WARP, total[h], 2);
            if (row + 8 * h >= tile.rows) continue;
            float factor = 1.f / total[h];
            size_t at = call.batch.first_row[tile.sequence] + row + 8 * h;
            real_t* target = y + (at * call.heads + tile.head) * D + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                *(u32*)(target + i * 8) = pack2(out[4 * i + 2 * h] * factor, out[4 * i + 2 * h + 1] * factor);
        }
    }
}

template <int D>
__device__ void attend_hopper(real_t* y, const TensorMap& q, const TensorMap& k, const TensorMap& v,
                              const AttentionCall& call, float scale) {
    extern __shared__ u8 attention_tiles[];
    __shared__ u64 barriers[2 * (3 * STAGES + 2)];
    __shared__ int items[2];
    constexpr int TILE = D / 64 * PANEL;
    u32 next = shared_address(barriers);
    // Who fills and who empties arrive so many times.
    auto ring = [&](int places, int filling, int emptying) {
        Ring made = {next, next + 8 * places};
        for (int i = 0; threadIdx.x == 0 && i < places; i++)
            barrier_init(made.full + 8 * i, filling), barrier_init(made.empty + 8 * i, emptying);
        next += 16 * places;
        return made;
    };
    constexpr int WARPS = MULTIPLIERS / 32;
    u32 q_tiles = (shared_address(attention_tiles) + 1023) & ~1023u, k_tiles = q_tiles + STAGES * TILE;
    Memory memory = {q_tiles, k_tiles, k_tiles + STAGES * TILE,
                     ring(STAGES, 1, WARPS), ring(STAGES, 1, WARPS), ring(STAGES, 1, WARPS), ring(2, 1, WARPS + 1), items};
    if (threadIdx.x == 0) publish();
    __syncthreads();
    if (threadIdx.x < COPIERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        int warp = uniform_warp();
        if (warp == 0) copy_queries_and_keys<D>(memory, call, q, k);
        if (warp == 1) copy_values<D>(memory, call, v);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        multiply_tiles<D>(memory, call, y, scale);
    }
}

#define HOPPER_ATTENTION(D)                                                                                        \
    extern "C" __global__ void __launch_bounds__(COPIERS + MULTIPLIERS, 1) attention_hopper_##D(                   \
        real_t* y, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,                       \
        const __grid_constant__ TensorMap v, Batch batch, int heads, int kv_heads, int window, float scale,        \
        int tiles, int sequences, int together) {                                                                  \
        attend_hopper<D>(y, q, k, v, AttentionCall{batch, heads, kv_heads, window, tiles, sequences, together},    \
                         scale);                                                                                   \
    }

HOPPER_ATTENTION(64)
HOPPER_ATTENTION(128)

#endif
