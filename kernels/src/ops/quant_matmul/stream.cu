// The quantized product of up to eight rows, at the speed of memory. A block stays on its multiprocessor and takes
// tile after tile of 16 outputs; each warp streams its share of the weights through a ring in shared memory that
// runs ahead of the arithmetic, across tiles and even across kernels: its first shares come before the kernel that
// makes the input has ended. What surrounds the product in a model is done on the way in and on the way out.

#if !F32

#if HOPPER
#define STREAM_WARPS 20
#else
#define STREAM_WARPS 12
#endif
/// Chunks that a warp takes at a time, its share, and how many of these are on their way at once.
#define PORTION 4
#define DEPTH 2
/// Bytes of the next weight that a warp asks for at a time.
#define NEXT_BYTES 2048
/// Tiles, times rows, whose sums wait to be stored together.
#define WAITING 16

/// The input: as it is, or a residual stream still to be normed and brought into the weight's order.
struct Input {
    const real_t* x;     // [rows, in]
    const real_t* norm;  // [in] or null
    const u32* place;    // [in] or null: where the product wants a feature of a normed input
    float eps;
};

/// The codes of the weight that will be read next.
struct Next {
    const u8* codes;
    u64 bytes;
};

/// What is done with the outputs before they are stored.
struct Finish {
    const real_t* bias;      // [out] or null
    const real_t* residual;  // [rows, out] or null: added
    int gated;               // outputs g and g + 8 of a tile are a gate and what it gates
};

/// Shares of a warp on their way from memory, DEPTH of them at once; every lane sees a share once it is there.
template <int GROUPS>
struct Ring {
    static constexpr int CODES = 512 * PORTION, SHARE = CODES + 64 * GROUPS, BYTES = STREAM_WARPS * DEPTH * SHARE;
    u8* memory;
    u64* barriers;
    int asked = 0, taken = 0, parity = 0;

    __device__ Ring(u8* rings, u64* all_barriers) {
        int warp = threadIdx.x / 32;
        memory = rings + warp * DEPTH * SHARE;
        barriers = all_barriers + warp * DEPTH;
#if HOPPER
        if (threadIdx.x % 32 == 0) {
            for (int i = 0; i < DEPTH; i++) barrier_init(shared_address(barriers + i), 1);
            publish();
        }
        __syncwarp();
#endif
    }

    __device__ __forceinline__ void ask(const u8* codes, const u8* grids, bool more) {
        u32 target = shared_address(memory + asked * SHARE);
#if HOPPER
        if (more && threadIdx.x % 32 == 0) {
            u32 barrier = shared_address(barriers + asked);
            barrier_expect(barrier, SHARE);
            copy_bulk(target, codes, CODES, barrier);
            copy_bulk(target + CODES, grids, SHARE - CODES, barrier);
        }
#else
        int lane = threadIdx.x % 32;
        if (more) {
#pragma unroll
            for (int c = 0; c < PORTION; c++) copy_async(target + 512 * c + 16 * lane, codes + 512 * c + 16 * lane, true);
            if (lane < 4 * GROUPS) copy_async(target + CODES + 16 * lane, grids + 16 * lane, true);
        }
        copy_commit();
#endif
        asked = asked + 1 == DEPTH ? 0 : asked + 1;
    }

    __device__ __forceinline__ const u8* take() {
#if HOPPER
        barrier_wait(shared_address(barriers + taken), parity);
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

/// Eight features of a thread on their way into shared memory: what is known before the input is.
struct Staging {
    uint4 weights, places[2];

    __device__ Staging(Input input, int in) {
        int i = 8 * threadIdx.x;
        if (!input.norm || i >= in) return;
        weights = *(const uint4*)(input.norm + i);
        if (!input.place) return;
        places[0] = ((const uint4*)(input.place + i))[0], places[1] = ((const uint4*)(input.place + i))[1];
    }

    /// The rows as they are, or rms_norm of them with the features where the weight wants them, for which a row
    /// must not have more than eight for each thread.
    __device__ void stage(real_t* target, Input input, int rows, int in) {
        int i = 8 * threadIdx.x;
        if (!input.norm)
            for (int j = i; j < rows * in; j += 8 * blockDim.x) *(uint4*)(target + j) = *(const uint4*)(input.x + j);
        for (int t = 0; input.norm && t < rows; t++) {
            float values[8] = {}, scales[8], sum = 0.f;
            if (i < in) load8(values, input.x + (size_t)t * in + i);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += values[j] * values[j];
            float factor = rsqrtf(block_sum(sum) / in + input.eps);
            if (i >= in) continue;
            load8(scales, (const real_t*)&weights);
#pragma unroll
            for (int j = 0; j < 8; j++) values[j] *= factor * scales[j];
            if (!input.place) {
                store8(target + t * in + i, values);
                continue;
            }
            u32 to[8] = {places[0].x, places[0].y, places[0].z, places[0].w,
                         places[1].x, places[1].y, places[1].z, places[1].w};
#pragma unroll
            for (int j = 0; j < 8; j++) target[t * in + to[j]] = to_real(values[j]);
        }
        __syncthreads();
    }
};

/// One output of a thread, of those that are stored together.
struct Output {
    bool mine;
    int part, column;
    size_t row;
    float bias[2], residual;

    /// Looks up what is known before the sums are, for `count` tiles from `tile` on.
    __device__ Output(Finish finish, int tile, int count, int rows, int out) {
        int each = finish.gated ? 8 : 16, width = finish.gated ? out / 2 : out, i = threadIdx.x;
        int n = i % each, token = i / each % rows, turn = i / each / rows;
        mine = turn < count;
        if (!mine) return;
        part = (turn * rows + token) * STREAM_WARPS * 16 + n;
        column = (tile + turn * gridDim.x) * each + n;
        row = (size_t)token * width;
        // One for every row of a tile, as the codes are.
        int of_tile = finish.gated ? column / 8 * 16 + n : column;
        bias[0] = finish.bias ? to_float(finish.bias[of_tile]) : 0.f;
        bias[1] = finish.bias && finish.gated ? to_float(finish.bias[of_tile + 8]) : 0.f;
        residual = finish.residual ? to_float(finish.residual[row + column]) : 0.f;
    }

    __device__ __forceinline__ void store(real_t* y, const float* parts, Finish finish) const {
        if (!mine) return;
        float sum[2] = {bias[0], bias[1]};
#pragma unroll
        for (int w = 0; w < STREAM_WARPS; w++) sum[0] += parts[part + w * 16];
        if (finish.gated)
#pragma unroll
            for (int w = 0; w < STREAM_WARPS; w++) sum[1] += parts[part + w * 16 + 8];
        float value = sum[0];
        // Rounded where the plain products would be, so that both give the same.
        if (finish.gated) {
            float gate = to_float(to_real(value));
            value = __fdividef(gate, 1.f + __expf(-gate)) * to_float(to_real(sum[1]));
        }
        if (finish.residual) value = to_float(to_real(value)) + residual;
        y[row + column] = to_real(value);
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

/// sum += codes times features, for chunks that share a grid; or, with scales on the weights, have two.
template <int BITS, bool ON_WEIGHTS, int CHUNKS, int WORDS>
__device__ __forceinline__ void multiply(float (&sum)[4], Codes<BITS>& codes, const uint4 (&now)[CHUNKS], uint2 grid,
                                         const u32 (&features)[CHUNKS][WORDS]) {
    codes.grid(grid.x >> 16, grid.y >> 16);
    float scale[2] = {f16_to_float(grid.x & 0xFFFF), f16_to_float(grid.y & 0xFFFF)};
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
                u32 scales[2] = {pack2(scale[0], scale[0]), pack2(scale[1], scale[1])};
#pragma unroll
                for (int r = 0; r < 4; r++) left[r] = fma2(left[r], scales[r % 2], 0x80008000u);
            }
            mma(part[j % 2], left, features[c][2 * j], features[c][2 * j + 1]);
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) sum[r] += (part[0][r] + part[1][r]) * (ON_WEIGHTS ? 1.f : scale[r / 2]);
}

/// A portion has GROUPS grids; with one, a group is 2^group_shift portions. GROUPS 8 stands for two in a chunk.
template <int BITS, int GROUPS>
__device__ void stream_quant(real_t* y, Input input, const u8* fragments, const u8* grids, Finish finish, int rows, int in,
                             int out, int groups, int group_shift, int staged, Next next) {
    constexpr int CHUNK = CHUNK_FEATURES(BITS), FEATURES = LANE_FEATURES(BITS);
    constexpr bool ON_WEIGHTS = GROUPS > PORTION;
    constexpr int PARTS = ON_WEIGHTS ? PORTION : GROUPS, CHUNKS = PORTION / PARTS;
    typedef Ring<GROUPS> Shares;
    extern __shared__ __align__(128) u8 stream_memory[];
    float* parts = (float*)(stream_memory + Shares::BYTES);         // [WAITING][warps][16]
    real_t* here = (real_t*)(parts + WAITING * STREAM_WARPS * 16);  // [rows, in] where the input is staged
    __shared__ u64 barriers[STREAM_WARPS * DEPTH];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int tiles = out / 16, portions = in / (CHUNK * PORTION);
    start_next_early();

    // Portions are dealt to warps in turn, on through all tiles of the block.
    Shares ring(stream_memory, barriers);
    int ask_tile = blockIdx.x, ask_portion = warp;
    const u8* codes_at = fragments + ((size_t)ask_tile * portions + ask_portion) * Shares::CODES;
    const u8* grids_at = grids + ((size_t)ask_tile * groups + (GROUPS > 1 ? ask_portion * GROUPS : 0)) * 64;
    u64 next_at = (blockIdx.x * STREAM_WARPS + warp) * NEXT_BYTES;
    auto ask = [&]() {
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
        ring.ask(codes_at, GROUPS > 1 ? grids_at : grids_at + (ask_portion >> group_shift) * 64, ask_tile < tiles);
        ask_portion += STREAM_WARPS;
        codes_at += STREAM_WARPS * Shares::CODES;
        if (GROUPS > 1) grids_at += STREAM_WARPS * GROUPS * 64;
    };
    // First, since what the ring asks for keeps the memory busy for microseconds; but no more than a share before the
    // input is here, since the few loads that bring it would wait behind all that was asked for.
    Staging staging(input, in);
    ask();
    await_previous();
    if (staged) staging.stage(here, input, rows, in);
    for (int i = 1; i < DEPTH; i++) ask();

    // A lane reads for its token; where there are fewer than eight, nobody stores what the others come to.
    int token = lane / 4;
    const real_t* features_at = (staged ? here : input.x) + (size_t)token * in + lane % 4 * FEATURES;
    u32 features[CHUNKS][FEATURES / 2] = {};
    Codes<BITS> codes;
    int portion = warp, together = WAITING / rows * gridDim.x;
    for (int first = blockIdx.x; first < tiles; first += together) {
        int count = (min(first + together, tiles) - first + gridDim.x - 1) / gridDim.x;
        Output output(finish, first, count, rows, out);
        float* part = parts + (lane % 4 * 2 * STREAM_WARPS + warp) * 16 + lane / 4;
        for (int turn = 0; turn < count; turn++, part += rows * STREAM_WARPS * 16) {
            float sum[4] = {};
            for (; portion < portions; portion += STREAM_WARPS) {
                const u8* share = ring.take() + 16 * lane;
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
                    uint4 now[CHUNKS];
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++) {
                        now[c] = *(const uint4*)(share + (p * CHUNKS + c) * 512);
                        if (token < rows) read_words(features[c], features_at + (portion * PORTION + p * CHUNKS + c) * CHUNK);
                    }
                    const u8* grid_at = share - 16 * lane + Shares::CODES + lane / 4 * 8;
                    uint2 grid = *(const uint2*)(grid_at + 64 * (ON_WEIGHTS ? 2 * p + lane % 4 / 2 : p));
                    multiply<BITS, ON_WEIGHTS>(sum, codes, now, grid, features);
                }
                ring.free();
                ask();
            }
            portion -= portions;
#pragma unroll
            for (int r = 0; r < 4; r++)
                if (lane % 4 * 2 + r % 2 < rows) part[r % 2 * STREAM_WARPS * 16 + r / 2 * 8] = sum[r];
        }
        __syncthreads();
        output.store(y, parts, finish);
        __syncthreads();
    }
}

#define STREAM_QUANT(BITS, GROUPS)                                                                                \
    extern "C" __global__ void __launch_bounds__(32 * STREAM_WARPS, 1) stream_quant_##BITS##_##GROUPS(            \
        real_t* y, const real_t* x, const real_t* norm, const u32* norm_place, float eps, const u8* fragments,    \
        const u8* grids, const real_t* bias, const real_t* residual, int gated, int rows,                         \
        int in, int out, int groups, int group_shift, int staged, const u8* next, u64 next_bytes) {               \
        stream_quant<BITS, GROUPS>(y, Input{x, norm, norm_place, eps}, fragments, grids,                          \
                                   Finish{bias, residual, gated}, rows, in, out, groups, group_shift,      \
                                   staged, Next{next, next_bytes});                                               \
    }

STREAM_QUANT(4, 1)
STREAM_QUANT(4, 2)
STREAM_QUANT(4, 4)
STREAM_QUANT(4, 8)
STREAM_QUANT(8, 1)
STREAM_QUANT(8, 2)
STREAM_QUANT(8, 4)

#endif
