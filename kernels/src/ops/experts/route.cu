// The router's choice, and rows of activations that go to experts and come back.

/// A number as bits that are ordered as it is; what is none comes before all.
__device__ __forceinline__ u32 ordered(float x) {
    u32 bits = __float_as_uint(x);
    return x != x ? 1 : bits >> 31 ? ~bits : bits | 1u << 31;
}

/// The index of the largest value that was not taken, of equal ones the lowest; by one warp, which takes it. There must be
/// one.
__device__ __forceinline__ u32 take_largest(const float* values, u32* taken, int count) {
    u64 best = 0;
    for (int i = threadIdx.x; i < count; i += 32) {
        u64 key = (u64)ordered(values[i]) << 32 | (0xFFFFFFFFu - i);
        if (!taken[i] && key > best) best = key;
    }
    for (int offset = 16; offset > 0; offset >>= 1) {
        u64 other = __shfl_xor_sync(FULL_WARP, best, offset);
        if (other > best) best = other;
    }
    u32 index = 0xFFFFFFFFu - (u32)best;
    if (threadIdx.x == 0) taken[index] = 1;
    __syncwarp();
    return index;
}

/// The sum of a group's two largest values.
__device__ __forceinline__ float best_two(const float* values, int count) {
    float first = -INFINITY_F, second = -INFINITY_F;
    for (int i = 0; i < count; i++) {
        float x = values[i];
        second = fmaxf(second, fminf(first, x));
        first = fmaxf(first, x);
    }
    return count > 1 ? first + second : first;
}

/// Experts of a token and their weights; one warp a token.
extern "C" __global__ void __launch_bounds__(32) route(
    u32* chosen_experts,   // [tokens, per_token]
    float* weights,        // [tokens, per_token]
    const float* scores,   // [tokens, experts]
    const float* bias,     // [experts] or null
    int experts, int per_token, int sigmoid, int renormalise, float added, int groups, int groups_kept, float factor) {
    extern __shared__ float route_memory[];
    float* p = route_memory;                  // [experts]
    float* chooses = p + experts;             // [experts]
    float* sums = chooses + experts;          // [groups]
    u32* taken = (u32*)(sums + groups);       // [experts]
    u32* kept = taken + experts;              // [groups]
    int lane = threadIdx.x, size = experts / groups;
    start_next_early();
    await_previous();
    const float* row = scores + (size_t)blockIdx.x * experts;
    chosen_experts += (size_t)blockIdx.x * per_token, weights += (size_t)blockIdx.x * per_token;
    float largest = -INFINITY_F, total = 0.f;
    for (int i = lane; i < experts; i += 32) largest = fmaxf(largest, row[i]);
    largest = warp_max(largest);
    for (int i = lane; i < experts; i += 32) {
        p[i] = sigmoid ? 1.f / (1.f + expf(-row[i])) : expf(row[i] - largest);
        total += p[i];
    }
    total = sigmoid ? 1.f : warp_sum(total);
    for (int i = lane; i < experts; i += 32) {
        p[i] /= total;
        chooses[i] = bias ? p[i] + bias[i] : p[i];
        taken[i] = 0;
    }
    for (int g = lane; g < groups; g += 32) kept[g] = 0;
    __syncwarp();
    if (groups > 1) {
        for (int g = lane; g < groups; g += 32) sums[g] = best_two(chooses + g * size, size);
        __syncwarp();
        for (int i = 0; i < groups_kept; i++) take_largest(sums, kept, groups);
        for (int i = lane; i < experts; i += 32)
            if (!kept[i / size]) chooses[i] = -INFINITY_F;
        __syncwarp();
    }
    float sum = 0.f;
    for (int i = 0; i < per_token; i++) {
        u32 expert = take_largest(chooses, taken, experts);
        sum += p[expert];
        if (lane == 0) chosen_experts[i] = expert, weights[i] = p[expert];
    }
    if (renormalise) factor /= sum + added;
    if (lane == 0)
        for (int i = 0; i < per_token; i++) weights[i] *= factor;
}

/// y[rows[i]] += weights[i] part[i]; one block a row of `part`.
extern "C" __global__ void scatter_add(real_t* y, const real_t* part, const u32* rows, const float* weights, int width) {
    real_t* target = y + (size_t)rows[blockIdx.x] * width;
    const real_t* from = part + (size_t)blockIdx.x * width;
    float weight = weights[blockIdx.x];
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        target[i] = to_real(to_float(target[i]) + weight * to_float(from[i]));
}

/// y[i] = weights[i] x[i]; one block a row.
extern "C" __global__ void weigh_rows(real_t* y, const real_t* x, const float* weights, int width) {
    size_t first = (size_t)blockIdx.x * width;
    float weight = weights[blockIdx.x];
    for (int i = threadIdx.x; i < width; i += blockDim.x) y[first + i] = to_real(weight * to_float(x[first + i]));
}

/// y[t] = a[t] + sigmoid(gate[t]) b[t]; one block a token.
extern "C" __global__ void add_gated(real_t* y, const real_t* a, const real_t* b, const float* gate, int width) {
    start_next_early();
    await_previous();
    size_t first = (size_t)blockIdx.x * width;
    float weight = 1.f / (1.f + expf(-gate[blockIdx.x]));
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        y[first + i] = to_real(to_float(a[first + i]) + weight * to_float(b[first + i]));
}
