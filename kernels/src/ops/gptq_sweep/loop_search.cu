// The grid of a group by sweeping copies of its columns, one for each candidate: half a warp takes a row, a lane a
// candidate. Errors made so far lie in shared memory, the columns of a tile in registers.

#define HALF_WARP 16

/// Sets the grids of the group at places `first .. first + count`, which the sweep enters now.
extern "C" __global__ void sweep_search(
    float* scales,         // [groups, rows]
    u8* zeros,             // [groups, rows]
    const float* weights,  // [rows, in], sweep order
    const float* u,        // [in, in]
    int rows, int in, int first, int count, int group, Spec spec) {
    extern __shared__ __align__(16) float search_memory[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int half = lane / HALF_WARP, candidate = lane % HALF_WARP;
    float* triangle = search_memory;             // [WIDTH, WIDTH]
    float* inverses = triangle + WIDTH * WIDTH;  // [WIDTH]: of its diagonal
    float* warp_memory = inverses + WIDTH + warp * WIDTH * (ROW_STRIDE + 2);
    float* errors = warp_memory + lane;  // [WIDTH, ROW_STRIDE], this thread's candidate
    float* mine = warp_memory + WIDTH * (ROW_STRIDE + half);
    int row = (blockIdx.x * (blockDim.x / 32) + warp) * 2 + half;
    bool here = row < rows;
    const float* row_weights = weights + (size_t)(here ? row : rows - 1) * in + first;
    float low = 0.f, high = 0.f;
    for (int i = candidate; i < count; i += HALF_WARP) {
        low = fminf(low, row_weights[i]);
        high = fmaxf(high, row_weights[i]);
    }
    for (int offset = HALF_WARP / 2; offset > 0; offset >>= 1) {
        low = fminf(low, __shfl_xor_sync(FULL_WARP, low, offset));
        high = fmaxf(high, __shfl_xor_sync(FULL_WARP, high, offset));
    }
    int candidates = candidate_count(spec);
    Grid grid = candidate_grid(low, high, min(candidate, candidates - 1), spec);
    float max_code = (float)((1 << spec.bits) - 1), sum = 0.f, inverse = inverse_of(grid.scale);
    for (int start = 0; start < count; start += WIDTH) {
        int width = min(WIDTH, count - start);
        __syncthreads();
        load_square(triangle, inverses, u + (size_t)(first + start) * in + first + start, in, width);
        for (int i = candidate; i < WIDTH; i += HALF_WARP) mine[i] = i < width ? row_weights[start + i] : 0.f;
        __syncthreads();
        for (int tile = 0; tile < width; tile += TILE) {
            float w[TILE];
#pragma unroll
            for (int s = 0; s < TILE; s++) w[s] = mine[tile + s];
            subtract_products(w, errors, triangle, tile, 0, tile);
#pragma unroll
            for (int s = 0; s < TILE; s++) {
                if (tile + s < width) {
                    const float* u_row = triangle + (tile + s) * WIDTH + tile;
                    float value = (code_by(grid, inverse, max_code, w[s]) - grid.zero) * grid.scale;
                    float error = quotient(w[s] - value, u_row[s], inverses[tile + s]);
                    sum += error * error;
                    errors[(tile + s) * ROW_STRIDE] = error;
#pragma unroll
                    for (int later = s + 1; later < TILE; later++) w[later] -= error * u_row[later];
                }
            }
        }
    }
    // The least sum, of equal ones the first.
    float least = candidate < candidates && sum == sum ? sum : __int_as_float(0x7f800000);
    int best = candidate;
    for (int offset = HALF_WARP / 2; offset > 0; offset >>= 1) {
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
