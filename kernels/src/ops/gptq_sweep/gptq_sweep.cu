// One warp solves one output row. Lane l holds columns l, l + 32, l + 64 and l + 96 of the block, so that the
// loop over columns needs a shuffle and four multiply-adds a step. The block's triangle of U lies in shared
// memory.

#define SLOTS 4
#define SHRINK_STEPS 80

struct Grid {
    float scale, zero;
};

/// How grids are found; see GridSpec.
struct Spec {
    int bits, sym, kind, min_zero, f16_scales;
};

/// See GridKind.
#define MSE 1
#define LOOP 2

__device__ __forceinline__ float code_of(const Grid& grid, float max_code, float w) {
    float code = rintf(__fmul_rn(__fdiv_rn(w, grid.scale), TIES_OUTWARD)) + grid.zero;
    return fminf(fmaxf(code, 0.f), max_code);
}

__device__ __forceinline__ float stored_scale(double scale, int f16_scales) {
    float magnitude = (float)fabs(scale);
    magnitude = f16_scales ? fmaxf(f16_round(magnitude), 5.9604645e-8f) : fmaxf(magnitude, 1.17549435e-38f);
    return scale < 0. ? -magnitude : magnitude;
}

__device__ Grid grid_of(float low, float high, const Spec& spec) {
    float max_code = (float)((1 << spec.bits) - 1);
    double step = ((double)high - (double)low) / max_code;
    Grid grid;
    grid.scale = stored_scale(step, spec.f16_scales);
    if (spec.sym) {
        grid.zero = (max_code + 1.f) / 2.f;
        return grid;
    }
    grid.zero = (float)rint(-(double)low / step);
    if (grid.zero < (float)spec.min_zero) {
        grid.zero = (float)spec.min_zero;
        grid.scale = stored_scale((double)high / (max_code - grid.zero), spec.f16_scales);
    }
    grid.zero = fminf(grid.zero, max_code);
    return grid;
}

__device__ const double LOOP_SHARES[12] = {1.06, 1., .95, .9, .85, .8, .75, .7, .65, .6, .55, .5};
#define SHARES 12
/// Of symmetric grids, these once more with the other sign: shares 1 to 4.
#define MIRRORED 4

__device__ __forceinline__ int candidate_count(const Spec& spec) { return spec.sym ? SHARES + MIRRORED : SHARES; }

/// Candidate `number` for weights from `low` to `high`, neither on the other side of 0; see GridSpec::candidates.
__device__ Grid candidate_grid(float low, float high, int number, const Spec& spec) {
    float largest = fmaxf(high, -low);
    double share = LOOP_SHARES[number < SHARES ? number : number - SHARES + 1];
    if (!spec.sym) {
        if (largest == 0.f) low = -1.f, high = 1.f;
        return grid_of((float)(share * low), (float)(share * high), spec);
    }
    // The largest weight becomes the lowest code.
    double sign = largest > 0.f && high == largest ? -1. : 1.;
    if (largest == 0.f) largest = 1.f;
    if (number >= SHARES) sign = -sign;
    Grid grid;
    grid.zero = (float)(1 << (spec.bits - 1));
    grid.scale = stored_scale(sign * share * largest / grid.zero, spec.f16_scales);
    return grid;
}

/// Weights of one row that share a grid, seen by a whole warp: `count` values at `values`, each lane taking
/// every 32nd.
__device__ float grid_error(const Grid& grid, float max_code, const float* values, int count) {
    float sum = 0.f;
    for (int i = threadIdx.x % 32; i < count; i += 32) {
        float difference = fabsf((code_of(grid, max_code, values[i]) - grid.zero) * grid.scale - values[i]);
        sum += powf(difference, 2.4f);
    }
    return warp_sum(sum);
}

__device__ Grid find_grid(const float* values, int count, const Spec& spec) {
    float low = 0.f, high = 0.f, max_code = (float)((1 << spec.bits) - 1);
    for (int i = threadIdx.x % 32; i < count; i += 32) {
        low = fminf(low, values[i]);
        high = fmaxf(high, values[i]);
    }
    low = warp_min(low);
    high = warp_max(high);
    if (spec.kind == LOOP) {
        Grid best = candidate_grid(low, high, 0, spec);
        float least = grid_error(best, max_code, values, count);
        for (int number = 1; number < candidate_count(spec); number++) {
            Grid grid = candidate_grid(low, high, number, spec);
            float error = grid_error(grid, max_code, values, count);
            if (error < least) {
                least = error;
                best = grid;
            }
        }
        return best;
    }
    if (spec.sym) {
        high = fmaxf(high, -low);
        low = -high;
    }
    if (low == 0.f && high == 0.f) {
        low = -1.f;
        high = 1.f;
    }
    Grid best = grid_of(low, high, spec);
    if (spec.kind != MSE) return best;
    float least = grid_error(best, max_code, values, count);
    for (int step = 1; step < SHRINK_STEPS; step++) {
        float p = 1.f - step / 100.f;
        Grid grid = grid_of(p * low, p * high, spec);
        float error = grid_error(grid, max_code, values, count);
        if (error < least) {
            least = error;
            best = grid;
        }
    }
    return best;
}

/// Element `i` of a tensor stored as f16, bf16 or f32: 0, 1 or 2, as the enum on the host counts them.
__device__ __forceinline__ float stored(const void* source, size_t i, int dtype) {
    if (dtype == 2) return ((const float*)source)[i];
    unsigned short bits = ((const unsigned short*)source)[i];
    return dtype == 1 ? __uint_as_float((u32)bits << 16) : f16_to_float(bits);
}

/// weights[n, place] = source[n, order[place]]
extern "C" __global__ void sweep_gather(
    float* weights,      // [rows, in], f32, sweep order
    const void* source,  // [rows, in], as the checkpoint has it
    const u32* order,    // [in]
    int in, int dtype) {
    for (int i = threadIdx.x; i < in; i += blockDim.x)
        weights[(size_t)blockIdx.x * in + i] = stored(source, (size_t)blockIdx.x * in + order[i], dtype);
}

/// weights[n, place] = 0 where cleared[place] is 1.
extern "C" __global__ void sweep_clear(float* weights, const u8* cleared, int in) {
    for (int i = threadIdx.x; i < in; i += blockDim.x)
        if (cleared[i]) weights[(size_t)blockIdx.x * in + i] = 0.f;
}

/// Grids of all groups from the weights as they are: for the whole row, or for static groups, whose members
/// are `members[starts[g] .. starts[g + 1]]`. One warp a row and group.
extern "C" __global__ void sweep_static_grids(
    float* scales,         // [groups, rows]
    u8* zeros,             // [groups, rows]
    const float* weights,  // [rows, in]
    const u32* members,    // [in], places of the sweep, sorted by group
    const u32* starts,     // [groups + 1]
    int in, int rows, Spec spec) {
    extern __shared__ float values[];
    int row = blockIdx.x, group = blockIdx.y;
    int start = starts[group], count = starts[group + 1] - start;
    for (int i = threadIdx.x; i < count; i += 32) values[i] = weights[(size_t)row * in + members[start + i]];
    __syncwarp();
    Grid grid = find_grid(values, count, spec);
    if (threadIdx.x == 0) {
        scales[(size_t)group * rows + row] = grid.scale;
        zeros[(size_t)group * rows + row] = (u8)grid.zero;
    }
}

/// Solves the columns `first .. first + width` of every row, which then hold the values of their codes.
extern "C" __global__ void sweep_block(
    float* weights,        // [rows, in], sweep order
    u8* codes,             // [rows, in], sweep order
    float* errors,         // [rows, stride], those of the first column
    float* losses,         // [rows], added to
    float* scales,         // [groups, rows]
    u8* zeros,             // [groups, rows]
    const float* u,        // [in, in], or null for the identity
    const u32* group_of,   // [in]
    const u32* group_end,  // [in]: where the run of equal groups that holds this place ends
    int rows, int in, int first, int width, int stride, int grids_known, Spec spec) {
    extern __shared__ float shared[];
    float* triangle = shared;                                          // [width, width]
    float* mine = shared + width * width + (threadIdx.x / 32) * width;  // this warp's weights
    if (u)
        for (int i = threadIdx.x; i < width * width; i += blockDim.x)
            triangle[i] = u[(size_t)(first + i / width) * in + first + i % width];
    __syncthreads();
    int lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    float* row_weights = weights + (size_t)row * in;
    float w[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; s++) w[s] = lane + 32 * s < width ? row_weights[first + lane + 32 * s] : 0.f;
    float max_code = (float)((1 << spec.bits) - 1), loss = 0.f;
    Grid grid = {1.f, 0.f};
    int seen = -1;
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        for (int l = 0; l < 32; l++) {
            int i = slot * 32 + l;
            if (i >= width) break;
            int place = first + i, group = group_of[place];
            if (group != seen) {
                seen = group;
                bool starts_here = place == 0 || group_of[place - 1] != group;
                if (grids_known || !starts_here) {
                    grid.scale = scales[(size_t)group * rows + row];
                    grid.zero = (float)zeros[(size_t)group * rows + row];
                } else {
                    int end = group_end[place];
                    if (end <= first + width) {
                        __syncwarp();
#pragma unroll
                        for (int s = 0; s < SLOTS; s++)
                            if (lane + 32 * s < width) mine[lane + 32 * s] = w[s];
                        __syncwarp();
                        grid = find_grid(mine + i, end - place, spec);
                    } else {
                        grid = find_grid(row_weights + place, end - place, spec);
                    }
                    if (lane == 0) {
                        scales[(size_t)group * rows + row] = grid.scale;
                        zeros[(size_t)group * rows + row] = (u8)grid.zero;
                    }
                }
            }
            float weight = __shfl_sync(FULL_WARP, w[slot], l);
            float code = code_of(grid, max_code, weight);
            float value = (code - grid.zero) * grid.scale, error = weight - value;
            if (u) {
                error /= triangle[i * width + i];
#pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    int column = lane + 32 * s;
                    if (s >= slot && column > i && column < width) w[s] -= error * triangle[i * width + column];
                }
            }
            loss += 0.5f * error * error;
            if (lane == 0) {
                codes[(size_t)row * in + place] = (u8)code;
                row_weights[place] = value;
                errors[(size_t)row * stride + i] = error;
            }
        }
    }
    if (lane == 0) losses[row] += loss;
}

/// codes to the checkpoint's order of features: out[n, order[place]] = codes[n, place]
extern "C" __global__ void sweep_scatter(u8* out, const u8* codes, const u32* order, int in) {
    for (int i = threadIdx.x; i < in; i += blockDim.x)
        out[(size_t)blockIdx.x * in + order[i]] = codes[(size_t)blockIdx.x * in + i];
}

/// Words of the file from codes: word w of output n holds bits 32 w to 32 w + 31 of n's stream of codes.
extern "C" __global__ void pack_codes(
    u32* words,       // [in * bits / 32, rows]
    const u8* codes,  // [rows, in], checkpoint order
    int rows, int in, int bits) {
    int n = blockIdx.x * blockDim.x + threadIdx.x, w = blockIdx.y;
    if (n >= rows) return;
    const u8* row = codes + (size_t)n * in;
    u32 word = 0;
    for (int i = 32 * w / bits; i * bits < 32 * (w + 1) && i < in; i++) {
        int shift = i * bits - 32 * w;
        word |= shift >= 0 ? (u32)row[i] << shift : (u32)row[i] >> -shift;
    }
    words[(size_t)w * rows + n] = word;
}

/// The same for zero points, whose stored value lies `zero_offset` below; words of one group lie together.
extern "C" __global__ void pack_zeros(
    u32* words,       // [groups, rows * bits / 32]
    const u8* zeros,  // [groups, rows]
    int count, int rows, int bits, int zero_offset) {
    int w = blockIdx.x * blockDim.x + threadIdx.x, group = blockIdx.y;
    if (w >= count) return;
    u32 word = 0, mask = (1u << bits) - 1;
    for (int n = 32 * w / bits; n * bits < 32 * (w + 1) && n < rows; n++) {
        int shift = n * bits - 32 * w;
        u32 zero = ((u32)zeros[(size_t)group * rows + n] - zero_offset) & mask;
        word |= shift >= 0 ? zero << shift : zero >> -shift;
    }
    words[(size_t)group * count + w] = word;
}

/// Scales as the file holds them.
extern "C" __global__ void store_scales(f16_t* stored, const float* scales, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    f16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(scales[i]));
    stored[i] = bits;
}
