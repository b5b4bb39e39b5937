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

/// A thread's part of a tile's gradient, and its codes, four in a word; zeros from `count` on.
__device__ __forceinline__ void load_gradient(float (&g)[TILE], const float* gradient, int count) {
    if (count >= TILE && (size_t)gradient % 16 == 0) {
#pragma unroll
        for (int s = 0; s < TILE; s += 4) {
            float4 part = *(const float4*)(gradient + s);
            g[s] = part.x, g[s + 1] = part.y, g[s + 2] = part.z, g[s + 3] = part.w;
        }
        return;
    }
#pragma unroll
    for (int s = 0; s < TILE; s++) g[s] = s < count ? gradient[s] : 0.f;
}

__device__ __forceinline__ void load_codes(u32 (&packed)[TILE / 4], const u8* codes, int count) {
    if (count >= TILE && (size_t)codes % 16 == 0) {
        uint4 words = *(const uint4*)codes;
        packed[0] = words.x, packed[1] = words.y, packed[2] = words.z, packed[3] = words.w;
        return;
    }
#pragma unroll
    for (int s = 0; s < TILE; s++) {
        u32 code = s < count ? codes[s] : 0;
        packed[s / 4] = (s % 4 ? packed[s / 4] : 0) | code << 8 * (s % 4);
    }
}

__device__ __forceinline__ float packed_code(const u32 (&packed)[TILE / 4], int s) {
    return (float)(packed[s / 4] >> 8 * (s % 4) & 255);
}

/// The scale of the group at the columns from `begin` to `end`, for this thread's row; changes and values follow it. `gradient`
/// and `codes` are the row's, from the first column of all on.
__device__ __forceinline__ void refit_group(
    const Rows& at, const float* gradient, const u8* codes, float* stored_scale, float zero, int begin, int end, int width,
    const Spec& spec) {
    float scale = *stored_scale;
    double slope = 0., curvature = 0.;
    for (int tile = begin & -TILE; tile < end; tile += TILE) {
        float g[TILE], product[TILE] = {};  // of the group's codes, less their zero, with H
        u32 packed[TILE / 4];
        for (int other = begin & -TILE; other < end; other += TILE) {
            load_codes(packed, codes + other, width - other);
#pragma unroll
            for (int t = 0; t < TILE; t++) {
                if (other + t < begin || other + t >= end) continue;
                float code = packed_code(packed, t) - zero;
                const float* h_row = at.triangle + (other + t) * WIDTH + tile;
#pragma unroll
                for (int s = 0; s < TILE; s++) product[s] += code * h_row[s];
            }
        }
        load_gradient(g, gradient + tile, width - tile);
        load_codes(packed, codes + tile, width - tile);
        subtract_products(g, at.mine, at.triangle, tile, 0, width);
#pragma unroll
        for (int s = 0; s < TILE; s++) {
            if (tile + s < begin || tile + s >= end) continue;
            double code = packed_code(packed, s) - zero;
            slope += (double)g[s] * code;
            curvature += (double)product[s] * code;
        }
    }
    float after = refitted(scale, slope, curvature, spec);
    if (after == scale) return;
    for (int i = begin; i < end; i++) {
        float code = (float)codes[i] - zero, value = code * after;
        at.mine[i * ROW_STRIDE] += value - code * scale;
        if (at.here) at.weights[(size_t)at.row * at.in + i] = value;
    }
    if (at.here) *stored_scale = after;
}

/// Every code of the columns `first .. first + width` once, the others as they are at that moment; then, if `whole` says that
/// groups lie inside of these columns, their scales. One thread a row, as in `sweep_block`: changes of values lie in shared
/// memory, and what they do to G there follows from them. What they do to other columns follows by one product afterwards.
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
    extern __shared__ __align__(16) float sweep_memory[];
    int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* block = sweep_memory;  // [WIDTH, WIDTH]: of H
    float* inverses = block + WIDTH * WIDTH;
    float* columns = inverses + WIDTH + warp * WIDTH * ROW_STRIDE;  // [WIDTH, ROW_STRIDE]: changes
    int first_row = (blockIdx.x * warps + warp) * 32, row = min(first_row + lane, rows - 1);
    load_square(block, inverses, hessian + (size_t)first * in + first, in, width);
    if (first_row >= rows) return;
    Rows at = {block, inverses, columns + lane, weights + first, rows, in, first_row, row, first_row + lane < rows};
    const float* row_gradient = gradient + (size_t)row * stride;
    const u8* row_codes = codes + (size_t)row * in + first;
    float max_code = (float)((1 << spec.bits) - 1);
    for (int tile = 0; tile < width; tile += TILE) {
        float g[TILE], values[TILE], scale_inverses[TILE];
        Grid grids[TILE];
        u32 packed[TILE / 4];
        load_gradient(g, row_gradient + tile, width - tile);
        load_codes(packed, row_codes + tile, width - tile);
        load_grids(grids, scale_inverses, scales, zeros, group_of + first, rows, row, tile, width);
        subtract_products(g, at.mine, block, tile, 0, tile);
#pragma unroll
        for (int s = 0; s < TILE; s++) {
            int i = tile + s;
            if (i >= width) break;
            const float* h_row = block + i * WIDTH + tile;
            float before = packed_code(packed, s), value = (before - grids[s].zero) * grids[s].scale;
            float wanted = value + quotient(g[s], h_row[s], inverses[i]);
            float code = code_by(grids[s], scale_inverses[s], max_code, wanted);
            values[s] = (code - grids[s].zero) * grids[s].scale;
            float change = values[s] - value;
            at.mine[i * ROW_STRIDE] = change;
#pragma unroll
            for (int later = s + 1; later < TILE; later++) g[later] -= change * h_row[later];
            packed[s / 4] = (packed[s / 4] & ~(255u << 8 * (s % 4))) | (u32)code << 8 * (s % 4);
        }
        store_tile(at, codes + first, values, packed, tile, 0, width);
    }
    for (int begin = 0, end; whole && begin < width; begin = end) {
        int group = group_of[first + begin];
        for (end = begin + 1; end < width && group_of[first + end] == group;) end++;
        size_t stored = (size_t)group * rows + row;
        refit_group(at, row_gradient, row_codes, scales + stored, (float)zeros[stored], begin, end, width, spec);
    }
    __syncwarp();
    for (int r = 0; r < min(32, rows - first_row); r++) {
        float* row_missing = missing + (size_t)(first_row + r) * in + first;
        for (int c = lane; c < width; c += 32) {
            float change = columns[c * ROW_STRIDE + r];
            changes[(size_t)(first_row + r) * width + c] = change;
            atomicAdd(row_missing + c, -change);  // of one thread each: it need not wait for what was there
        }
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
