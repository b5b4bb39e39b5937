// A KV cache of bytes: value = code * scale, with an f32 scale for every token and head. Of a block each head's 16 rows
// lie together, [block][kv_head][16 rows][head_dim] codes and [block][kv_head][16 rows] scales, so that a head reads
// them in one piece. Keys' codes are signed bytes, which the integer dot product takes as they are; values' codes are
// kept plus VALUE_BIAS, which makes them the last bits of a float without a conversion.

#define VALUE_BIAS 128

struct CodedCache {
    u8 *keys, *values;
    float *key_scales, *value_scales;
};

/// The scale of a head's features, and what a feature is multiplied by to become a code.
struct Unit {
    float scale, inverse;
};

/// From the largest of the features that each lane of a warp has.
__device__ __forceinline__ Unit unit_of(float largest) {
    largest = warp_max(largest);
    // 127 divided by less would be infinite.
    if (!(largest > 1e-30f)) return Unit{0.f, 0.f};
    return Unit{largest / 127.f, 127.f / largest};
}

/// -127 to 127, ties to even.
__device__ __forceinline__ int code_of(float x, Unit unit) { return __float2int_rn(x * unit.inverse); }

/// A head's features as codes plus `bias`, by one warp; all lanes get the scale.
__device__ __forceinline__ float code_head(u8* codes, const real_t* x, int head_dim, int bias) {
    int lane = threadIdx.x % 32;
    float largest = 0.f;
    for (int i = lane; i < head_dim; i += 32) largest = fmaxf(largest, fabsf(to_float(x[i])));
    Unit unit = unit_of(largest);
    for (int i = lane; i < head_dim; i += 32) codes[i] = (u8)(code_of(to_float(x[i]), unit) + bias);
    return unit.scale;
}

/// Where a head's part of a cache row is, in scales; times head_dim, in codes.
__device__ __forceinline__ size_t coded_place(size_t row, int kv_heads, int kv_head) {
    return (row / KV_BLOCK_ROWS * kv_heads + kv_head) * KV_BLOCK_ROWS + row % KV_BLOCK_ROWS;
}

/// Stores the batch's keys and values at their rows of the cache; one block a token, one warp a head at a time.
extern "C" __global__ void kv_append_int8(
    CodedCache cache,
    const real_t* k,     // [tokens, kv_heads * head_dim]
    const real_t* v,     // [tokens, kv_heads * head_dim]
    const u32* slots,    // [tokens]: row in the cache
    int kv_heads, int head_dim) {
    int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int head = warp; head < kv_heads; head += warps) {
        size_t from = ((size_t)blockIdx.x * kv_heads + head) * head_dim;
        size_t to = coded_place(slots[blockIdx.x], kv_heads, head);
        float key_scale = code_head(cache.keys + to * head_dim, k + from, head_dim, 0);
        float value_scale = code_head(cache.values + to * head_dim, v + from, head_dim, VALUE_BIAS);
        if (lane == 0) {
            cache.key_scales[to] = key_scale;
            cache.value_scales[to] = value_scale;
        }
    }
}

/// Values of eight neighbouring codes.
__device__ __forceinline__ void decode8(real_t* target, const u8* codes, float scale, bool biased) {
    uint2 words = *(const uint2*)codes;
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u32 byte = (i < 4 ? words.x : words.y) >> (i % 4 * 8) & 255;
        x[i] = scale * (float)(biased ? (int)byte - VALUE_BIAS : (int)(signed char)byte);
    }
    store8(target, x);
}

/// Keys and values of the blocks that a batch sees, as kernels without codes want them: the rows of a cache like this
/// one, in the compute type. Sequences along z, heads along y; blocks of threads along x share a sequence's blocks,
/// however many there are.
extern "C" __global__ void kv_decode_int8(
    real_t* keys,      // [cache rows, kv_heads * head_dim]
    real_t* values,    // [cache rows, kv_heads * head_dim]
    CodedCache cache, Batch batch, int kv_heads, int head_dim, int window) {
    int sequence = blockIdx.z, kv_head = blockIdx.y, pieces = head_dim / 8;
    int context = batch.context[sequence], length = context + batch.rows[sequence];
    int seen_from = window > 0 ? max(0, context + 1 - window) : 0;
    const u32* table = batch.table + batch.table_start[sequence];
    for (int b = seen_from / KV_BLOCK_ROWS + blockIdx.x; b * KV_BLOCK_ROWS < length; b += gridDim.x) {
        size_t row = (size_t)table[b] * KV_BLOCK_ROWS, place = coded_place(row, kv_heads, kv_head);
        for (int i = threadIdx.x; i < KV_BLOCK_ROWS * pieces; i += blockDim.x) {
            int inside = i / pieces, feature = i % pieces * 8;
            size_t from = place + inside, to = ((row + inside) * kv_heads + kv_head) * head_dim + feature;
            decode8(keys + to, cache.keys + from * head_dim + feature, cache.key_scales[from], false);
            decode8(values + to, cache.values + from * head_dim + feature, cache.value_scales[from], true);
        }
    }
}
