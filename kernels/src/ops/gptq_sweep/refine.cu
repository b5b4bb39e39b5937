// Codes and scales of a finished sweep, changed one after the other; E = target - values, G = E H.

/// y = a - b
extern "C" __global__ void sweep_minus(float* y, const float* a, const float* b, size_t count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = a[i] - b[i];
}

/// out[i, j] = matrix[rows[i], columns[j]]; null for the places themselves. One row of threads a row.
extern "C" __global__ void sweep_take(
    float* out, const float* matrix, const u32* rows, const u32* columns, int stride, int width) {
    int j = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y;
    if (j >= width) return;
    u32 row = rows ? rows[i] : i, column = columns ? columns[j] : j;
    out[(size_t)i * width + j] = matrix[(size_t)row * stride + column];
}

__device__ __forceinline__ double warp_sum_double(double x) {
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

/// The scale with the least loss, as far as it can be stored; `before` where that gains nothing or the sign would change.
__device__ __forceinline__ float refitted(float before, double slope, double curvature, Spec spec) {
    float after = stored_scale((double)before + slope / curvature, spec.f16_scales);
    double change = (double)after - (double)before;
    bool gains = curvature > 0. && change * (2. * slope - curvature * change) > 0.;
    return gains && isfinite(after) && (after < 0.f) == (before < 0.f) ? after : before;
}

/// Every code of the columns `first .. first + width` once, the others as they are at that moment; then, if `whole` says that
/// groups lie inside of these columns, their scales. One warp a row, as in `sweep_block`. G of the columns is kept in
/// registers; that of others follows from `changes` by one product afterwards.
extern "C" __global__ void sweep_descend(
    float* weights,         // [rows, in]: values of the codes
    u8* codes,              // [rows, in]
    float* missing,         // [rows, in]: E
    float* changes,         // [rows, width]: by which the values changed
    const float* gradient,  // [rows, width]: G of the columns, rows `stride` apart
    float* scales,          // [groups, rows]
    const u8* zeros,        // [groups, rows]
    const float* hessian,   // [in, in]
    const u32* group_of,    // [in]
    int rows, int in, int first, int width, int stride, int whole, Spec spec) {
    extern __shared__ float descend_memory[];
    float* block = descend_memory;  // [width, width]
    for (int i = threadIdx.x; i < width * width; i += blockDim.x)
        block[i] = hessian[(size_t)(first + i / width) * in + first + i % width];
    __syncthreads();
    int lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    size_t start = (size_t)row * in + first;
    float g[SLOTS], q[SLOTS], c[SLOTS], d[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; s++) {
        int column = lane + 32 * s;
        bool inside = column < width;
        g[s] = inside ? gradient[(size_t)row * stride + column] : 0.f;
        q[s] = inside ? weights[start + column] : 0.f;
        c[s] = inside ? (float)codes[start + column] : 0.f;
        d[s] = 0.f;
    }
    float max_code = (float)((1 << spec.bits) - 1);
    Grid grid = {1.f, 0.f};
    int seen = -1;
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        for (int l = 0; l < 32; l++) {
            int i = slot * 32 + l;
            if (i >= width) break;
            int group = group_of[first + i];
            if (group != seen) {
                seen = group;
                grid.scale = scales[(size_t)group * rows + row];
                grid.zero = (float)zeros[(size_t)group * rows + row];
            }
            float value = __shfl_sync(FULL_WARP, q[slot], l);
            float slope = __shfl_sync(FULL_WARP, g[slot], l);
            float before = __shfl_sync(FULL_WARP, c[slot], l);
            float code = code_of(grid, max_code, value + __fdiv_rn(slope, block[i * width + i]));
            if (code == before) continue;
            float after = (code - grid.zero) * grid.scale, change = after - value;
#pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                int column = lane + 32 * s;
                if (column < width) g[s] -= change * block[i * width + column];
            }
            if (lane == l) {
                q[slot] = after;
                c[slot] = code;
                d[slot] = change;
            }
        }
    }
    for (int begin = 0, end; whole && begin < width; begin = end) {
        int group = group_of[first + begin];
        for (end = begin + 1; end < width && group_of[first + end] == group;) end++;
        size_t place = (size_t)group * rows + row;
        float scale = scales[place], zero = (float)zeros[place];
        float p[SLOTS] = {};  // k H
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            for (int l = 0; l < 32; l++) {
                int i = slot * 32 + l;
                if (i < begin) continue;
                if (i >= end) break;
                float k = __shfl_sync(FULL_WARP, c[slot], l) - zero;
#pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    int column = lane + 32 * s;
                    if (column < width) p[s] += k * block[i * width + column];
                }
            }
        }
        double slope = 0., curvature = 0.;
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            int column = lane + 32 * s;
            if (column < begin || column >= end) continue;
            slope += (double)g[s] * (c[s] - zero);
            curvature += (double)p[s] * (c[s] - zero);
        }
        float after = refitted(scale, warp_sum_double(slope), warp_sum_double(curvature), spec);
        if (after == scale) continue;
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            int column = lane + 32 * s;
            g[s] -= (after - scale) * p[s];
            if (column < begin || column >= end) continue;
            float value = (c[s] - zero) * after;
            d[s] += value - q[s];
            q[s] = value;
        }
        if (lane == 0) scales[place] = after;
    }
#pragma unroll
    for (int s = 0; s < SLOTS; s++) {
        int column = lane + 32 * s;
        if (column >= width) continue;
        weights[start + column] = q[s];
        codes[start + column] = (u8)c[s];
        missing[start + column] -= d[s];
        changes[(size_t)row * width + column] = d[s];
    }
}

/// k[n, i] = code - zero of the group's place i.
extern "C" __global__ void sweep_signed_codes(
    float* k,           // [rows, width]
    const u8* codes,    // [rows, in]
    const u8* zeros,    // [groups, rows]
    const u32* places,  // [width]
    int rows, int in, int width, int group) {
    int row = blockIdx.x;
    float zero = (float)zeros[(size_t)group * rows + row];
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        k[(size_t)row * width + i] = (float)codes[(size_t)row * in + places[i]] - zero;
}

/// Changes the scale of one group where that lowers the loss. One warp a row.
extern "C" __global__ void sweep_rescale(
    float* weights,         // [rows, in]: values of the codes
    float* missing,         // [rows, in]: E
    float* scales,          // [groups, rows]
    const float* k,         // [rows, width]: codes less their zero
    const float* product,   // [rows, width]: k H inside the group
    const float* gradient,  // [rows, width]: G inside the group
    const u32* places,      // [width]
    int rows, int in, int width, int group, Spec spec) {
    int lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    size_t start = (size_t)row * width, whole_row = (size_t)row * in;
    double slope = 0., curvature = 0.;
    for (int i = lane; i < width; i += 32) {
        slope += (double)gradient[start + i] * k[start + i];
        curvature += (double)product[start + i] * k[start + i];
    }
    float* scale = scales + (size_t)group * rows + row;
    float before = *scale, after = refitted(before, warp_sum_double(slope), warp_sum_double(curvature), spec);
    if (after == before) return;
    for (int i = lane; i < width; i += 32) {
        size_t place = whole_row + places[i];
        float value = k[start + i] * after;
        missing[place] -= value - weights[place];
        weights[place] = value;
    }
    if (lane == 0) *scale = after;
}

/// losses[n] = sum_j e[n, j] (g[n, j] + 2 pull[n, j]); null for no pull. One block a row.
extern "C" __global__ void sweep_row_losses(
    float* losses, const float* e, const float* g, const float* pull, int in) {
    __shared__ double parts[32];
    size_t start = (size_t)blockIdx.x * in;
    double sum = 0.;
    for (int j = threadIdx.x; j < in; j += blockDim.x) {
        double pulled = pull ? 2. * pull[start + j] : 0.;
        sum += (double)e[start + j] * ((double)g[start + j] + pulled);
    }
    sum = warp_sum_double(sum);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = warp_sum_double(threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0.);
    if (threadIdx.x == 0) losses[blockIdx.x] = (float)sum;
}

/// Grids of the rows `first .. first + count` of another sweep.
extern "C" __global__ void sweep_take_grids(
    float* scales, u8* zeros, const float* other_scales, const u8* other_zeros, int rows, int first, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    size_t place = (size_t)blockIdx.y * rows + first + i;
    scales[place] = other_scales[place];
    zeros[place] = other_zeros[place];
}

/// Values as the checkpoint has them in the compute type.
extern "C" __global__ void sweep_store(real_t* out, const void* source, size_t count, int dtype) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = to_real(stored(source, i, dtype));
}
