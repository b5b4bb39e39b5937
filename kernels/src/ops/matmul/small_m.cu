// Products with few rows of activations, as decoding has them: bound by reading the weights once. Weights are the
// left factor of the tensor cores' 16 x 8 x 16 product, eight tokens the right one. A dot product does not mind
// the order of its terms: features are dealt to lanes so that every lane reads 16 contiguous bytes.

#if !F32

/// Warps of a block; they share 16 outputs and divide the features among them.
#define SMALL_M_WARPS 8
/// Reads that a lane has under way.
#define AHEAD 4

/// 16 bytes that are used once.
__device__ __forceinline__ uint4 read_once(const uint4* source) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(source));
    return x;
}

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
#if BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

/// A lane's place in each token's row, for tiles of eight tokens. Where a tile has fewer, lanes read the last
/// token again: the result is not stored.
template <int TILES>
struct Tokens {
    const real_t* rows[TILES];

    __device__ __forceinline__ Tokens(const real_t* x, int count, int in) {
#pragma unroll
        for (int t = 0; t < TILES; t++) rows[t] = x + (size_t)min(t * 8 + (int)threadIdx.x % 32 / 4, count - 1) * in;
    }

    /// WORDS words of two features, from feature `k` on.
    template <int WORDS>
    __device__ __forceinline__ void read(u32 (&words)[WORDS], int tile, int k) const {
#pragma unroll
        for (int w = 0; w < WORDS; w += 4) {
            uint4 bits = *(const uint4*)(rows[tile] + k + 2 * w);
            words[w] = bits.x, words[w + 1] = bits.y, words[w + 2] = bits.z, words[w + 3] = bits.w;
        }
    }
};

/// Adds up what the warps found, and stores 16 outputs of every token.
template <int TILES, typename Store>
__device__ __forceinline__ void join_warps(const float (&sum)[TILES][4], int rows, Store store) {
    __shared__ float parts[SMALL_M_WARPS][TILES][8][17];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4 * 2;
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        parts[warp][t][c][g] = sum[t][0];
        parts[warp][t][c + 1][g] = sum[t][1];
        parts[warp][t][c][g + 8] = sum[t][2];
        parts[warp][t][c + 1][g + 8] = sum[t][3];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILES * 128; i += blockDim.x) {
        int token = i / 16, n = i % 16;
        if (token >= rows) break;
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < SMALL_M_WARPS; w++) total += parts[w][token / 8][token % 8][n];
        store(token, n, total);
    }
}

/// y = x w^T for dense weights; `wide` says that y is f32.
template <int TILES>
__device__ void small_m_dense(void* y, const real_t* x, const real_t* w, const real_t* bias, int rows, int in, int out,
                               int wide) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * 16, g = lane / 4;
    float sum[TILES][4] = {};
    start_next_early();
    await_previous();
    Tokens<TILES> tokens(x, rows, in);
    // Rows beyond the last read its weights; their results are not stored.
    const uint4* upper = (const uint4*)(w + (size_t)min(first + g, out - 1) * in);
    const uint4* lower = (const uint4*)(w + (size_t)min(first + g + 8, out - 1) * in);
    // A chunk is 32 features, eight of them a lane's.
    int chunks = in / 32;
    for (int start = warp; start < chunks; start += SMALL_M_WARPS * AHEAD) {
        uint4 a[AHEAD], b[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int place = min(start + i * SMALL_M_WARPS, chunks - 1) * 4 + lane % 4;
            a[i] = read_once(upper + place);
            b[i] = read_once(lower + place);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int chunk = start + i * SMALL_M_WARPS;
            if (chunk >= chunks) break;
            u32 low[4] = {a[i].x, b[i].x, a[i].y, b[i].y}, high[4] = {a[i].z, b[i].z, a[i].w, b[i].w};
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                u32 features[4];
                tokens.read(features, t, chunk * 32 + lane % 4 * 8);
                mma(sum[t], low, features[0], features[1]);
                mma(sum[t], high, features[2], features[3]);
            }
        }
    }
    join_warps<TILES>(sum, rows, [&](int token, int n, float total) {
        if (first + n >= out) return;
        if (bias) total += to_float(bias[first + n]);
        size_t place = (size_t)token * out + first + n;
        if (wide) ((float*)y)[place] = total;
        else ((real_t*)y)[place] = to_real(total);
    });
}

#define SMALL_M_DENSE(TILES)                                                                                 \
    extern "C" __global__ void __launch_bounds__(32 * SMALL_M_WARPS) small_m_dense_##TILES(                      \
        void* y, const real_t* x, const real_t* w, const real_t* bias, int rows, int in, int out, int wide) { \
        small_m_dense<TILES>(y, x, w, bias, rows, in, out, wide);                                            \
    }

SMALL_M_DENSE(1)
SMALL_M_DENSE(2)

#endif
