// The quantized product of 9 and more rows on Hopper. A block makes 64 outputs with each of its warp groups, for up to
// 128 tokens. A ring of stages holds codes and activations on their way: each warp asks for the codes of its own tile, one
// warp more for the activations. The warp groups turn codes into the left factor of `wgmma`, in registers, while the
// product before is running. Where there are few outputs, the blocks of a cluster divide the features among them and
// add up what they found.

#if HOPPER && !F32

/// Stages of the ring: few enough that the next kernel's block has room beside this one. And chunks of a stage.
#define HOPPER_STAGES 4
#define STAGE_CHUNKS 2

/// d += a b: 64 outputs, 16 features of them in registers, and of TOKENS tokens in shared memory.
__device__ __forceinline__ void multiply_group(float (&d)[8], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." PAIR " {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, 1, 1, 1, 0;"
                 : D8(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void multiply_group(float (&d)[16], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." PAIR " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},"
                 " {%16,%17,%18,%19}, %20, 1, 1, 1, 0;"
                 : D8(d, 0), D8(d, 8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void multiply_group(float (&d)[32], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." PAIR " " R32 ", {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
                 : D32(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void multiply_group(float (&d)[64], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." PAIR " " R64 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
                 : D32(d, 0), D32(d, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/// What a stage holds: the activations of its features, then codes.
template <int BITS, int TOKENS>
struct Stage {
    static constexpr int FEATURES = STAGE_CHUNKS * CHUNK_FEATURES(BITS), TILES = 4 * HOPPER_GROUPS;
    static constexpr int ACTIVATIONS = 2 * TOKENS * FEATURES, CODES = 512 * STAGE_CHUNKS;  // of 16 outputs
    static constexpr int PANELS = FEATURES / 64, PANEL = 128 * TOKENS;
    static constexpr int BYTES = ACTIVATIONS + TILES * CODES;
};

struct Weight {
    const u8* codes;
    const u8* grids;
    int in, out, groups, group_shift;
};

/// The warp that copies activations, and says what a stage waits for: of stages `begin` to `end` of the features, for
/// the tiles of 16 outputs from `first` on. Each other warp copies the codes of its own tile.
/// A panel of all tokens has `panel_bytes`. `before_input` is called while the kernels before this one may still run.
template <typename S, typename Before>
__device__ void fill_ring(u32 ring, u32 full, u32 empty, const u8* panels, size_t panel_bytes, Weight weight, int first,
                          int begin, int end, Before before_input) {
    int lane = threadIdx.x % 32, tiles = min(S::TILES, weight.out / 16 - first);
    // Codes may have come before they are expected: a barrier counts below zero too.
    auto expect = [&](int slot) {
        if (lane == 0) barrier_expect(full + 8 * slot, S::ACTIVATIONS + tiles * S::CODES);
    };
    auto ask = [&](int n, int slot) {
        if (lane < S::PANELS)
            copy_bulk(ring + slot * S::BYTES + lane * S::PANEL, panels + (n * S::PANELS + lane) * panel_bytes, S::PANEL,
                      full + 8 * slot);
    };
    int ahead = min(HOPPER_STAGES, end - begin), slot = 0, parity = 0;
    for (int i = 0; i < ahead; i++) expect(i);
    before_input();
    await_previous();
    for (int i = 0; i < ahead; i++) ask(begin + i, i);
    for (int n = begin + ahead; n < end; n++) {
        barrier_wait(empty + 8 * slot, parity);
        expect(slot);
        ask(n, slot);
        if (++slot == HOPPER_STAGES) slot = 0, parity ^= 1;
    }
    // Not before: the next kernel's blocks would crowd where this one has none.
    start_next_early();
}

/// The scale of a grid, twice.
__device__ __forceinline__ u32 scale_pair(u32 grid) {
#if BF16
    float scale = f16_to_float(grid & 0xFFFF);
    return pack2(scale, scale);
#else
    return __byte_perm(grid, 0, 0x1010);
#endif
}

/// Grids of a lane's two outputs, for the chunks of a stage.
template <int GRIDS>
struct Grids {
    const uint2* source;
    int shift;
    uint2 of[GRIDS == 1 ? 1 : STAGE_CHUNKS];

    __device__ __forceinline__ void read(int stage) {
        if (GRIDS == 1) of[0] = source[8 * (stage >> shift)];
        else
#pragma unroll
            for (int c = 0; c < STAGE_CHUNKS; c++)
                of[c] = source[8 * (GRIDS == 2 ? 2 * stage + c : 4 * stage + 2 * c + threadIdx.x % 4 / 2)];
    }
};

/// Warp groups multiply in turns. While the tensor cores are busy a warp waits to hand them its next product: all at
/// once would wait together, and then make factors together while the tensor cores wait for them. Each group has a
/// barrier, at which it and the group before it meet; barrier 0 is that of the block.
__device__ __forceinline__ void wait_turn(int group) { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
__device__ __forceinline__ void pass_turn(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(1 + group) : "memory"); }

/// A warp group's sums for 64 outputs over stages `begin` to `end`. Some chunks make one product, whose left factor
/// is made while the product before is running.
template <int BITS, int TOKENS, int GRIDS>
__device__ void sum_up(float (&sum)[TOKENS / 2], const u8* ring, u32 full, u32 empty, const u8* codes_of_tile,
                       const uint2* grids_of_tile, int shift, int begin, int end) {
    typedef Stage<BITS, TOKENS> S;
    constexpr int STEPS = LANE_FEATURES(BITS) / 4;
    // As many chunks as registers allow.
    constexpr int TAKEN = TOKENS > 64 ? 1 : STAGE_CHUNKS;
    int warp = uniform_warp(), lane = threadIdx.x % 32, slot = 0, before = 0, parity = 0;
    int group = warp / 4, next_group = (group + 1) % HOPPER_GROUPS;
    Codes<BITS> codes;
    Grids<GRIDS> grids{grids_of_tile + lane / 4, shift};
    u32 left[2][TAKEN * STEPS][4];
    u32 own_codes = shared_address(ring) + S::ACTIVATIONS + warp * S::CODES;
    auto ask = [&](int n, int slot) {
        if (codes_of_tile)
            copy_bulk(own_codes + slot * S::BYTES, codes_of_tile + (size_t)n * S::CODES, S::CODES, full + 8 * slot);
    };
    if (lane == 0)
        for (int i = 0; i < min(HOPPER_STAGES, end - begin); i++) ask(begin + i, i);
    __syncwarp();
    auto take = [&](u32(&left)[TAKEN * STEPS][4], int n, int first_chunk) {
        if (first_chunk == 0) barrier_wait(full + 8 * slot, parity);
        const u8* stage = ring + slot * S::BYTES;
        const uint4* own = (const uint4*)(stage + S::ACTIVATIONS + warp * S::CODES) + lane;
        u64 activations = matrix(shared_address(stage), 16);
#pragma unroll
        for (int c = 0; c < TAKEN; c++) {
            uint4 bytes = own[32 * (first_chunk + c)];
            uint2 grid = grids.of[GRIDS == 1 ? 0 : first_chunk + c];
            u32 words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
            u32 scale[2] = {scale_pair(grid.x), scale_pair(grid.y)};
            codes.grid(grid.x >> 16, grid.y >> 16);
#pragma unroll
            for (int j = 0; j < STEPS; j++) {
                u32(&a)[4] = left[c * STEPS + j];
                codes.left(a, words, j);
#pragma unroll
                for (int r = 0; r < 4; r++) a[r] = fma2(a[r], scale[r % 2], 0x80008000u);
            }
        }
        bool last = first_chunk + TAKEN == STAGE_CHUNKS;
        if (last && n + 1 < end) grids.read(n + 1);
        wait_turn(group);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < TAKEN * STEPS; i++) {
            int step = first_chunk * STEPS + i;
            multiply_group(sum, left[i], activations + (step / 4 * TOKENS * 128 + step % 4 * 32) / 16);
        }
        wgmma_commit();
        // The last group's last turn has none after it.
        if (next_group > 0 || !last || n + 1 < end) pass_turn(next_group);
        // The product before this one has read its registers, and the stage before if this is a stage's first.
        wgmma_wait<1>();
        if (first_chunk == 0 && n > begin && lane == 0) barrier_arrive(empty + 8 * before);
        if (!last) return;
        // Every lane has its codes of this stage: they became what the products take.
        if (lane == 0 && n + HOPPER_STAGES < end) ask(n + HOPPER_STAGES, slot);
        before = slot;
        if (++slot == HOPPER_STAGES) slot = 0, parity ^= 1;
    };
    if (begin == end) return;
    grids.read(begin);
    if (next_group == 0) pass_turn(0);
    if (TAKEN < STAGE_CHUNKS) {
        for (int n = begin; n < end; n++) take(left[0], n, 0), take(left[1], n, TAKEN);
    } else {
        int n = begin;
        for (; n + 1 < end; n += 2) take(left[0], n, 0), take(left[1], n + 1, 0);
        wgmma_wait<0>();
        if (n < end) take(left[0], n, 0);
    }
    wgmma_wait<0>();
}

/// y = x w^T (+ bias, + residual), or of gates and what they gate the products. x has room for `room` tokens.
template <int BITS, int TOKENS, int GRIDS>
__device__ void hopper_quant(real_t* y, const u8* panels, int room, Weight weight, Ending ending, int rows) {
    typedef Stage<BITS, TOKENS> S;
    // From here on all of it is about the block's own tile of tokens.
    int tile = blockIdx.z * TOKENS;
    rows = min(TOKENS, rows - tile);
    panels += (size_t)tile * 128;
    y += (size_t)tile * (ending.panel_tokens ? 64 : ending.lane_shift ? weight.out / 2 : weight.out);
    if (ending.residual) ending.residual += (size_t)tile * weight.out;
    constexpr int STRIDE = HOPPER_OUTPUTS + 4;
    extern __shared__ u8 hopper_memory[];
    __shared__ u64 barriers[2 * HOPPER_STAGES];
    u32 full = shared_address(barriers), empty = full + 8 * HOPPER_STAGES;
    u8* ring = hopper_memory + (-shared_address(hopper_memory) & 1023);
    int warp = uniform_warp(), lane = threadIdx.x % 32, splits = gridDim.y, split = blockIdx.y;
    int all = weight.in / S::FEATURES, begin = all * split / splits, end = all * (split + 1) / splits;
    if (threadIdx.x == 0) {
        for (int i = 0; i < HOPPER_STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, S::TILES);
        }
        publish();
    }
    __syncthreads();

    float sum[TOKENS / 2] = {};
    if (warp == S::TILES) {
        fill_ring<S>(shared_address(ring), full, empty, panels, (size_t)room * 128, weight, blockIdx.x * S::TILES, begin,
                     end, [&]() { prefetch_residual(ending.residual, rows, weight.out, split, splits); });
    } else {
        // Beyond the last output the last grids serve: their results are not stored.
        int wanted = blockIdx.x * S::TILES + warp, last = weight.out / 16 - 1;
        size_t tile = min(wanted, last);
        const u8* codes = wanted > last ? nullptr : weight.codes + tile * (weight.in / S::FEATURES) * S::CODES;
        const uint2* grids = (const uint2*)weight.grids + tile * weight.groups * 8;
        sum_up<BITS, TOKENS, GRIDS>(sum, ring, full, empty, codes, grids, weight.group_shift, begin, end);
    }

    if (ending.lane_shift && splits == 1) {
        // In memory of their own: a warp group that is through makes them while others still multiply.
        __shared__ __align__(16) Products<TOKENS> products;
        if (warp < S::TILES) products.make(sum, ending, weight.out);
        __syncthreads();
        await_previous();
        products.store(y, ending, rows, weight.out);
        return;
    }
    // Sums over the stages' memory: which are no longer read.
    __syncthreads();
    await_previous();
    float* sums = (float*)ring;  // [TOKENS, STRIDE]
    if (warp < S::TILES)
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++)
            sums[(i / 4 * 8 + lane % 4 * 2 + i % 2) * STRIDE + warp * 16 + lane / 4 + i / 2 % 2 * 8] = sum[i];
    if (ending.lane_shift) {
        if (splits > 1) cluster_sync();
        else __syncthreads();
        int from = rows * split / splits, to = rows * (split + 1) / splits;
        store_gated<STRIDE>(y, sums, ending, from, to, weight.out, split, splits);
    } else {
#define STORE_PLAIN(SPLITS) \
    case SPLITS: store_plain<TOKENS, SPLITS, STRIDE>(y, sums, ending, rows, weight.out, split); break;
        switch (splits) {
            STORE_PLAIN(1)
            STORE_PLAIN(2)
            STORE_PLAIN(3)
            STORE_PLAIN(4)
            STORE_PLAIN(5)
            STORE_PLAIN(6)
            STORE_PLAIN(7)
            STORE_PLAIN(8)
        }
    }
    // A block must not end while others of its cluster read its memory.
    if (splits > 1) cluster_meet();
}

#define HOPPER_QUANT(BITS, TOKENS, GRIDS)                                                                               \
    extern "C" __global__ void __launch_bounds__(128 * HOPPER_GROUPS + 32, 1) hopper_quant_##BITS##_##TOKENS##_##GRIDS( \
        real_t* y, const u8* panels, const u8* codes, const u8* grids, const real_t* bias, const real_t* residual,      \
        int lane_shift, int panel_tokens, Gate gate, int room, int rows, int in, int out, int groups, int group_shift) {\
        hopper_quant<BITS, TOKENS, GRIDS>(y, panels, room, Weight{codes, grids, in, out, groups, group_shift},          \
                                          Ending{bias, residual, lane_shift, panel_tokens, gate}, rows);                \
    }
#define HOPPER_QUANT_TOKENS(BITS, GRIDS)  \
    HOPPER_QUANT(BITS, 16, GRIDS)         \
    HOPPER_QUANT(BITS, 32, GRIDS)         \
    HOPPER_QUANT(BITS, 64, GRIDS)         \
    HOPPER_QUANT(BITS, 128, GRIDS)

HOPPER_QUANT_TOKENS(4, 1)
HOPPER_QUANT_TOKENS(4, 2)
HOPPER_QUANT_TOKENS(4, 4)
HOPPER_QUANT_TOKENS(8, 1)
HOPPER_QUANT_TOKENS(8, 2)

#endif
