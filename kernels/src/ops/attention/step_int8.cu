// The step of step.cu over a cache of bytes. It is bound by what it reads only where few instructions fall to a byte:
// scores are integer dot products, with the query in 16 bits as two bytes a feature; values' codes are put into
// floats by their place in the word, and the weights' sum takes out what that adds.

#if HOPPER && !F32

/// Features that a lane has of a key.
#define CODED_EACH 16
/// 2^15 as a float, whose bits 8 to 15 are the last ones before the point: the code is put there.
#define CODE_FLOAT 32768.f
/// How far a score may exceed what weights are relative to, as a power of two, before all are made smaller.
#define HEADROOM 8.f

/// The query's features as 16-bit numbers of which one is `unit`: 256 high + low.
template <int HEAD>
struct CodedStep {
    real_t query[HEAD], new_key[HEAD], new_value[HEAD];
    u8 high[HEAD], low[HEAD], key[HEAD], value[HEAD];
    float unit, key_scale, value_scale;
    u32 base;  // of code_float: read from here the compiler does not know it, and the place of a byte is its constant
};

/// Those of neighbouring keys, which one access reads.
template <int COUNT>
struct __align__(4 * COUNT) Scales {
    float of[COUNT];
};

/// By one warp. Scores that come of it are exponents of two.
template <int HEAD>
__device__ __forceinline__ void code_query(CodedStep<HEAD>& step, float scale) {
    int lane = threadIdx.x % 32;
    float largest = 0.f;
    for (int i = lane; i < HEAD; i += 32) largest = fmaxf(largest, fabsf(to_float(step.query[i])));
    Unit unit = unit_of(largest);
    for (int i = lane; i < HEAD; i += 32) {
        // At most 127 * 256, so that neither half overflows.
        int x = __float2int_rn(to_float(step.query[i]) * unit.inverse * 256.f), high = (x + 128) >> 8;
        step.high[i] = (u8)high;
        step.low[i] = (u8)(x - 256 * high);
    }
    step.base = __float_as_uint(CODE_FLOAT);
    if (lane == 0) step.unit = unit.scale / 256.f * scale * 1.44269504f;
}

__device__ __forceinline__ int dot4(u32 a, u32 b, int sum) {
    asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}

/// CODE_FLOAT plus byte `i` of `codes`; `base`: the bits of CODE_FLOAT.
__device__ __forceinline__ float code_float(u32 codes, u32 base, int i) {
    return __uint_as_float(__byte_perm(codes, base, 0x7404 + (i << 4)));
}

/// AHEAD is how many neighbouring keys a lane reads at once; they lie in one block.
template <int HEAD, int AHEAD>
__device__ void attention_step_int8(real_t* y, const real_t* qkv, CodedCache cache, Batch batch, StepShape shape) {
    constexpr int SHARE = HEAD / CODED_EACH, GROUPS = 32 * STEP_WARPS / SHARE, AT_ONCE = GROUPS * AHEAD;
    constexpr int WORDS = CODED_EACH / 4;
    __shared__ __align__(16) CodedStep<HEAD> step;
    int head = blockIdx.x, split = blockIdx.y, splits = gridDim.y, sequence = blockIdx.z;
    int kv_head = head / (shape.heads / shape.kv_heads), position = batch.context[sequence], length = position + 1;
    int feature = threadIdx.x % SHARE * CODED_EACH, own = threadIdx.x / SHARE * AHEAD;
    int seen_from = shape.window > 0 ? max(0, length - shape.window) : 0;
    Range range(seen_from / AHEAD * AHEAD, length, 4 * AHEAD);
    int from = range.from, to = range.to;
    start_next_early();

    // Keys and their scales are read anew as soon as the scores are there, values once they are weighed: some are
    // always on their way.
    u32 k[AHEAD][WORDS] = {}, v[AHEAD][WORDS] = {};
    Scales<AHEAD> k_scale = {}, v_scale = {};
    const u32* table = batch.table + batch.table_start[sequence];
    // As coded_place has it; a cache of 2^32 places does not fit on a GPU.
    auto place_of = [&](u32 key) {
        return (table[key / KV_BLOCK_ROWS] * shape.kv_heads + kv_head) * KV_BLOCK_ROWS + key % KV_BLOCK_ROWS;
    };
    auto read = [&](u32 (&x)[AHEAD][WORDS], Scales<AHEAD>& scale, const u8* codes, const float* scales, u32 at) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) *(uint4*)x[i] = *(const uint4*)(codes + (size_t)at * HEAD + i * HEAD + feature);
        scale = *(const Scales<AHEAD>*)(scales + at);
    };
    u32 at = 0;
    if (from + own < to) {
        at = place_of(from + own);
        read(k, k_scale, cache.keys, cache.key_scales, at);
        read(v, v_scale, cache.values, cache.value_scales, at);
    }
    Rotation<HEAD> rotation(position, shape);
    await_previous();

    step_inputs<HEAD>(step.query, step.new_key, step.new_value, qkv, sequence, head, kv_head, rotation, shape);
    int warp = threadIdx.x / 32;
    __syncwarp();
    if (warp == 0) code_query(step, shape.scale_at(position));
    if (warp == 1) step.key_scale = code_head(step.key, step.new_key, HEAD, 0);
    if (warp == 2) step.value_scale = code_head(step.value, step.new_value, HEAD, VALUE_BIAS);
    __syncthreads();
    // One of the heads that share them writes them down.
    if (to == length && from < to && head % (shape.heads / shape.kv_heads) == 0 && threadIdx.x < HEAD / 16) {
        u32 place = place_of(position);
        ((uint4*)(cache.keys + (size_t)place * HEAD))[threadIdx.x] = ((const uint4*)step.key)[threadIdx.x];
        ((uint4*)(cache.values + (size_t)place * HEAD))[threadIdx.x] = ((const uint4*)step.value)[threadIdx.x];
        if (threadIdx.x == 0) cache.key_scales[place] = step.key_scale, cache.value_scales[place] = step.value_scale;
    }

    u32 high[WORDS], low[WORDS];
    *(uint4*)high = *(const uint4*)(step.high + feature);
    *(uint4*)low = *(const uint4*)(step.low + feature);
    u32 base = step.base;
    float unit = step.unit, sum[CODED_EACH] = {}, largest = -INFINITY_F, total = 0.f;
    for (int first = from; first < to; first += AT_ONCE) {
        int key = first + own;
        bool more = key + AT_ONCE < to;
        float score[AHEAD], most = -INFINITY_F;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (key + i == position) {
                *(uint4*)k[i] = *(const uint4*)(step.key + feature);
                k_scale.of[i] = step.key_scale;
            }
            int coarse = 0, fine = 0;
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                coarse = dot4(k[i][w], high[w], coarse);
                fine = dot4(k[i][w], low[w], fine);
            }
            int dot = 256 * coarse + fine;
#pragma unroll
            for (int offset = SHARE / 2; offset > 0; offset >>= 1) dot += __shfl_xor_sync(FULL_WARP, dot, offset);
            bool seen = key + i >= seen_from && key + i < to;
            float found = (float)dot * (unit * k_scale.of[i]);
            if (shape.variant.cap != 0.f) found = SoftCap(shape.variant.cap, 0.693147181f).of(found);
            score[i] = seen ? found : -INFINITY_F;
            most = fmaxf(most, score[i]);
        }
        if (more) {
            at = place_of(key + AT_ONCE);
            read(k, k_scale, cache.keys, cache.key_scales, at);
        }
        if (most > largest + HEADROOM) {
            float correction = exp2_fast(largest - most);
            largest = most;
            total *= correction;
#pragma unroll
            for (int j = 0; j < CODED_EACH; j++) sum[j] *= correction;
        }
        float weight[AHEAD], added = 0.f;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (key + i == position) {
                *(uint4*)v[i] = *(const uint4*)(step.value + feature);
                v_scale.of[i] = step.value_scale;
            }
            // What is beyond the end of a sequence has any scale.
            bool seen = score[i] != -INFINITY_F;
            weight[i] = seen ? exp2_fast(score[i] - largest) : 0.f;
            total += weight[i];
            weight[i] = seen ? weight[i] * v_scale.of[i] : 0.f;
            added -= weight[i] * (CODE_FLOAT + VALUE_BIAS);
        }
#pragma unroll
        for (int j = 0; j < CODED_EACH; j++) {
            float part = added;
#pragma unroll
            for (int i = 0; i < AHEAD; i++) part += weight[i] * code_float(v[i][j / 4], base, j % 4);
            sum[j] += part;
        }
        if (more) read(v, v_scale, cache.values, cache.value_scales, at);
    }
    // From powers of two to those of e.
    largest *= 0.693147181f;
    join_step<HEAD, CODED_EACH>(y, sum, largest, total, head, split, splits, sequence, shape);
}

// As in step.cu, but for a lane having twice the features of fewer keys. Two blocks of the first kind are to fit on a
// multiprocessor; with narrow heads, where a lane shares a key with few others, four of the second would spill.
#define ATTENTION_STEP_INT8(NAME, HEAD, AHEAD, BLOCKS, VARIANT)                                                    \
    extern "C" __global__ void __launch_bounds__(32 * STEP_WARPS, BLOCKS) NAME##_int8_##HEAD(                      \
        real_t* y, const real_t* qkv, CodedCache cache, Batch batch, const float* inv_freq, const real_t* q_norm,  \
        const real_t* k_norm, const u32* place, int heads, int kv_heads, int window, float eps, float scale,       \
        int panel_tokens, float* found, u32* arrived, int turned, int neighbours, float stretch, float beta,       \
        u32 original, float cap) {                                                                                 \
        attention_step_int8<HEAD, AHEAD>(y, qkv, cache, batch,                                                     \
                                         StepShape{inv_freq, q_norm, k_norm, place, heads, kv_heads, window, eps,  \
                                                   scale, panel_tokens, {found, arrived}, VARIANT(HEAD)});         \
    }
#define ATTENTION_STEPS_INT8(HEAD, BLOCKS)                              \
    ATTENTION_STEP_INT8(attention_step, HEAD, 4, 2, PLAIN)              \
    ATTENTION_STEP_INT8(attention_steps, HEAD, 2, BLOCKS, PLAIN)        \
    ATTENTION_STEP_INT8(attention_step_any, HEAD, 4, 2, GENERAL)        \
    ATTENTION_STEP_INT8(attention_steps_any, HEAD, 2, BLOCKS, GENERAL)

ATTENTION_STEPS_INT8(16, 3)
ATTENTION_STEPS_INT8(32, 4)
ATTENTION_STEPS_INT8(64, 4)
ATTENTION_STEPS_INT8(128, 4)

#endif
