// Products of rows with their experts' weights. A pair is a token and one of its choices. Pairs are sorted by expert and
// cut into tiles of rows that share one; a block multiplies a tile with EXPERT_OUTPUTS outputs, step by step of features.

/// Outputs of a block, features of a step, and threads.
#define EXPERT_OUTPUTS 64
#define EXPERT_STEP 128
#define EXPERT_THREADS 256
/// Features from one row of a tile in shared memory to the next, so that rows are in different banks.
#if F32
#define EXPERT_STRIDE (EXPERT_STEP + 1)
#else
#define EXPERT_STRIDE (EXPERT_STEP + 8)
#endif
/// Most experts: one for each thread that sorts.
#define MOST_EXPERTS 1024

/// Sums of all threads before this one, of a block of 1024: of two numbers at once.
__device__ __forceinline__ uint2 sums_before(uint2 mine) {
    __shared__ uint2 of_warps[32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto up_to_lane = [&](uint2 x) {
        for (int offset = 1; offset < 32; offset <<= 1) {
            u32 a = __shfl_up_sync(FULL_WARP, x.x, offset), b = __shfl_up_sync(FULL_WARP, x.y, offset);
            if (lane >= offset) x.x += a, x.y += b;
        }
        return x;
    };
    uint2 sum = up_to_lane(mine);
    if (lane == 31) of_warps[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        uint2 own = of_warps[lane], all = up_to_lane(own);
        of_warps[lane] = make_uint2(all.x - own.x, all.y - own.y);
    }
    __syncthreads();
    uint2 before = of_warps[warp];
    return make_uint2(before.x + sum.x - mine.x, before.y + sum.y - mine.y);
}

/// Sorts pairs by expert and cuts them into tiles. One block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) expert_tiles(
    u32* sorted,           // [pairs]: pairs, those of an expert in one run
    uint4* tiles,          // [most_tiles]: expert, first place in `sorted`, rows; 0 rows for tiles that are not needed
    const u32* experts_of, // [pairs]
    int pairs, int experts, int tile, int most_tiles) {
    __shared__ u32 counts[MOST_EXPERTS], places[MOST_EXPERTS];
    __shared__ u32 all_tiles;
    u32 expert = threadIdx.x;
    start_next_early();
    await_previous();
    counts[expert] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) atomicAdd(&counts[experts_of[i]], 1u);
    __syncthreads();
    u32 rows = counts[expert], own_tiles = (rows + tile - 1) / tile;
    uint2 before = sums_before(make_uint2(rows, own_tiles));
    places[expert] = before.x;
    for (u32 i = 0; i < own_tiles; i++)
        tiles[before.y + i] = make_uint4(expert, before.x + i * tile, min((u32)tile, rows - i * tile), 0);
    if (threadIdx.x == blockDim.x - 1) all_tiles = before.y + own_tiles;
    __syncthreads();
    for (int i = all_tiles + threadIdx.x; i < most_tiles; i += blockDim.x) tiles[i] = make_uint4(0, 0, 0, 0);
    // In whatever order the pairs of an expert come, each makes the same row.
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) sorted[atomicAdd(&places[experts_of[i]], 1u)] = i;
}

/// The same weight of all experts of a layer.
struct ExpertWeights {
    const void* values;   // [experts, out, in] of the compute type, or codes [experts, in * bits / 32, out]
    const u32* zeros;     // [experts, groups, out * bits / 32]
    const void* scales;   // [experts, groups, out]: f16, or f32 where `wide`
    const u32* group_of;  // [experts, in]: of each place, groups in one run each
    const u32* feature;   // [experts, in]: at each place; null for the model's own order
    int in, out, groups;
    int group_size;       // of all groups but the last; 0 where they differ
    int zero_offset, wide;
};

/// Eight neighbouring values as they lie in memory.
struct __align__(16) Eight {
    real_t of[8];
};

/// Puts them into a tile of shared memory.
__device__ __forceinline__ void put(real_t* target, const Eight& eight) {
#if F32
#pragma unroll
    for (int j = 0; j < 8; j++) target[j] = eight.of[j];
#else
    *(Eight*)target = eight;
#endif
}

/// Up to eight values from place `k` of a row of `in` on, zeros beyond its end.
__device__ __forceinline__ Eight read_eight(const real_t* row, const u32* feature, int k, int in) {
    Eight eight;
    if (!feature && in % 8 == 0 && k < in) return *(const Eight*)(row + k);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        bool there = k + j < in;
        eight.of[j] = there ? row[feature ? feature[k + j] : k + j] : to_real(0.f);
    }
    return eight;
}

/// A thread's share of a step of weights as they are.
struct DenseShare {
    static constexpr int EACH = EXPERT_OUTPUTS * EXPERT_STEP / 8 / EXPERT_THREADS, PIECES = EXPERT_STEP / 8;
    Eight eights[EACH];

    __device__ __forceinline__ void read(const ExpertWeights& weights, u32 expert, int first, int k) {
        const real_t* values = (const real_t*)weights.values + (size_t)expert * weights.out * weights.in;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int at = threadIdx.x + i * EXPERT_THREADS, n = min(first + at / PIECES, weights.out - 1);
            eights[i] = read_eight(values + (size_t)n * weights.in, nullptr, k + at % PIECES * 8, weights.in);
        }
    }

    __device__ __forceinline__ void store(real_t* tile, const ExpertWeights&, u32, int, int) const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int at = threadIdx.x + i * EXPERT_THREADS;
            put(tile + at / PIECES * EXPERT_STRIDE + at % PIECES * 8, eights[i]);
        }
    }
};

/// The same of codes: 32 features of one output, which are BITS words.
template <int BITS>
struct CodedShare {
    u32 words[BITS];
    int first_group, last_group;
    float2 grid;  // of the first group

    static __device__ __forceinline__ int output(int first, int out) {
        return min(first + (int)threadIdx.x % EXPERT_OUTPUTS, out - 1);
    }
    static __device__ __forceinline__ int run() { return threadIdx.x / EXPERT_OUTPUTS * 32; }

    static __device__ __forceinline__ int group(const ExpertWeights& weights, u32 expert, int k) {
        if (weights.group_size) return k / weights.group_size;
        return weights.group_of[(size_t)expert * weights.in + k];
    }

    /// An integer below 2^23 in the last bits of this float is that integer plus 2^23.
    static constexpr u32 MAGIC = 0x4B000000;

    /// A zero point plus 2^23, and a scale.
    static __device__ __forceinline__ float2 grid_of(const ExpertWeights& weights, u32 expert, int group, int n) {
        size_t row = (size_t)expert * weights.groups + group, place = row * weights.out + n;
        float scale = weights.wide ? ((const float*)weights.scales)[place]
                                   : f16_to_float(((const f16_t*)weights.scales)[place]);
        u32 zero = code_at(weights.zeros + row * (weights.out * BITS / 32), 1, 0, n, BITS) + weights.zero_offset;
        return make_float2(__uint_as_float(MAGIC | zero), scale);
    }

    __device__ __forceinline__ void read(const ExpertWeights& weights, u32 expert, int first, int k) {
        k += run();
        int rows = weights.in * BITS / 32, row = k / 32 * BITS, n = output(first, weights.out);
        const u32* codes = (const u32*)weights.values + (size_t)expert * rows * weights.out + n;
#pragma unroll
        for (int w = 0; w < BITS; w++) words[w] = row + w < rows ? codes[(size_t)(row + w) * weights.out] : 0;
        if (k >= weights.in) return;
        first_group = group(weights, expert, k), last_group = group(weights, expert, min(k + 31, weights.in - 1));
        grid = grid_of(weights, expert, first_group, n);
    }

    __device__ __forceinline__ void store(real_t* tile, const ExpertWeights& weights, u32 expert, int first, int k) const {
        k += run();
        tile += threadIdx.x % EXPERT_OUTPUTS * EXPERT_STRIDE + run();
        float2 now = grid;
        int seen = first_group, n = output(first, weights.out);
        // Groups lie in one run each.
        bool several = k < weights.in && first_group != last_group;
#pragma unroll
        for (int c = 0; c < 32; c += 8) {
            Eight eight;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                bool there = k + c + j < weights.in;
                if (several && there) {
                    int own = group(weights, expert, k + c + j);
                    if (own != seen) seen = own, now = grid_of(weights, expert, own, n);
                }
                int bit = (c + j) * BITS, word = bit / 32, shift = bit % 32;
                u32 code = words[word] >> shift;
                if (shift + BITS > 32) code |= words[word + 1 < BITS ? word + 1 : word] << (32 - shift);
                code &= (1u << BITS) - 1;
                eight.of[j] = to_real(there ? (__uint_as_float(MAGIC | code) - now.x) * now.y : 0.f);
            }
            put(tile + c, eight);
        }
    }
};

/// y[pair] = x[pair / share] w[expert of pair]^T, a tile of up to 16 TILES pairs.
template <int TILES, typename Share>
__device__ void expert_product(real_t* y, const real_t* x, ExpertWeights weights, const u32* sorted, const uint4* tiles,
                               int share) {
    constexpr int ROWS = 16 * TILES, PIECES = EXPERT_STEP / 8, EACH = ROWS * PIECES / EXPERT_THREADS;
    __shared__ __align__(16) real_t x_tile[ROWS * EXPERT_STRIDE];
    __shared__ __align__(16) real_t w_tile[EXPERT_OUTPUTS * EXPERT_STRIDE];
    __shared__ u32 pairs[ROWS];
    int in = weights.in, out = weights.out, first = blockIdx.y * EXPERT_OUTPUTS, thread = threadIdx.x;
    start_next_early();
    await_previous();
    uint4 tile = tiles[blockIdx.x];
    u32 expert = tile.x, rows = tile.z;
    if (rows == 0) return;
    // Rows beyond the last repeat the first; their results are not stored.
    if (thread < ROWS) pairs[thread] = sorted[tile.y + (thread < rows ? thread : 0)];
    __syncthreads();
    const u32* feature = weights.feature ? weights.feature + (size_t)expert * in : nullptr;
    Share codes;
    Eight eights[EACH];
    auto read = [&](int k) {
        codes.read(weights, expert, first, k);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int at = thread + i * EXPERT_THREADS;
            const real_t* row = x + (size_t)(pairs[at / PIECES] / share) * in;
            eights[i] = read_eight(row, feature, k + at % PIECES * 8, in);
        }
    };
    read(0);
#if F32
    float sum[4] = {};
    int n = thread % EXPERT_OUTPUTS, own = thread / EXPERT_OUTPUTS * 4;
#else
    float sum[TILES][4] = {};
    int warp = thread / 32, lane = thread % 32;
    u32 x_address = shared_address(x_tile + lane % 16 * EXPERT_STRIDE + lane / 16 * 8);
    u32 w_address = shared_address(w_tile + (warp * 8 + lane % 8) * EXPERT_STRIDE + lane / 8 * 8);
#endif
    for (int k = 0; k < in; k += EXPERT_STEP) {
        // All warps must have read the last step before its memory is overwritten.
        __syncthreads();
        codes.store(w_tile, weights, expert, first, k);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int at = thread + i * EXPERT_THREADS;
            put(x_tile + at / PIECES * EXPERT_STRIDE + at % PIECES * 8, eights[i]);
        }
        __syncthreads();
        if (k + EXPERT_STEP < in) read(k + EXPERT_STEP);
#if F32
        for (int i = 0; i < EXPERT_STEP; i++) {
            float w = w_tile[n * EXPERT_STRIDE + i];
#pragma unroll
            for (int r = 0; r < 4; r++) sum[r] += w * x_tile[(own + r) * EXPERT_STRIDE + i];
        }
#else
#pragma unroll
        for (int s = 0; s < EXPERT_STEP / 32; s++) {
            u32 w[4];
            load_matrices(w, w_address + s * 64);
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    u32 left[4];
                    load_matrices(left, x_address + (t * 16 * EXPERT_STRIDE + s * 32 + half * 16) * 2);
                    mma(sum[t], left, w[2 * half], w[2 * half + 1]);
                }
        }
#endif
    }
#if F32
    for (int r = 0; r < 4; r++)
        if (own + r < rows && first + n < out) y[(size_t)pairs[own + r] * out + first + n] = sum[r];
#else
    int n = first + warp * 8 + lane % 4 * 2;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = t * 16 + lane / 4 + 8 * h;
            if (row >= rows) continue;
            real_t* target = y + (size_t)pairs[row] * out;
            if (n < out) target[n] = to_real(sum[t][2 * h]);
            if (n + 1 < out) target[n + 1] = to_real(sum[t][2 * h + 1]);
        }
#endif
}

#define EXPERT_PRODUCT(NAME, TILES, SHARE)                                                                          \
    extern "C" __global__ void __launch_bounds__(EXPERT_THREADS) expert_product_##NAME##_##TILES(                   \
        real_t* y, const real_t* x, const void* values, const u32* zeros, const void* scales, const u32* group_of,  \
        const u32* feature, int in, int out, int groups, int group_size, int zero_offset, int wide,                 \
        const u32* sorted, const uint4* tiles, int share) {                                                         \
        ExpertWeights weights{values, zeros,  scales,     group_of,    feature, in,                                 \
                              out,    groups, group_size, zero_offset, wide};                                       \
        expert_product<TILES, SHARE>(y, x, weights, sorted, tiles, share);                                          \
    }
#define EXPERT_PRODUCTS(TILES)                  \
    EXPERT_PRODUCT(dense, TILES, DenseShare)    \
    EXPERT_PRODUCT(2, TILES, CodedShare<2>)     \
    EXPERT_PRODUCT(3, TILES, CodedShare<3>)     \
    EXPERT_PRODUCT(4, TILES, CodedShare<4>)     \
    EXPERT_PRODUCT(8, TILES, CodedShare<8>)

EXPERT_PRODUCTS(1)
#if !F32
EXPERT_PRODUCTS(4)
#endif

/// y[t] = sum_i weights[t, i] parts[t, i], in that order; one block a token.
extern "C" __global__ void sum_experts(real_t* y, const real_t* parts, const float* weights, int per_token, int width) {
    start_next_early();
    await_previous();
    const real_t* part = parts + (size_t)blockIdx.x * per_token * width;
    weights += (size_t)blockIdx.x * per_token;
    y += (size_t)blockIdx.x * width;
    int wide = width % 8 == 0 ? width : 0;
    for (int n = 8 * threadIdx.x; n < wide; n += 8 * blockDim.x) {
        float sum[8] = {}, x[8];
        for (int i = 0; i < per_token; i++) {
            load8(x, part + (size_t)i * width + n);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += weights[i] * x[j];
        }
        store8(y + n, sum);
    }
    for (int n = wide + threadIdx.x; n < width; n += blockDim.x) {
        float sum = 0.f;
        for (int i = 0; i < per_token; i++) sum += weights[i] * to_float(part[(size_t)i * width + n]);
        y[n] = to_real(sum);
    }
}

/// Codes of one expert with its features in another order; one thread a word.
extern "C" __global__ void order_codes(
    u32* codes,          // [in * bits / 32, out]
    const u32* stored,   // the same, features in the model's order
    const u32* feature,  // [in]: at each place
    int in, int out, int bits) {
    size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    int word = index / out, n = index % out;
    if (word >= in * bits / 32) return;
    u32 packed = 0;
    for (int place = word * 32 / bits; place < in && place * bits < (word + 1) * 32; place++) {
        u32 code = code_at(stored, out, n, feature[place], bits);
        int shift = place * bits - word * 32;
        packed |= shift >= 0 ? code << shift : code >> -shift;
    }
    codes[index] = packed;
}
