// What the two kinds of step.cu and step_int8.cu have in common: rotation of the query and the new key, and how what blocks,
// warps and lanes found becomes one result.

#if HOPPER && !F32

#define STEP_WARPS 8
/// Blocks of a head at most.
#define STEP_SPLITS 8

/// What the blocks of a head leave for the one that joins it, where it has several.
struct Shares {
    float* found;  // [sequences, heads, splits, head_dim + 2]: sums, largest score and weight
    u32* arrived;  // [sequences, heads]: blocks that have; 0 between two kernels
};

/// How a family's attention may differ from Llama's.
struct Variant {
    int turned, neighbours;  // features of a head that are turned, and whether those of a pair are neighbours
    float stretch;           // of sines and cosines
    float beta;              // 0, or queries grow: see `query_growth`
    u32 original;
    float cap;               // 0, or what scores are held below
};

struct StepShape {
    const float* inv_freq;  // [head_dim / 2]
    const real_t* q_norm;   // [head_dim] or null
    const real_t* k_norm;   // [head_dim] or null
    const u32* place;       // [heads * head_dim] or null: column of y where a feature goes
    int heads, kv_heads, window;
    float eps, scale;
    int panel_tokens;
    Shares shares;
    Variant variant;

    /// What scores of a query at this position are multiplied by.
    __device__ __forceinline__ float scale_at(int position) const {
        return variant.beta == 0.f ? scale : scale * query_growth(position, variant.beta, variant.original);
    }
};

/// How many blocks have arrived before this one, whose threads have all stored what they found. The last one finds
/// what all of them have.
__device__ __forceinline__ u32 arrive(u32* arrived) {
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
    return before;
}

/// The keys of a block, `[from, to)` of those from `first` on: shares are equal to `unit` keys.
struct Range {
    int from, to;

    __device__ __forceinline__ Range(int first, int length, int unit) {
        int splits = gridDim.y, each = ((length - first + splits - 1) / splits + unit - 1) / unit * unit;
        from = first + blockIdx.y * each, to = min(length, from + each);
    }
};

/// By how much the pairs of features of a lane are rotated, in the warps that rotate: known before the features are.
template <int HEAD>
struct Rotation {
    static constexpr int PAIRS = (HEAD / 2 + 31) / 32;
    float sine[PAIRS], cosine[PAIRS];

    __device__ __forceinline__ Rotation(int position, const StepShape& shape) {
        if (threadIdx.x >= 64) return;
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            int i = 32 * p + threadIdx.x % 32;
            bool turns = i < shape.variant.turned / 2;
            sincosf(turns ? position * shape.inv_freq[i] : 0.f, &sine[p], &cosine[p]);
            if (turns) sine[p] *= shape.variant.stretch, cosine[p] *= shape.variant.stretch;
        }
    }

    /// The features of pair i: what is not turned is in pairs of neighbours.
    static __device__ __forceinline__ int2 pair(int i, const StepShape& shape) {
        bool apart = !shape.variant.neighbours && i < shape.variant.turned / 2;
        return apart ? make_int2(i, i + shape.variant.turned / 2) : make_int2(2 * i, 2 * i + 1);
    }
};

/// A head's features, normed where the model does so and rotated, by one warp.
template <int HEAD>
__device__ __forceinline__ void rotate_head(real_t* target, const real_t* x, const real_t* norm,
                                            const Rotation<HEAD>& rotation, const StepShape& shape) {
    int lane = threadIdx.x % 32;
    float factor = 1.f;
    if (norm) {
        float sum = 0.f;
        for (int i = lane; i < HEAD; i += 32) sum += to_float(x[i]) * to_float(x[i]);
        factor = rsqrtf(warp_sum(sum) / HEAD + shape.eps);
    }
#pragma unroll
    for (int p = 0; p < Rotation<HEAD>::PAIRS; p++) {
        int i = 32 * p + lane;
        if (i >= HEAD / 2) continue;
        int2 at = Rotation<HEAD>::pair(i, shape);
        float a = to_float(x[at.x]) * factor, b = to_float(x[at.y]) * factor;
        if (norm) {
            a *= to_float(norm[at.x]);
            b *= to_float(norm[at.y]);
        }
        target[at.x] = to_real(a * rotation.cosine[p] - b * rotation.sine[p]);
        target[at.y] = to_real(b * rotation.cosine[p] + a * rotation.sine[p]);
    }
}

/// The query of a head, and the new key and value that it shares, by a warp each.
template <int HEAD>
__device__ __forceinline__ void step_inputs(real_t* query, real_t* new_key, real_t* new_value, const real_t* qkv,
                                            int sequence, int head, int kv_head, const Rotation<HEAD>& rotation,
                                            const StepShape& shape) {
    const real_t* row = qkv + (size_t)sequence * (shape.heads + 2 * shape.kv_heads) * HEAD;
    const real_t* key_part = row + (shape.heads + kv_head) * HEAD;
    int warp = threadIdx.x / 32;
    if (warp == 0) rotate_head<HEAD>(query, row + head * HEAD, shape.q_norm, rotation, shape);
    if (warp == 1) rotate_head<HEAD>(new_key, key_part, shape.k_norm, rotation, shape);
    if (warp == 2)
        for (int i = threadIdx.x % 32; i < HEAD; i += 32) new_value[i] = key_part[shape.kv_heads * HEAD + i];
}

/// Joins what the groups of lanes, the warps and the blocks of a head found: a lane brings the sums of EACH features,
/// and its group's largest score and weight.
template <int HEAD, int EACH>
__device__ __forceinline__ void join_step(real_t* y, float (&sum)[EACH], float largest, float total, int head,
                                          int split, int splits, int sequence, const StepShape& shape) {
    constexpr int SHARE = HEAD / EACH;
    __shared__ float sums[STEP_WARPS][HEAD], largest_of[STEP_WARPS], weight_of[STEP_WARPS];
    __shared__ bool last;
    int warp = threadIdx.x / 32, feature = threadIdx.x % SHARE * EACH, i = threadIdx.x;
    // Looked up before it is needed.
    int column = head * HEAD + i, place = shape.place && i < HEAD ? shape.place[column] : column;
    // Warps' shares, rescaled to the largest score of all.
    for (int offset = SHARE; offset < 32; offset <<= 1) {
        float other = __shfl_xor_sync(FULL_WARP, largest, offset), most = fmaxf(largest, other);
        float mine = most == -INFINITY_F ? 0.f : expf(largest - most);
        largest = most;
        total *= mine;
        total += __shfl_xor_sync(FULL_WARP, total, offset);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            sum[j] *= mine;
            sum[j] += __shfl_xor_sync(FULL_WARP, sum[j], offset);
        }
    }
    if (threadIdx.x % 32 == 0) largest_of[warp] = largest;
    __syncthreads();
    float most = -INFINITY_F;
#pragma unroll
    for (int w = 0; w < STEP_WARPS; w++) most = fmaxf(most, largest_of[w]);
    float mine = largest == -INFINITY_F ? 0.f : expf(largest - most);
    if (threadIdx.x % 32 < SHARE)
#pragma unroll
        for (int j = 0; j < EACH; j++) sums[warp][feature + j] = sum[j] * mine;
    if (threadIdx.x % 32 == 0) weight_of[warp] = total * mine;
    __syncthreads();
    float value = 0.f, all = 0.f;
#pragma unroll
    for (int w = 0; w < STEP_WARPS; w++) all += weight_of[w], value += i < HEAD ? sums[w][i] : 0.f;
    if (splits > 1) {
        int row = sequence * shape.heads + head;
        float* found = shape.shares.found + (size_t)row * splits * (HEAD + 2);
        float* mine = found + split * (HEAD + 2);
        if (i < HEAD) mine[i] = value;
        if (i == 0) mine[HEAD] = most, mine[HEAD + 1] = all;
        __syncthreads();
        if (i == 0) last = arrive(shape.shares.arrived + row) == splits - 1;
        __syncthreads();
        if (!last) return;
        if (i == 0) shape.shares.arrived[row] = 0;
        if (i < HEAD) {
            float mosts[STEP_SPLITS], values[STEP_SPLITS], weights[STEP_SPLITS];
            // All asked for at once.
#pragma unroll
            for (int s = 0; s < STEP_SPLITS; s++) {
                bool there = s < splits;
                mosts[s] = there ? __ldcg(found + s * (HEAD + 2) + HEAD) : -INFINITY_F;
                values[s] = there ? __ldcg(found + s * (HEAD + 2) + i) : 0.f;
                weights[s] = there ? __ldcg(found + s * (HEAD + 2) + HEAD + 1) : 0.f;
            }
            most = -INFINITY_F, value = all = 0.f;
#pragma unroll
            for (int s = 0; s < STEP_SPLITS; s++) most = fmaxf(most, mosts[s]);
#pragma unroll
            for (int s = 0; s < STEP_SPLITS; s++) {
                float factor = mosts[s] == -INFINITY_F ? 0.f : expf(mosts[s] - most);
                value += factor * values[s];
                all += factor * weights[s];
            }
        }
    }
    if (i < HEAD) {
        size_t at = shape.panel_tokens ? panel_place(sequence, place, shape.panel_tokens)
                                       : (size_t)sequence * shape.heads * HEAD + place;
        y[at] = to_real(value / all);
    }
}

#endif
