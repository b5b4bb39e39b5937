// What is done with the sums of `hopper.cu`: those of a cluster's blocks are added up, biases and residuals added, gates
// applied, and all of it stored in the layout of the next operation.

#if HOPPER && !F32

/// Warp groups that multiply, and their outputs.
#define HOPPER_GROUPS 3
#define HOPPER_OUTPUTS (64 * HOPPER_GROUPS)
/// Blocks of a cluster at most.
#define HOPPER_SPLITS 8

/// What is done with the sums before they are stored.
struct Ending {
    const real_t* bias;      // [out] in the order of the tiles' rows, or null
    const real_t* residual;  // [rows, out] or null: added
    int lane_shift;          // not 0 for gates and what they gate: how y lies, see `panel_column`; 1 for rows
    int panel_tokens;        // of y, or 0
    Gate gate;
};

/// N neighbouring sums, of all blocks of the cluster, from this one's neighbour on: not all ask the same one first.
template <int N>
__device__ __forceinline__ void sum_cluster(float (&total)[N], const float* mine, int block, int blocks) {
#pragma unroll
    for (int r = 0; r < N; r++) total[r] = mine[r];
    if (blocks == 1) return;
    float parts[HOPPER_SPLITS][N] = {};
#pragma unroll
    for (int i = 1; i < HOPPER_SPLITS; i++)
        if (i < blocks) read_of_block(parts[i], mine, block + i < blocks ? block + i : block + i - blocks);
#pragma unroll
    for (int r = 0; r < N; r++)
#pragma unroll
        for (int i = 1; i < HOPPER_SPLITS; i++) total[r] += parts[i][r];
}

/// A block's share of the residual comes nearer. What is fetched is not looked at, so that it does not matter which
/// kernel writes it.
__device__ __forceinline__ void prefetch_residual(const real_t* residual, int rows, int out, int split, int splits) {
    constexpr int LINE = 128 / sizeof(real_t), LINES = HOPPER_OUTPUTS / LINE;
    int from = rows * split / splits, to = rows * (split + 1) / splits;
    if (!residual) return;
    for (int i = threadIdx.x % 32; i < (to - from) * LINES; i += 32) {
        int column = blockIdx.x * HOPPER_OUTPUTS + i % LINES * LINE;
        if (column < out) prefetch(residual + (size_t)(from + i / LINES) * out + column);
    }
}

/// Where a block of the cluster keeps what this one has at `mine`.
__device__ __forceinline__ const float4* of_block(const float* mine, int block) {
    u64 there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(block));
    return (const float4*)there;
}

/// The sums of the cluster's blocks for this one's share of the tokens: a thread takes four outputs of every
/// TOGETHER-th. All that it needs is on its way before it adds up any of it.
template <int TOKENS, int SPLITS, int STRIDE>
__device__ __forceinline__ void store_plain(real_t* y, const float* sums, Ending ending, int rows, int out, int split) {
    constexpr int UNITS = HOPPER_OUTPUTS / 4, TOGETHER = 128 * HOPPER_GROUPS / UNITS;
    constexpr int TURNS = ((TOKENS + SPLITS - 1) / SPLITS + TOGETHER - 1) / TOGETHER;
    int n = threadIdx.x % UNITS * 4, column = blockIdx.x * HOPPER_OUTPUTS + n;
    int token = rows * split / SPLITS + threadIdx.x / UNITS, to = rows * (split + 1) / SPLITS;
    if (threadIdx.x >= TOGETHER * UNITS || column >= out) to = 0;
    size_t at = (size_t)token * out + column;
    int step = TOGETHER * out;
    uint2 more[TURNS] = {}, bias = {};
    if (ending.residual)
#pragma unroll
        for (int t = 0; t < TURNS; t++)
            if (token + t * TOGETHER < to) more[t] = *(const uint2*)(ending.residual + at + t * step);
    if (ending.bias && token < to) bias = *(const uint2*)(ending.bias + column);
    if (SPLITS > 1) cluster_sync();
    else __syncthreads();

    const float* mine = sums + token * STRIDE + n;
    float4 parts[SPLITS][TURNS];
#pragma unroll
    for (int i = 0; i < SPLITS; i++) {
        const float4* there = i ? of_block(mine, split + i < SPLITS ? split + i : split + i - SPLITS) : (const float4*)mine;
#pragma unroll
        for (int t = 0; t < TURNS; t++)
            if (token + t * TOGETHER < to) parts[i][t] = there[t * TOGETHER * STRIDE / 4];
    }
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        if (token + t * TOGETHER >= to) break;
        float total[4] = {parts[0][t].x, parts[0][t].y, parts[0][t].z, parts[0][t].w};
#pragma unroll
        for (int i = 1; i < SPLITS; i++)
            total[0] += parts[i][t].x, total[1] += parts[i][t].y, total[2] += parts[i][t].z, total[3] += parts[i][t].w;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            int shift = r % 2 * 16;
            if (ending.bias) total[r] += to_float((real_t)((r < 2 ? bias.x : bias.y) >> shift));
            // Rounded where the plain products would be, so that both give the same.
            if (ending.residual)
                total[r] = to_float(to_real(total[r])) + to_float((real_t)((r < 2 ? more[t].x : more[t].y) >> shift));
        }
        *(uint2*)(y + at + t * step) = make_uint2(pack2(total[0], total[1]), pack2(total[2], total[3]));
    }
}

/// Gates times what they gate: of four products a thread those that lie side by side where they are stored.
template <int STRIDE>
__device__ void store_gated(real_t* y, const float* sums, Ending ending, int from, int to, int out, int split, int splits) {
    constexpr int UNITS = HOPPER_OUTPUTS / 8;
    int shift = ending.lane_shift, neighbours = 1 << shift;
    for (int i = threadIdx.x; i < (to - from) * UNITS; i += blockDim.x) {
        int token = from + i / UNITS, unit = i % UNITS, turn = unit >> (shift - 1);
        int first = turn * 2 * neighbours + (unit - (turn << (shift - 1))) * 2;
        int place = blockIdx.x * (HOPPER_OUTPUTS / 2) + first;
        if (place >= out / 2) continue;
        u32 products[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int product = first + half * neighbours, row = product / 8 * 16 + product % 8;
            float gates[2], gated[2];
            sum_cluster(gates, sums + token * STRIDE + row, split, splits);
            sum_cluster(gated, sums + token * STRIDE + row + 8, split, splits);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (ending.bias) {
                    const real_t* bias = ending.bias + blockIdx.x * HOPPER_OUTPUTS + row + r;
                    gates[r] += to_float(bias[0]), gated[r] += to_float(bias[8]);
                }
                float gate = to_float(to_real(gates[r]));
                gated[r] = ending.gate.quick(gate) * to_float(to_real(gated[r]));
            }
            products[half] = pack2(gated[0], gated[1]);
        }
        size_t at = ending.panel_tokens ? panel_place(token, panel_column(place, shift), ending.panel_tokens)
                                        : (size_t)token * (out / 2) + place;
        *(uint2*)(y + at) = make_uint2(products[0], products[1]);
    }
}

/// What a block makes of gates and what they gate where no other has a part of their sums: a row of 16-bit products
/// for each token, two to a word, in the order in which they are stored.
template <int TOKENS>
struct Products {
    static constexpr int UNITS = HOPPER_OUTPUTS / 8, STRIDE = 2 * UNITS + 8, TOGETHER = 128 * HOPPER_GROUPS / UNITS;
    u32 pairs[TOKENS * STRIDE];

    /// A lane has the sums of a gate and of what it gates, for a quarter of the tokens.
    __device__ __forceinline__ void make(const float (&sum)[TOKENS / 2], Ending ending, int out) {
        int warp = uniform_warp(), lane = threadIdx.x % 32, output = lane / 4, shift = ending.lane_shift;
        int row = (blockIdx.x * 4 * HOPPER_GROUPS + warp) * 16 + output;
        float bias[2] = {};
        if (ending.bias && row < out) bias[0] = to_float(ending.bias[row]), bias[1] = to_float(ending.bias[row + 8]);
        // Of two lanes with neighbouring outputs each takes both for one of two tokens.
        int pair = warp * 4 + output / 2, inside = pair & ((1 << shift) - 1), half = inside >> (shift - 1);
        int unit = (pair >> shift << (shift - 1)) + inside - (half << (shift - 1));
        u32 choice = output % 2 ? 0x3276 : 0x5410;
        u32* to = pairs + (lane % 4 * 2 + output % 2) * STRIDE + 2 * unit + half;
#pragma unroll
        for (int t = 0; t < TOKENS / 8; t++) {
            float product[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float gate = to_float(to_real(sum[4 * t + r] + bias[0])), gated = sum[4 * t + 2 + r] + bias[1];
                product[r] = ending.gate.quick(gate) * to_float(to_real(gated));
            }
            u32 mine = pack2(product[0], product[1]);
            to[8 * t * STRIDE] = __byte_perm(mine, __shfl_xor_sync(FULL_WARP, mine, 4), choice);
        }
    }

    /// Four products a thread: those that lie side by side where they are stored, of every TOGETHER-th token. Pieces
    /// of panels are permuted alike for these.
    __device__ __forceinline__ void store(real_t* y, Ending ending, int rows, int out) const {
        static_assert(TOGETHER % 8 == 0, "");
        int unit = threadIdx.x % UNITS, token = threadIdx.x / UNITS, shift = ending.lane_shift, turn = unit >> (shift - 1);
        int place = blockIdx.x * (HOPPER_OUTPUTS / 2) + (turn << (shift + 1)) + (unit - (turn << (shift - 1))) * 2;
        if (token >= TOGETHER || place >= out / 2) return;
        size_t at = ending.panel_tokens ? panel_place(token, panel_column(place, shift), ending.panel_tokens)
                                        : (size_t)token * (out / 2) + place;
        int step = TOGETHER * (ending.panel_tokens ? 64 : out / 2);
#pragma unroll
        for (int i = 0; i < TOKENS / TOGETHER; i++)
            if (token + i * TOGETHER < rows)
                *(uint2*)(y + at + i * step) = *(const uint2*)(pairs + (token + i * TOGETHER) * STRIDE + 2 * unit);
    }
};

#endif
