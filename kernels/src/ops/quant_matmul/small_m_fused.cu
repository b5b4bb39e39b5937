// What surrounds the product of `small_m.cu` in a model: the norm on the way in, and on the way out the sums of all warps,
// biases, residuals and gates.

#if !F32

/// Warps of a block; and tiles, times rows, whose sums wait to be stored together.
#if HOPPER
#define STREAM_WARPS 16
#define WAITING 16
#else
#define STREAM_WARPS 12
#define WAITING 8
#endif

/// Rows of the input that are normed at once.
#define NORMED_ROWS 4
/// Features of a gap behind each portion of a normed input. Features that are stored at once often have about the
/// same place in different groups, and would all go to a few banks of shared memory.
#define GAP 8

/// The input: as it is, or a residual stream still to be normed and brought into the weight's order.
struct Input {
    const real_t* x;     // [rows, in]
    const real_t* norm;  // [in] or null
    const u32* place;    // [in] or null: where the product wants a feature of a normed input
    float eps;
};

/// What is done with the outputs before they are stored.
struct Finish {
    const real_t* bias;      // [out] or null
    const real_t* residual;  // [rows, out] or null: added
    int gated;               // outputs g and g + 8 of a tile are a gate and what it gates
    Gate gate;

    /// The logarithm of a tile's outputs.
    __device__ __forceinline__ int shift() const { return gated ? 3 : 4; }
};

/// Eight features of a thread, of up to NORMED_ROWS rows, on their way into shared memory. Of rows that are longer than
/// that, the rest is read when it is needed.
struct Staging {
    /// Features that all threads have, eight each.
    static constexpr int REACH = 8 * 32 * STREAM_WARPS;
    uint4 weights, places[2], values[NORMED_ROWS];
    float per_feature;

    /// What is known before the input is.
    __device__ Staging(Input input, int in) {
        int i = 8 * threadIdx.x;
        per_feature = 1.f / in;
        if (!input.norm || i >= in) return;
        weights = *(const uint4*)(input.norm + i);
        if (!input.place) return;
        places[0] = ((const uint4*)(input.place + i))[0], places[1] = ((const uint4*)(input.place + i))[1];
    }

    /// Asks for rows from `first` on.
    __device__ __forceinline__ void load(Input input, int first, int rows, int in) {
        int i = 8 * threadIdx.x;
#pragma unroll
        for (int t = 0; t < NORMED_ROWS; t++) {
            values[t] = make_uint4(0, 0, 0, 0);
            if (first + t < rows && i < in) values[t] = *(const uint4*)(input.x + (size_t)(first + t) * in + i);
        }
    }

    /// rms_norm of the rows, of which the first are loaded, with the features where the weight wants them.
    template <int SPAN>
    __device__ __forceinline__ void stage(real_t* target, Input input, int rows, int in, int stride) {
        // Of each warp, summed by all: a barrier instead of two for each row.
        __shared__ __align__(16) float squares[8][STREAM_WARPS];
        for (int first = 0; first < rows; first += NORMED_ROWS) {
            if (first > 0) load(input, first, rows, in);
#pragma unroll
            for (int t = 0; t < NORMED_ROWS; t++) {
                if (first + t >= rows) break;
                float sum = warp_sum(square(values[t]));
                if (threadIdx.x % 32 == 0) squares[first + t][threadIdx.x / 32] = sum;
            }
            if (in > REACH) add_rest(squares, input, first, rows, in);
            __syncthreads();
#pragma unroll
            for (int t = 0; t < NORMED_ROWS; t++) {
                if (first + t >= rows || 8 * threadIdx.x >= in) break;
                float factor = rsqrtf(total(squares[first + t]) * per_feature + input.eps);
                place<SPAN>(target + (first + t) * stride, 8 * threadIdx.x, values[t], factor, weights, input.place,
                            places[0], places[1]);
            }
            if (in > REACH) place_rest<SPAN>(target, squares, input, first, rows, in, stride);
        }
        __syncthreads();
    }

    // Calls, so that rows which have no rest are staged as if there were none.
    __device__ __noinline__ static void add_rest(float (&squares)[8][STREAM_WARPS], Input input, int first, int rows,
                                                 int in) {
#pragma unroll 1
        for (int row = first; row < min(rows, first + NORMED_ROWS); row++) {
            float sum = 0.f;
            for (int i = REACH + 8 * threadIdx.x; i < in; i += REACH)
                sum += square(*(const uint4*)(input.x + (size_t)row * in + i));
            sum = warp_sum(sum);
            if (threadIdx.x % 32 == 0) squares[row][threadIdx.x / 32] += sum;
        }
    }

    template <int SPAN>
    __device__ __noinline__ static void place_rest(real_t* target, const float (&squares)[8][STREAM_WARPS],
                                                   Input input, int first, int rows, int in, int stride) {
#pragma unroll 1
        for (int i = REACH + 8 * threadIdx.x; i < in; i += REACH) {
            const uint4* to = (const uint4*)(input.place ? input.place + i : (const u32*)input.norm);
            for (int row = first; row < min(rows, first + NORMED_ROWS); row++) {
                float factor = rsqrtf(total(squares[row]) / in + input.eps);
                place<SPAN>(target + row * stride, i, *(const uint4*)(input.x + (size_t)row * in + i), factor,
                            *(const uint4*)(input.norm + i), input.place, to[0], to[1]);
            }
        }
    }

    __device__ __forceinline__ static float square(const uint4& bits) {
        float x[8];
        load8(x, (const real_t*)&bits);
        float sum[2] = {};
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j % 2] += x[j] * x[j];
        return sum[0] + sum[1];
    }

    __device__ __forceinline__ static float total(const float* of_warps) {
        float4 sum = *(const float4*)of_warps;
#pragma unroll
        for (int w = 4; w < STREAM_WARPS; w += 4) {
            float4 more = *(const float4*)(of_warps + w);
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        return (sum.x + sum.y) + (sum.z + sum.w);
    }

    /// Eight features from `i` on, which go `to` other places where they are `ordered`.
    template <int SPAN>
    __device__ __forceinline__ static void place(real_t* target, int i, uint4 bits, float factor, uint4 weights,
                                                 bool ordered, uint4 low, uint4 high) {
        float x[8], scales[8];
        load8(x, (const real_t*)&bits);
        load8(scales, (const real_t*)&weights);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] *= factor * scales[j];
        if (!ordered) {
            store8(target + i + i / SPAN * GAP, x);
            return;
        }
        u32 to[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int j = 0; j < 8; j++) target[to[j] + to[j] / SPAN * GAP] = to_real(x[j]);
    }
};

/// a / b of small numbers, without the many steps of a division.
__device__ __forceinline__ int quotient(int a, int b) { return (int)__fdividef(a + 0.5f, (float)b); }

/// One output of a thread, of those that are stored together.
struct Output {
    int n, token, turn;
    bool mine;
    size_t at;
    // As they lie in memory: who made floats of them at once would wait for them.
    real_t bias[2], residual;

    /// Finds the sums that a thread adds up, which can be done before the input is here.
    __device__ Output(Finish finish, int rows) {
        int row = threadIdx.x >> finish.shift();
        n = threadIdx.x - (row << finish.shift()), turn = quotient(row, rows), token = row - turn * rows;
    }

    /// Asks for what is known before the sums are, for `together` tiles from `tile` on.
    __device__ __forceinline__ void look_up(Finish finish, int tile, int together, int out) {
        tile += turn * gridDim.x;
        mine = turn < together && tile < out / 16;
        if (!mine) return;
        at = (size_t)token * (finish.gated ? out / 2 : out) + (tile << finish.shift()) + n;
        // One for every row of a tile, as the codes are.
        if (finish.bias) bias[0] = finish.bias[tile * 16 + n];
        if (finish.bias && finish.gated) bias[1] = finish.bias[tile * 16 + n + 8];
        if (finish.residual) residual = finish.residual[at];
    }

    __device__ __forceinline__ static float total(const float* parts) {
        // Four sums in turn: an addition waits for the one before it.
        float sum[4] = {};
#pragma unroll
        for (int w = 0; w < STREAM_WARPS; w++) sum[w % 4] += parts[w * 16];
        return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }

    __device__ __forceinline__ void store(real_t* y, const float* parts, Finish finish) const {
        if (!mine) return;
        parts += (threadIdx.x >> finish.shift()) * STREAM_WARPS * 16 + n;
        float value = total(parts);
        if (finish.bias) value += to_float(bias[0]);
        // Rounded where the plain products would be, so that both give the same.
        if (finish.gated) {
            float gate = to_float(to_real(value)), gated = total(parts + 8);
            if (finish.bias) gated += to_float(bias[1]);
            value = finish.gate.quick(gate) * to_float(to_real(gated));
        }
        if (finish.residual) value = to_float(to_real(value)) + to_float(residual);
        y[at] = to_real(value);
    }
};

#endif
