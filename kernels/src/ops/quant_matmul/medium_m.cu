// The quantized product with up to 64 rows of activations, from fragments.

#if !F32

__device__ __forceinline__ u32 both(u32 half) { return half | half << 16; }

/// `word & mask | magic`, with constants that stay in registers: the instruction takes one from itself only.
__device__ __forceinline__ u32 pick(u32 word, u32 mask, u32 magic) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(word), "r"(mask), "r"(magic));
    return d;
}

__device__ __forceinline__ u32 constant(u32 value) {
    u32 x;
    asm volatile("mov.b32 %0, %1;" : "=r"(x) : "r"(value));
    return x;
}

/// Registers of the left factor from codes, zero points taken off. Zero points are integers, and so are the bits
/// of the floats that take them off.
template <int BITS>
struct Codes;

template <>
struct Codes<4> {
    u32 low[2], high[2], low_mask = constant(0x000F000Fu), high_mask = constant(0x00F000F0u);
#if BF16
    u32 magic = constant(0x43004300u);
#else
    u32 magic = constant(0x64006400u);
#endif

    __device__ __forceinline__ void grid(u32 upper_zero, u32 lower_zero) {
#if BF16
        // -(128 + zero)
        low[0] = both(0xC300 + upper_zero), low[1] = both(0xC300 + lower_zero);
#else
        // -(1024 + zero) for rows above, -(64 + zero) for rows below, whose codes are read four bits higher.
        low[0] = both(0xE400 + upper_zero), high[1] = both(0xD400 + 16 * lower_zero);
#endif
    }

    /// Product `j` of the four that a chunk makes.
    __device__ __forceinline__ void left(u32 (&a)[4], const u32 (&words)[4], int j) const {
        u32 w = words[j];
#if BF16
        // 128 + code has no rounding.
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = fma2(pick(w >> (4 * i), low_mask, magic), 0x3F803F80u, low[i % 2]);
#else
        // 1024 + code and 1024 + 16 code have none.
        a[0] = fma2(pick(w, low_mask, magic), 0x3C003C00u, low[0]);
        a[1] = fma2(pick(w, high_mask, magic), 0x2C002C00u, high[1]);
        w >>= 8;
        a[2] = fma2(pick(w, low_mask, magic), 0x3C003C00u, low[0]);
        a[3] = fma2(pick(w, high_mask, magic), 0x2C002C00u, high[1]);
#endif
    }
};

template <>
struct Codes<8> {
    float zero[2];
    u32 low[2];

    __device__ __forceinline__ void grid(u32 upper_zero, u32 lower_zero) {
        zero[0] = (float)upper_zero, zero[1] = (float)lower_zero;
        low[0] = both(0xE400 + upper_zero), low[1] = both(0xE400 + lower_zero);
    }

    __device__ __forceinline__ void left(u32 (&a)[4], const u32 (&words)[4], int j) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 w = words[2 * j + i / 2];
#if BF16
            u32 pair = i % 2 ? w >> 16 : w;
            a[i] = pack2((float)(pair & 255) - zero[i % 2], (float)(pair >> 8 & 255) - zero[i % 2]);
#else
            a[i] = fma2(__byte_perm(w, 0x64646464u, i % 2 ? 0x4342 : 0x4140), 0x3C003C00u, low[i % 2]);
#endif
        }
    }
};

/// A block makes OUTS x 16 outputs. It goes through the features in units of UNIT chunks, which share a grid: a
/// group is 2^group_shift units. UNIT 0 stands for chunks of two groups each.
template <int BITS, int TILES, int OUTS, int UNIT>
__device__ void medium_m_quant(real_t* y, const real_t* x, const uint4* fragments, const uint2* grids,
                               const real_t* bias, int rows, int in, int out, int groups, int group_shift) {
    const int CHUNK = CHUNK_FEATURES(BITS), FEATURES = LANE_FEATURES(BITS), STEPS = FEATURES / 4;
    const int CHUNKS = UNIT > 0 ? UNIT : 1;
    // Scales go onto the sums, once a unit; with many tokens or two groups in a chunk, onto the weights.
    const bool ON_WEIGHTS = UNIT == 0 || TILES >= 4;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int chunks = in / CHUNK, units = chunks / CHUNKS;
    int each = (units + SMALL_M_WARPS - 1) / SMALL_M_WARPS, begin = warp * each, end = min(begin + each, units);
    const uint4* codes_at = fragments + ((size_t)blockIdx.x * OUTS * chunks + begin * CHUNKS) * 32 + lane;
    const uint2* grids_at = grids + (size_t)blockIdx.x * OUTS * groups * 8 + lane / 4;
    Tokens<TILES> tokens(x, rows, in);
    int k = begin * CHUNKS * CHUNK + lane % 4 * FEATURES;
    float sum[OUTS][TILES][4] = {};
    Codes<BITS> codes;
    uint4 next[OUTS][CHUNKS];
    uint2 next_grid[OUTS];
    auto read = [&](int unit) {
        int group = UNIT > 0 ? unit >> group_shift : 2 * unit + lane % 4 / 2;
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) next[o][c] = read_once(codes_at + ((size_t)o * chunks + c) * 32);
            next_grid[o] = grids_at[(o * groups + group) * 8];
        }
        codes_at += CHUNKS * 32;
    };
    if (begin < end) read(begin);
    for (int unit = begin; unit < end; unit++) {
        uint4 now[OUTS][CHUNKS];
        uint2 grid[OUTS];
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) now[o][c] = next[o][c];
            grid[o] = next_grid[o];
        }
        if (unit + 1 < end) read(unit + 1);
        // Two sums in turn: a product waits long for the one before it.
        float part[2][TILES][4] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            u32 features[ON_WEIGHTS ? 1 : TILES][FEATURES / 2];
            if (!ON_WEIGHTS)
#pragma unroll
                for (int t = 0; t < TILES; t++) tokens.read(features[ON_WEIGHTS ? 0 : t], t, k);
            u32 left[OUTS][STEPS][4];
#pragma unroll
            for (int o = 0; o < OUTS; o++) {
                u32 words[4] = {now[o][c].x, now[o][c].y, now[o][c].z, now[o][c].w};
                codes.grid(grid[o].x >> 16, grid[o].y >> 16);
#pragma unroll
                for (int j = 0; j < STEPS; j++) codes.left(left[o][j], words, j);
                if (ON_WEIGHTS) {
                    float upper = f16_to_float(grid[o].x & 0xFFFF), lower = f16_to_float(grid[o].y & 0xFFFF);
                    u32 scale[2] = {pack2(upper, upper), pack2(lower, lower)};
#pragma unroll
                    for (int j = 0; j < STEPS; j++)
#pragma unroll
                        for (int r = 0; r < 4; r++) left[o][j][r] = fma2(left[o][j][r], scale[r % 2], 0x80008000u);
                }
            }
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                if (ON_WEIGHTS) tokens.read(features[0], t, k);
                const u32(&f)[FEATURES / 2] = features[ON_WEIGHTS ? 0 : t];
#pragma unroll
                for (int o = 0; o < OUTS; o++)
#pragma unroll
                    for (int j = 0; j < STEPS; j++)
                        mma(ON_WEIGHTS ? sum[o][t] : part[j % 2][t], left[o][j], f[2 * j], f[2 * j + 1]);
            }
            k += CHUNK;
        }
        if (!ON_WEIGHTS) {
            float scale[2] = {f16_to_float(grid[0].x & 0xFFFF), f16_to_float(grid[0].y & 0xFFFF)};
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int r = 0; r < 4; r++) sum[0][t][r] += (part[0][t][r] + part[1][t][r]) * scale[r / 2];
        }
    }
#pragma unroll
    for (int o = 0; o < OUTS; o++) {
        int first = (blockIdx.x * OUTS + o) * 16;
        join_warps<TILES>(sum[o], rows, [&](int token, int n, float total) {
            if (bias) total += to_float(bias[first + n]);
            y[(size_t)token * out + first + n] = to_real(total);
        });
    }
}

#define MEDIUM_M_QUANT(BITS, TILES, OUTS, UNIT)                                                               \
    extern "C" __global__ void __launch_bounds__(32 * SMALL_M_WARPS) medium_m_quant_##BITS##_##TILES##_##UNIT(    \
        real_t* y, const real_t* x, const uint4* fragments, const uint2* grids, const real_t* bias, int rows, \
        int in, int out, int groups, int group_shift) {                                                       \
        medium_m_quant<BITS, TILES, OUTS, UNIT>(y, x, fragments, grids, bias, rows, in, out, groups,          \
                                                group_shift);                                                 \
    }
#define MEDIUM_M_QUANT_TILES(BITS, UNIT)                                                                      \
    MEDIUM_M_QUANT(BITS, 1, 1, UNIT)                                                                          \
    MEDIUM_M_QUANT(BITS, 2, 1, UNIT)                                                                          \
    MEDIUM_M_QUANT(BITS, 4, 2, UNIT)                                                                          \
    MEDIUM_M_QUANT(BITS, 8, 2, UNIT)

MEDIUM_M_QUANT_TILES(4, 0)
MEDIUM_M_QUANT_TILES(4, 1)
MEDIUM_M_QUANT_TILES(4, 2)
MEDIUM_M_QUANT_TILES(8, 1)
MEDIUM_M_QUANT_TILES(8, 2)

#endif
