// Grids: scale and zero of weights that share them, and the codes that follow.

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

/// The code of a weight; `inverse` is that of the grid's scale.
__device__ __forceinline__ float code_by(const Grid& grid, float inverse, float max_code, float w) {
    float code = rintf(__fmul_rn(quotient(w, grid.scale, inverse), TIES_OUTWARD)) + grid.zero;
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

/// Weights of one row that share a grid, `step` values apart, seen by one thread or by a warp whose lanes take every 32nd.
template <int LANES>
__device__ float grid_error(const Grid& grid, float max_code, const float* values, int step, int count) {
    float sum = 0.f, inverse = inverse_of(grid.scale);
    for (int i = threadIdx.x % LANES; i < count; i += LANES) {
        float weight = values[i * step], code = code_by(grid, inverse, max_code, weight);
        sum += powf(fabsf((code - grid.zero) * grid.scale - weight), 2.4f);
    }
    return LANES == 1 ? sum : warp_sum(sum);
}

template <int LANES>
__device__ Grid find_grid(const float* values, int step, int count, const Spec& spec) {
    float low = 0.f, high = 0.f, max_code = (float)((1 << spec.bits) - 1);
    for (int i = threadIdx.x % LANES; i < count; i += LANES) {
        low = fminf(low, values[i * step]);
        high = fmaxf(high, values[i * step]);
    }
    if (LANES > 1) {
        low = warp_min(low);
        high = warp_max(high);
    }
    if (spec.kind == LOOP) {
        Grid best = candidate_grid(low, high, 0, spec);
        float least = grid_error<LANES>(best, max_code, values, step, count);
        for (int number = 1; number < candidate_count(spec); number++) {
            Grid grid = candidate_grid(low, high, number, spec);
            float error = grid_error<LANES>(grid, max_code, values, step, count);
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
    float least = grid_error<LANES>(best, max_code, values, step, count);
    for (int percent = 1; percent < SHRINK_STEPS; percent++) {
        float p = 1.f - percent / 100.f;
        Grid grid = grid_of(p * low, p * high, spec);
        float error = grid_error<LANES>(grid, max_code, values, step, count);
        if (error < least) {
            least = error;
            best = grid;
        }
    }
    return best;
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
    Grid grid = find_grid<32>(values, 1, count, spec);
    if (threadIdx.x == 0) {
        scales[(size_t)group * rows + row] = grid.scale;
        zeros[(size_t)group * rows + row] = (u8)grid.zero;
    }
}
