// The largest logits of every row, taken one after the other: first of parts of the vocabulary, then of what those
// found. Keys order logits, and of equal ones the smaller id first.

/// Logits that a thread keeps; a block has 256 threads.
#define KEPT 16

__device__ __forceinline__ u64 top_key(float logit, u32 id) {
    u32 bits = __float_as_uint(logit);
    return (u64)(bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u)) << 32 | ~id;
}

__device__ __forceinline__ float top_logit(u64 key) {
    u32 bits = (u32)(key >> 32);
    return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

/// The largest key of a block of 256 threads, for all of them.
__device__ __forceinline__ u64 block_top(u64 key) {
    __shared__ u64 tops[8];
    for (int offset = 16; offset > 0; offset >>= 1) {
        u64 other = __shfl_xor_sync(FULL_WARP, key, offset);
        key = other > key ? other : key;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = key;
    __syncthreads();
    key = tops[0];
#pragma unroll
    for (int w = 1; w < 8; w++) key = tops[w] > key ? tops[w] : key;
    return key;
}

extern "C" __global__ void __launch_bounds__(256) top_logits_of_parts(
    u64* keys,                  // [rows, parts, count]
    float* masses,              // [rows, parts, 2]: the largest logit, and the part's mass relative to it
    const float* logits,        // [rows, vocab]
    int vocab, int count) {
    int part = blockIdx.x, parts = gridDim.x, row = blockIdx.y, first = part * 256 * KEPT + threadIdx.x;
    const float* mine = logits + (size_t)row * vocab;
    float kept[KEPT];
    u64 best = 0;
    start_next_early();
    await_previous();
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        int id = first + 256 * i;
        kept[i] = id < vocab ? mine[id] : -INFINITY_F;
        u64 key = id < vocab ? top_key(kept[i], id) : 0;
        best = key > best ? key : best;
    }
    float largest = 0.f;
    // Rounds begin below what the one before took.
    for (int round = 0; round < count; round++) {
        u64 top = block_top(best);
        if (round == 0) largest = top_logit(top);
        if (threadIdx.x == 0) keys[((size_t)row * parts + part) * count + round] = top;
        if (best != top) continue;
        best = 0;
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            int id = first + 256 * i;
            u64 key = id < vocab ? top_key(kept[i], id) : 0;
            if (key < top && key > best) best = key;
        }
    }
    float mass = 0.f;
#pragma unroll
    for (int i = 0; i < KEPT; i++) mass += first + 256 * i < vocab ? expf(kept[i] - largest) : 0.f;
    mass = block_sum(mass);
    float* found = masses + 2 * (row * parts + part);
    if (threadIdx.x == 0) found[0] = largest, found[1] = mass;
}

extern "C" __global__ void __launch_bounds__(256) top_logits_of_all(
    u32* best,                  // [rows, 2 count + 1]: ids and logits, and the mass of all
    const u64* keys,            // [rows, parts, count]
    const float* masses,        // [rows, parts, 2]
    int parts, int count) {
    extern __shared__ u64 found[];  // [parts * count]
    int row = blockIdx.x, total = parts * count;
    u32* mine = best + (size_t)row * (2 * count + 1);
    start_next_early();
    await_previous();
    for (int i = threadIdx.x; i < total; i += 256) found[i] = keys[(size_t)row * total + i];
    __syncthreads();
    float largest = 0.f;
    u64 top = ~0ull;
    for (int round = 0; round < count; round++) {
        u64 next = 0;
        for (int i = threadIdx.x; i < total; i += 256)
            if (found[i] < top && found[i] > next) next = found[i];
        top = block_top(next);
        if (round == 0) largest = top_logit(top);
        if (threadIdx.x == 0) mine[2 * round] = ~(u32)top, mine[2 * round + 1] = __float_as_uint(top_logit(top));
    }
    float mass = 0.f;
    for (int i = threadIdx.x; i < parts; i += 256) {
        const float* of_part = masses + 2 * (row * parts + i);
        mass += of_part[1] * expf(of_part[0] - largest);
    }
    mass = block_sum(mass);
    if (threadIdx.x == 0) mine[2 * count] = __float_as_uint(mass);
}
