// The quantized product of up to eight rows, at the speed of memory. A block stays on its multiprocessor and takes
// tile after tile of 16 outputs; each warp streams its share of the weights through a ring in shared memory that
// runs ahead of the arithmetic, across tiles and even across kernels: its first shares come before the kernel that
// makes the input has ended. What surrounds the product in a model is done on the way in and on the way out.

#if !F32

/// Shares of a warp that are on their way at once.
#define DEPTH 2
/// Chunks that a warp takes at a time, its share.
#define PORTION 4
/// Bytes of the next weight that a warp asks for at a time.
#define NEXT_BYTES 2048

/// The codes of the weight that will be read next.
struct Next {
    const u8* codes;
    u64 bytes;
};

/// Shares of a warp on their way from memory, DEPTH of them at once; every lane sees a share once it is there.
template <int GROUPS>
struct Ring {
    static constexpr int CODES = 512 * PORTION, SHARE = CODES + 64 * GROUPS, BYTES = STREAM_WARPS * DEPTH * SHARE;
    const u8* memory;
    u32 target, barriers;  // the same in shared memory's own addresses, and the same for all lanes
    int asked = 0, taken = 0, parity = 0;

    __device__ Ring(u8* rings, u64* all_barriers) {
        int warp = uniform_warp();
        memory = rings + warp * DEPTH * SHARE;
        target = shared_address(rings) + warp * DEPTH * SHARE;
        barriers = shared_address(all_barriers) + 8 * warp * DEPTH;
#if HOPPER
        if (threadIdx.x % 32 == 0) {
            for (int i = 0; i < DEPTH; i++) barrier_init(barriers + 8 * i, 1);
            publish();
        }
        __syncwarp();
#endif
    }

    /// `asker` is the lane that asks on Hopper.
    __device__ __forceinline__ void ask(const u8* codes, const u8* grids, bool more, int asker) {
        u32 here = target + asked * SHARE;
#if HOPPER
        if (more && threadIdx.x % 32 == asker) {
            u32 barrier = barriers + 8 * asked;
            barrier_expect(barrier, SHARE);
            copy_bulk(here, codes, CODES, barrier);
            copy_bulk(here + CODES, grids, SHARE - CODES, barrier);
        }
#else
        int lane = threadIdx.x % 32;
        if (more) {
#pragma unroll
            for (int c = 0; c < PORTION; c++) copy_async(here + 512 * c + 16 * lane, codes + 512 * c + 16 * lane, true);
            if (lane < 4 * GROUPS) copy_async(here + CODES + 16 * lane, grids + 16 * lane, true);
        }
        copy_commit();
#endif
        asked = asked + 1 == DEPTH ? 0 : asked + 1;
    }

    __device__ __forceinline__ const u8* take() {
#if HOPPER
        barrier_wait(barriers + 8 * taken, parity);
#else
        copy_wait<DEPTH - 1>();
        __syncwarp();
#endif
        return memory + taken * SHARE;
    }

    /// The share taken last may be overwritten.
    __device__ __forceinline__ void free() {
        __syncwarp();
        taken++;
        if (taken == DEPTH) taken = 0, parity ^= 1;
    }
};

/// Neighbouring features, as many as the words hold.
template <int WORDS>
__device__ __forceinline__ void read_words(u32 (&words)[WORDS], const real_t* source) {
#pragma unroll
    for (int w = 0; w < WORDS; w += 4) {
        uint4 bits = ((const uint4*)source)[w / 4];
        words[w] = bits.x, words[w + 1] = bits.y, words[w + 2] = bits.z, words[w + 3] = bits.w;
    }
}

/// sum += codes times features, for chunks that share a grid; or, with scales on the weights, have two. Where GRIDS is
/// two, sums are those of each.
template <int BITS, bool ON_WEIGHTS, int CHUNKS, int WORDS, int GRIDS>
__device__ __forceinline__ void multiply(float (&sum)[4], Codes<BITS>& codes, const uint4 (&now)[CHUNKS],
                                         const uint2 (&grids)[GRIDS], const u32 (&features)[CHUNKS][WORDS]) {
    uint2 own = GRIDS > 1 && threadIdx.x % 4 >= 2 ? grids[GRIDS - 1] : grids[0];
    codes.grid(own.x >> 16, own.y >> 16);
    float scale[2][GRIDS];
#pragma unroll
    for (int g = 0; g < GRIDS; g++)
        scale[0][g] = f16_to_float(grids[g].x & 0xFFFF), scale[1][g] = f16_to_float(grids[g].y & 0xFFFF);
    // Two sums in turn: a product waits long for the one before it.
    float part[2][4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        u32 words[4] = {now[c].x, now[c].y, now[c].z, now[c].w};
#pragma unroll
        for (int j = 0; j < WORDS / 2; j++) {
            u32 left[4];
            codes.left(left, words, j);
            if (ON_WEIGHTS) {
                u32 scales[2] = {pack2(scale[0][0], scale[0][0]), pack2(scale[1][0], scale[1][0])};
#pragma unroll
                for (int r = 0; r < 4; r++) left[r] = fma2(left[r], scales[r % 2], 0x80008000u);
            }
            mma(part[j % 2], left, features[c][2 * j], features[c][2 * j + 1]);
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
        sum[r] += (part[0][r] + part[1][r]) * (ON_WEIGHTS ? 1.f : scale[r / 2][r % GRIDS]);
}

/// A portion has GROUPS grids; with one, a group is 2^group_shift portions. GROUPS 8 stands for two in a chunk, one for
/// two of the four lanes that share an output. PAIRED: up to four tokens, each as two, of which one has the features of
/// two of these lanes and the other those of the others, so that every group has sums of its own.
template <int BITS, int GROUPS, bool PAIRED>
__device__ void small_m_quant(real_t* y, Input input, const u8* fragments, const u8* grids, Finish finish, int rows, int in,
                             int out, int groups, int group_shift, int staged, Next next) {
    constexpr int CHUNK = CHUNK_FEATURES(BITS), FEATURES = LANE_FEATURES(BITS);
    constexpr bool TWO = GROUPS > PORTION, ON_WEIGHTS = TWO && !PAIRED;
    constexpr int SPAN = PORTION * CHUNK;
    constexpr int PARTS = TWO ? PORTION : GROUPS, CHUNKS = PORTION / PARTS, GRIDS = PAIRED ? 2 : 1;
    typedef Ring<GROUPS> Shares;
    extern __shared__ __align__(128) u8 small_m_memory[];
    float* parts = (float*)(small_m_memory + Shares::BYTES);             // [2][WAITING][warps][16]
    real_t* here = (real_t*)(parts + 2 * WAITING * STREAM_WARPS * 16);  // rows of the input, where it is staged
    __shared__ u64 barriers[STREAM_WARPS * DEPTH];
    int warp = uniform_warp(), lane = threadIdx.x % 32;
    int tiles = out / 16, portions = in / (CHUNK * PORTION);
    // An odd number of gaps: eight lanes that read for two rows find them in different banks.
    int row = in + GAP * (portions | 1);
    start_next_early();

    // Portions are dealt to warps in turn, on through all tiles of the block.
    Shares ring(small_m_memory, barriers);
    int ask_tile = blockIdx.x, ask_portion = warp;
    const u8* codes_at = fragments + ((size_t)ask_tile * portions + ask_portion) * Shares::CODES;
    const u8* grids_at = grids + ((size_t)ask_tile * groups + (GROUPS > 1 ? ask_portion * GROUPS : 0)) * 64;
    u64 next_at = (blockIdx.x * STREAM_WARPS + warp) * NEXT_BYTES;
    auto ask = [&](int asker) {
        while (ask_portion >= portions) {
            ask_portion -= portions;
            ask_tile += gridDim.x;
            codes_at += (size_t)(gridDim.x - 1) * portions * Shares::CODES;
            grids_at += (size_t)gridDim.x * groups * 64 - (GROUPS > 1 ? portions * GROUPS * 64 : 0);
        }
        if (ask_tile >= tiles) {
            // Nothing more of this weight: the next one's beginning can come nearer while this kernel ends.
            if (lane == 0 && next_at < next.bytes) prefetch_bulk(next.codes + next_at, NEXT_BYTES);
            next_at += (u64)gridDim.x * STREAM_WARPS * NEXT_BYTES;
        }
        ring.ask(codes_at, GROUPS > 1 ? grids_at : grids_at + (ask_portion >> group_shift) * 64, ask_tile < tiles, asker);
        ask_portion += STREAM_WARPS;
        codes_at += STREAM_WARPS * Shares::CODES;
        if (GROUPS > 1) grids_at += STREAM_WARPS * GROUPS * 64;
    };
    // First, since what the ring asks for keeps the memory busy for microseconds; but no more than a share before the
    // input is here, since the few loads that bring it would wait behind all that was asked for.
    Staging staging(input, in);
    ask(0);
    Output output(finish, rows);
    int blocks = gridDim.x, together = quotient(WAITING, rows);
    // A lane reads for its token; where there are fewer than eight, results of the others are not stored.
    int token = lane / 4 / GRIDS;
    bool mine = token < rows && (!PAIRED || lane / 4 % 2 == lane % 4 / 2);
    int apart = staged ? SPAN + GAP : SPAN;
    const real_t* features_at = (staged ? here + token * row : input.x + (size_t)token * in) + lane % 4 * FEATURES;
    u32 features[PARTS][CHUNKS][FEATURES / 2] = {};
    // The portion whose features are in registers: those of the next are read as soon as these have been multiplied,
    // or stay where a warp has the same portion of every tile.
    int at = ask_portion - STREAM_WARPS, step = STREAM_WARPS;
    while (step >= portions) step -= portions;
    auto read = [&]() {
#pragma unroll
        for (int i = 0; i < PORTION; i++)
            if (mine) read_words(features[i / CHUNKS][i % CHUNKS], features_at + at * apart + i * CHUNK);
    };
    await_previous();
    // The rows first, then what keeps the memory busy while they are normed.
    if (staged) staging.load(input, 0, rows, in);
    else read();
    for (int i = 1; i < DEPTH; i++) ask(0);
    if (staged) {
        staging.stage<SPAN>(here, input, rows, in, row);
        read();
    }

    Codes<BITS> codes;
    int portion = warp;
    // Two places in turn: the next sums need not wait until these are stored.
    float* waiting = parts;
    for (int first = blockIdx.x, last; first < tiles; first = last) {
        last = first + together * blocks;
        output.look_up(finish, first, together, out);
        float* part = waiting + (lane % 4 * 2 / GRIDS * STREAM_WARPS + warp) * 16 + lane / 4;
        for (int tile = first; tile < min(last, tiles); tile += blocks, part += rows * STREAM_WARPS * 16) {
            float sum[4] = {};
            for (; portion < portions; portion += STREAM_WARPS) {
                const u8* share = ring.take() + 16 * lane;
                at += step;
                if (at >= portions) at -= portions;
                const u8* grids_here = share - 16 * lane + Shares::CODES + lane / 4 * 8;
                uint4 now[PARTS][CHUNKS];
                uint2 grid[PARTS][GRIDS];
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++) now[p][c] = *(const uint4*)(share + (p * CHUNKS + c) * 512);
#pragma unroll
                    for (int g = 0; g < GRIDS; g++)
                        grid[p][g] = *(const uint2*)(grids_here + 64 * (TWO ? 2 * p + (PAIRED ? g : lane % 4 / 2) : p));
                }
                // The next share can come while this one is multiplied, once all of it is in registers: a number
                // that depends on it, 0 as a grid has no third dimension, says who asks.
                u32 arrived = 0;
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++) arrived |= now[p][c].x;
#pragma unroll
                    for (int g = 0; g < GRIDS; g++) arrived |= grid[p][g].x;
                }
                ring.free();
                ask(arrived & (gridDim.z - 1));
#pragma unroll
                for (int p = 0; p < PARTS; p++)
                    multiply<BITS, ON_WEIGHTS>(sum, codes, now[p], grid[p], features[p]);
                if (step > 0) read();
            }
            portion -= portions;
            if (PAIRED && lane % 4 < rows) part[0] = sum[0] + sum[1], part[8] = sum[2] + sum[3];
#pragma unroll
            for (int r = 0; r < 4; r++)
                if (!PAIRED && lane % 4 * 2 + r % 2 < rows) part[r % 2 * STREAM_WARPS * 16 + r / 2 * 8] = sum[r];
        }
        __syncthreads();
        output.store(y, waiting, finish);
        waiting = waiting == parts ? parts + WAITING * STREAM_WARPS * 16 : parts;
    }
}

#define SMALL_M_QUANT(NAME, BITS, GROUPS, PAIRED)                                                                   \
    extern "C" __global__ void __launch_bounds__(32 * STREAM_WARPS, 1) NAME(                                       \
        real_t* y, const real_t* x, const real_t* norm, const u32* norm_place, float eps, const u8* fragments,     \
        const u8* grids, const real_t* bias, const real_t* residual, int gated, Gate gate, int rows, int in, int out,         \
        int groups, int group_shift, int staged, const u8* next, u64 next_bytes) {                                 \
        small_m_quant<BITS, GROUPS, PAIRED>(y, Input{x, norm, norm_place, eps}, fragments, grids,                   \
                                           Finish{bias, residual, gated, gate}, rows, in, out, groups, group_shift,      \
                                           staged, Next{next, next_bytes});                                        \
    }

SMALL_M_QUANT(small_m_quant_4_1, 4, 1, false)
SMALL_M_QUANT(small_m_quant_4_2, 4, 2, false)
SMALL_M_QUANT(small_m_quant_4_4, 4, 4, false)
SMALL_M_QUANT(small_m_quant_4_8, 4, 8, false)
SMALL_M_QUANT(small_m_quant_4_8_paired, 4, 8, true)
SMALL_M_QUANT(small_m_quant_8_1, 8, 1, false)
SMALL_M_QUANT(small_m_quant_8_2, 8, 2, false)
SMALL_M_QUANT(small_m_quant_8_4, 8, 4, false)

#endif
