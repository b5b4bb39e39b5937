// The grid of a group by sweeping copies of its columns, one for each candidate: half a warp takes a row, a lane a
// candidate. Errors made so far lie in shared memory, the columns of a tile in registers.

#define WINDOW 128
#define TILE 16
#define LANES 16

/// Sets the grids of the group at places `first .. first + count`, which the sweep enters now.
extern "C" __global__ void sweep_search(
    float* scales,         // [groups, rows]
    u8* zeros,             // [groups, rows]
    const float* weights,  // [rows, in], sweep order
    const float* u,        // [in, in]
    int rows, int in, int first, int count, int group, Spec spec) {
    extern __shared__ __align__(16) float search_memory[];
    int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int half = lane / LANES, candidate = lane % LANES;
    float* triangle = search_memory;                                        // [WINDOW, WINDOW]
    float* errors = triangle + WINDOW * WINDOW + warp * WINDOW * 32;        // [WINDOW, 32]
    float* mine = triangle + WINDOW * WINDOW + warps * WINDOW * 32 + (2 * warp + half) * WINDOW;
    int row = (blockIdx.x * warps + warp) * 2 + half;
    bool here = row < rows;
    const float* row_weights = weights + (size_t)(here ? row : rows - 1) * in + first;
    float low = 0.f, high = 0.f;
    for (int i = candidate; i < count; i += LANES) {
        low = fminf(low, row_weights[i]);
        high = fmaxf(high, row_weights[i]);
    }
    for (int offset = LANES / 2; offset > 0; offset >>= 1) {
        low = fminf(low, __shfl_xor_sync(FULL_WARP, low, offset));
        high = fmaxf(high, __shfl_xor_sync(FULL_WARP, high, offset));
    }
    int candidates = candidate_count(spec);
    Grid grid = candidate_grid(low, high, min(candidate, candidates - 1), spec);
    float max_code = (float)((1 << spec.bits) - 1), sum = 0.f;
    for (int start = 0; start < count; start += WINDOW) {
        int width = min(WINDOW, count - start);
        __syncthreads();
        for (int i = threadIdx.x; i < WINDOW * WINDOW; i += blockDim.x) {
            int r = i / WINDOW, c = i % WINDOW;
            bool inside = r < width && c < width;
            triangle[i] = inside ? u[(size_t)(first + start + r) * in + first + start + c] : 0.f;
        }
        for (int i = candidate; i < WINDOW; i += LANES) mine[i] = i < width ? row_weights[start + i] : 0.f;
        __syncthreads();
        for (int tile = 0; tile < width; tile += TILE) {
            float w[TILE];
#pragma unroll
            for (int s = 0; s < TILE; s++) w[s] = mine[tile + s];
            for (int t = 0; t < tile; t++) {
                float error = errors[t * 32 + lane];
                const float4* u_row = (const float4*)(triangle + t * WINDOW + tile);
#pragma unroll
                for (int s = 0; s < TILE / 4; s++) {
                    float4 part = u_row[s];
                    w[4 * s] -= error * part.x;
                    w[4 * s + 1] -= error * part.y;
                    w[4 * s + 2] -= error * part.z;
                    w[4 * s + 3] -= error * part.w;
                }
            }
#pragma unroll
            for (int s = 0; s < TILE; s++) {
                if (tile + s < width) {
                    const float* u_row = triangle + (tile + s) * WINDOW + tile;
                    float value = (code_of(grid, max_code, w[s]) - grid.zero) * grid.scale;
                    float error = __fdiv_rn(w[s] - value, u_row[s]);
                    sum += error * error;
                    errors[(tile + s) * 32 + lane] = error;
#pragma unroll
                    for (int later = s + 1; later < TILE; later++) w[later] -= error * u_row[later];
                }
            }
        }
    }
    // The least sum, of equal ones the first.
    float least = candidate < candidates && sum == sum ? sum : __int_as_float(0x7f800000);
    int best = candidate;
    for (int offset = LANES / 2; offset > 0; offset >>= 1) {
        float other = __shfl_xor_sync(FULL_WARP, least, offset);
        int whose = __shfl_xor_sync(FULL_WARP, best, offset);
        if (other < least || (other == least && whose < best)) {
            least = other;
            best = whose;
        }
    }
    if (here && candidate == best) {
        scales[(size_t)group * rows + row] = grid.scale;
        zeros[(size_t)group * rows + row] = (u8)grid.zero;
    }
}
