// One new token a sequence, from the product q|k|v to the attention's output in one kernel: rotation, the new key and
// value into the cache, and attention over it. A block takes one head and a share of the keys; the last block of a
// head to come to its end joins what all of them found. What the cache holds already is fetched before the kernel
// that makes q|k|v has ended.

#if HOPPER && !F32

/// AHEAD is how many keys a lane reads before it uses the first.
template <int HEAD, int AHEAD>
__device__ void attention_step(
    real_t* y,           // [sequences, heads * HEAD]
    const real_t* qkv,   // [sequences, (heads + 2 kv_heads) * HEAD]
    real_t* keys,        // cache
    real_t* values,      // cache
    Batch batch, StepShape shape) {
    // Lanes that share a key, eight features each; and keys that the block reads at once.
    constexpr int SHARE = HEAD / 8, GROUPS = 32 * STEP_WARPS / SHARE, AT_ONCE = GROUPS * AHEAD;
    __shared__ __align__(16) real_t query[HEAD], new_key[HEAD], new_value[HEAD];
    int head = blockIdx.x, split = blockIdx.y, splits = gridDim.y, sequence = blockIdx.z;
    int kv_head = head / (shape.heads / shape.kv_heads), position = batch.context[sequence], length = position + 1;
    int group = threadIdx.x / SHARE, feature = threadIdx.x % SHARE * 8;
    Range range(shape.window > 0 ? max(0, length - shape.window) : 0, length, GROUPS);
    int from = range.from, to = range.to;
    start_next_early();

    // Keys are read anew as soon as the scores are there, values once they are weighed: some are always on their way.
    uint4 k[AHEAD] = {}, v[AHEAD] = {};
    // Of the keys read last; a cache of 2^32 places does not fit on a GPU.
    u32 places[AHEAD];
    auto find = [&](int first) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int key = first + i * GROUPS + group;
            places[i] = key < to ? (u32)key_row(batch, sequence, key) * shape.kv_heads + kv_head : ~0u;
        }
    };
    auto read = [&](uint4 (&x)[AHEAD], const real_t* cache) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (places[i] != ~0u) x[i] = *(const uint4*)(cache + (size_t)places[i] * HEAD + feature);
    };
    find(from);
    read(k, keys);
    read(v, values);
    Rotation<HEAD> rotation(position, shape);
    await_previous();

    step_inputs<HEAD>(query, new_key, new_value, qkv, sequence, head, kv_head, rotation, shape);
    __syncthreads();
    // One of the heads that share them writes them down.
    if (to == length && from < to && head % (shape.heads / shape.kv_heads) == 0 && threadIdx.x < HEAD / 8) {
        size_t at = (key_row(batch, sequence, position) * shape.kv_heads + kv_head) * HEAD + 8 * threadIdx.x;
        *(uint4*)(keys + at) = ((const uint4*)new_key)[threadIdx.x];
        *(uint4*)(values + at) = ((const uint4*)new_value)[threadIdx.x];
    }

    float q[8], sum[8] = {}, largest = -INFINITY_F, total = 0.f;
    load8(q, query + feature);
    float scale = shape.scale_at(position);
#pragma unroll
    for (int j = 0; j < 8; j++) q[j] *= scale;
    for (int first = from; first < to; first += AT_ONCE) {
        bool more = first + AT_ONCE < to;
        float score[AHEAD], most = largest;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int key = first + i * GROUPS + group;
            if (key == position) k[i] = *(const uint4*)(new_key + feature);
            float x[8], dot = 0.f;
            load8(x, (const real_t*)&k[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) dot += x[j] * q[j];
#pragma unroll
            for (int offset = SHARE / 2; offset > 0; offset >>= 1) dot += __shfl_xor_sync(FULL_WARP, dot, offset);
            if (shape.variant.cap != 0.f) dot = SoftCap(shape.variant.cap, 1.f).of(dot);
            score[i] = key < to ? dot : -INFINITY_F;
            most = fmaxf(most, score[i]);
        }
        if (more) {
            find(first + AT_ONCE);
            read(k, keys);
        }
        // A group without a key yet has nothing to correct.
        float correction = largest == -INFINITY_F ? 0.f : expf(largest - most);
        largest = most;
        total *= correction;
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] *= correction;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (first + i * GROUPS + group == position) v[i] = *(const uint4*)(new_value + feature);
            float x[8], weight = score[i] == -INFINITY_F ? 0.f : expf(score[i] - largest);
            load8(x, (const real_t*)&v[i]);
            total += weight;
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += weight * x[j];
        }
        if (more) read(v, values);
    }
    join_step<HEAD, 8>(y, sum, largest, total, head, split, splits, sequence, shape);
}

/// Llama's: known to the compiler, which leaves out what it does not need.
#define PLAIN(HEAD) Variant{HEAD, 0, 1.f, 0.f, 1, 0.f}
#define GENERAL(HEAD) Variant{turned, neighbours, stretch, beta, original, cap}

// With few blocks, two on a multiprocessor, each reads far ahead; many are themselves what hides the waiting.
#define ATTENTION_STEP(NAME, HEAD, AHEAD, BLOCKS, VARIANT)                                                         \
    extern "C" __global__ void __launch_bounds__(32 * STEP_WARPS, BLOCKS) NAME##_##HEAD(                           \
        real_t* y, const real_t* qkv, real_t* keys, real_t* values, Batch batch,                                   \
        const float* inv_freq, const real_t* q_norm, const real_t* k_norm, const u32* place, int heads,            \
        int kv_heads, int window, float eps, float scale, int panel_tokens, float* found, u32* arrived,            \
        int turned, int neighbours, float stretch, float beta, u32 original, float cap) {                          \
        attention_step<HEAD, AHEAD>(y, qkv, keys, values, batch,                                                   \
                                    StepShape{inv_freq, q_norm, k_norm, place, heads, kv_heads, window, eps,       \
                                              scale, panel_tokens, {found, arrived}, VARIANT(HEAD)});              \
    }
#define ATTENTION_STEPS(HEAD)                                 \
    ATTENTION_STEP(attention_step, HEAD, 4, 2, PLAIN)         \
    ATTENTION_STEP(attention_steps, HEAD, 3, 4, PLAIN)        \
    ATTENTION_STEP(attention_step_any, HEAD, 4, 2, GENERAL)   \
    ATTENTION_STEP(attention_steps_any, HEAD, 3, 4, GENERAL)

ATTENTION_STEPS(16)
ATTENTION_STEPS(32)
ATTENTION_STEPS(64)
ATTENTION_STEPS(128)

#endif
