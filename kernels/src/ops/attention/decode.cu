// Attention of one new token a sequence over its cache. A block takes one head and up to SPLIT keys; where a
// sequence has more, several blocks share it and a second kernel joins what they found.

#define SPLIT 512
#define DECODE_THREADS 256

/// Two f32 of a 16-bit pair, or of two f32.
#if F32
#define PER_READ 4
#else
#define PER_READ 8
#endif

/// PER_READ neighbouring values in 16 bytes.
__device__ __forceinline__ void read16(float (&x)[PER_READ], const real_t* source) {
#if F32
    float4 v = *(const float4*)source;
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
#else
    load8(x, source);
#endif
}

extern "C" __global__ void __launch_bounds__(DECODE_THREADS) attention_decode(
    real_t* y,             // [sequences, heads * head_dim]
    float* parts,          // [sequences, heads, splits, head_dim + 2] where splits > 1: sum, largest score, its weight
    const real_t* q,       // [sequences, heads * head_dim]
    const real_t* keys,    // cache
    const real_t* values,  // cache
    Batch batch, int heads, int kv_heads, int window, float scale, float cap, int head_dim) {
    extern __shared__ float decode_memory[];
    float* query = decode_memory;                  // [head_dim]
    float* weights = query + head_dim;      // [SPLIT]
    float* joined = weights + SPLIT;        // [groups, head_dim]
    u32* places = (u32*)(joined + DECODE_THREADS * PER_READ);  // [SPLIT]: rows of the cache
    int head = blockIdx.x, split = blockIdx.y, splits = gridDim.y, sequence = blockIdx.z;
    int kv_head = head / (heads / kv_heads), length = batch.context[sequence] + 1;
    int seen_from = window > 0 ? max(0, length - window) : 0;
    int first = max(split * SPLIT, seen_from), last = min(length, (split + 1) * SPLIT), count = max(0, last - first);
    size_t row = (size_t)sequence * heads + head;
    for (int i = threadIdx.x; i < head_dim; i += DECODE_THREADS) query[i] = to_float(q[row * head_dim + i]) * scale;
    for (int i = threadIdx.x; i < count; i += DECODE_THREADS) places[i] = (u32)key_row(batch, sequence, first + i);
    __syncthreads();
    float largest = -INFINITY_F;
    for (int i = threadIdx.x; i < count; i += DECODE_THREADS) {
        const real_t* key = keys + ((size_t)places[i] * kv_heads + kv_head) * head_dim;
        float score = 0.f;
        for (int d = 0; d < head_dim; d += PER_READ) {
            float k[PER_READ];
            read16(k, key + d);
#pragma unroll
            for (int j = 0; j < PER_READ; j++) score += k[j] * query[d + j];
        }
        if (cap != 0.f) score = soft_cap(score, cap);
        weights[i] = score;
        largest = fmaxf(largest, score);
    }
    largest = block_max(largest);
    float total = 0.f;
    for (int i = threadIdx.x; i < count; i += DECODE_THREADS) {
        float weight = expf(weights[i] - largest);
        weights[i] = weight;
        total += weight;
    }
    total = block_sum(total);
    __syncthreads();
    int readers = head_dim / PER_READ, groups = DECODE_THREADS / readers;
    int group = threadIdx.x / readers, d = threadIdx.x % readers * PER_READ;
    if (group < groups) {
        float sum[PER_READ] = {};
        for (int i = group; i < count; i += groups) {
            float v[PER_READ];
            read16(v, values + ((size_t)places[i] * kv_heads + kv_head) * head_dim + d);
#pragma unroll
            for (int j = 0; j < PER_READ; j++) sum[j] += weights[i] * v[j];
        }
#pragma unroll
        for (int j = 0; j < PER_READ; j++) joined[group * head_dim + d + j] = sum[j];
    }
    __syncthreads();
    float* part = parts + (row * splits + split) * (head_dim + 2);
    for (int i = threadIdx.x; i < head_dim; i += DECODE_THREADS) {
        float sum = 0.f;
        for (int g = 0; g < groups; g++) sum += joined[g * head_dim + i];
        if (splits == 1) y[row * head_dim + i] = to_real(sum / total);
        else part[i] = sum;
    }
    if (splits > 1 && threadIdx.x == 0) {
        part[head_dim] = largest;
        part[head_dim + 1] = total;
    }
}

/// Joins the splits of every head; one block a head and sequence.
extern "C" __global__ void attention_join(real_t* y, const float* parts, int splits, int head_dim) {
    const float* mine = parts + (size_t)blockIdx.x * splits * (head_dim + 2);
    float largest = -INFINITY_F, total = 0.f;
    for (int s = 0; s < splits; s++) largest = fmaxf(largest, mine[s * (head_dim + 2) + head_dim]);
    for (int s = 0; s < splits; s++)
        total += expf(mine[s * (head_dim + 2) + head_dim] - largest) * mine[s * (head_dim + 2) + head_dim + 1];
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
        float sum = 0.f;
        for (int s = 0; s < splits; s++)
            sum += expf(mine[s * (head_dim + 2) + head_dim] - largest) * mine[s * (head_dim + 2) + i];
        y[(size_t)blockIdx.x * head_dim + i] = to_real(sum / total);
    }
}
