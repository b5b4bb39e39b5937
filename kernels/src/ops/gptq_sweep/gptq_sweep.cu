// One thread solves one output row. What is left of its weights lies in shared memory, by columns, until they are solved, and
// their errors after that; 16 columns at a time are in registers. The block's triangle of U lies in shared memory as well,
// of which all threads of a warp read the same part.

#define WIDTH 128      // most columns of a block
#define TILE 16        // columns in registers
#define ROW_STRIDE 33  // between columns of 32 rows in shared memory

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

/// What a warp of `sweep_block` works on.
struct Rows {
    const float* triangle;  // [WIDTH, WIDTH]: of U, zeros behind the block
    const float* inverses;  // [WIDTH]: of its diagonal
    float* mine;            // [WIDTH, ROW_STRIDE], this thread's row: weights, then errors
    float* weights;         // [rows, in] from the block's first column on
    int rows, in, first_row, row;
    bool here;              // whether the thread has a row: others do as the last one does, and store nothing
};

/// A square of a matrix into shared memory, with the inverse of its diagonal; the identity behind its width, and instead of no
/// matrix.
__device__ __forceinline__ void load_square(float* square, float* inverses, const float* matrix, int in, int width) {
    const int AT_ONCE = 16;
    for (int start = threadIdx.x; start < WIDTH * WIDTH; start += AT_ONCE * blockDim.x) {
        float values[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            int i = start + k * blockDim.x, r = i / WIDTH, c = i % WIDTH;
            bool inside = matrix && r < width && c < width;
            values[k] = r == c ? 1.f : 0.f;
            if (inside) values[k] = matrix[(size_t)r * in + c];
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            int i = start + k * blockDim.x;
            if (i < WIDTH * WIDTH) square[i] = values[k];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < WIDTH; i += blockDim.x) inverses[i] = inverse_of(square[i * (WIDTH + 1)]);
    __syncthreads();
}

/// x[s] -= factors[t] triangle[t, tile + s] for `from <= t < to`; factors of one thread lie ROW_STRIDE apart.
__device__ __forceinline__ void subtract_products(
    float (&x)[TILE], const float* factors, const float* triangle, int tile, int from, int to) {
#pragma unroll 8
    for (int t = from; t < to; t++) {
        float factor = factors[t * ROW_STRIDE];
        const float4* u_row = (const float4*)(triangle + t * WIDTH + tile);
#pragma unroll
        for (int s = 0; s < TILE / 4; s++) {
            float4 part = u_row[s];
            x[4 * s] -= factor * part.x;
            x[4 * s + 1] -= factor * part.y;
            x[4 * s + 2] -= factor * part.z;
            x[4 * s + 3] -= factor * part.w;
        }
    }
}

/// The grid of the group at place `place`, column `start` of the block, which the sweep enters now and leaves at `group_end`.
/// Where that lies in the block, the thread's weights up to there are brought up to date first.
__device__ __forceinline__ Grid enter_group(
    const Rows& at, float* scales, u8* zeros, int group, bool starts_here, int start, int end, int count,
    const Spec& spec) {
    size_t stored = (size_t)group * at.rows + at.row;
    for (int tile = start & -TILE; start > 0 && tile < end; tile += TILE) {
        float w[TILE];
#pragma unroll
        for (int s = 0; s < TILE; s++) w[s] = at.mine[(tile + s) * ROW_STRIDE];
        subtract_products(w, at.mine, at.triangle, tile, 0, start);
#pragma unroll
        for (int s = 0; s < TILE; s++)
            if (tile + s >= start && tile + s < end) at.mine[(tile + s) * ROW_STRIDE] = w[s];
    }
    if (!starts_here) return {scales[stored], (float)zeros[stored]};
    Grid grid = {1.f, 0.f};
    if (count <= end - start) {
        grid = find_grid<1>(at.mine + start * ROW_STRIDE, ROW_STRIDE, count, spec);
    } else {
        for (int r = 0; r < 32; r++) {
            const float* weights = at.weights + (size_t)min(at.first_row + r, at.rows - 1) * at.in + start;
            Grid found = find_grid<32>(weights, 1, count, spec);
            if (threadIdx.x % 32 == r) grid = found;
        }
    }
    if (at.here) {
        scales[stored] = grid.scale;
        zeros[stored] = (u8)grid.zero;
    }
    return grid;
}

/// The grids of a tile's columns.
__device__ __forceinline__ void load_grids(
    Grid (&grids)[TILE], float (&inverses)[TILE], const float* scales, const u8* zeros, const u32* group_of, int rows,
    int row, int tile, int width) {
    size_t stored[TILE];
#pragma unroll
    for (int s = 0; s < TILE; s++) stored[s] = (size_t)group_of[min(tile + s, width - 1)] * rows + row;
#pragma unroll
    for (int s = 0; s < TILE; s++) grids[s] = {scales[stored[s]], (float)zeros[stored[s]]};
#pragma unroll
    for (int s = 0; s < TILE; s++) inverses[s] = inverse_of(grids[s].scale);
}

/// Values and codes of a tile's columns from `start` to `end`.
__device__ __forceinline__ void store_tile(
    const Rows& at, u8* codes, const float (&values)[TILE], const u32 (&packed)[TILE / 4], int tile, int start, int end) {
    if (!at.here) return;
    float* weights = at.weights + (size_t)at.row * at.in + tile;
    codes += (size_t)at.row * at.in + tile;
    if (start <= tile && tile + TILE <= end && ((size_t)weights | (size_t)codes) % 16 == 0) {
#pragma unroll
        for (int s = 0; s < TILE; s += 4)
            *(float4*)(weights + s) = make_float4(values[s], values[s + 1], values[s + 2], values[s + 3]);
        *(uint4*)codes = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        return;
    }
#pragma unroll
    for (int s = 0; s < TILE; s++) {
        if (tile + s < start || tile + s >= end) continue;
        weights[s] = values[s];
        codes[s] = (u8)(packed[s / 4] >> 8 * (s % 4));
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
    extern __shared__ __align__(16) float sweep_memory[];
    int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* triangle = sweep_memory;
    float* inverses = triangle + WIDTH * WIDTH;
    float* columns = inverses + WIDTH + warp * WIDTH * ROW_STRIDE;  // [WIDTH, ROW_STRIDE]
    int first_row = (blockIdx.x * warps + warp) * 32, row = min(first_row + lane, rows - 1);
#pragma unroll 8
    for (int r = 0; r < 32; r++) {
        const float* source = weights + (size_t)min(first_row + r, rows - 1) * in + first;
#pragma unroll
        for (int s = 0; s < WIDTH / 32; s++) {
            int c = lane + 32 * s;
            float weight = source[min(c, width - 1)];
            columns[c * ROW_STRIDE + r] = c < width ? weight : 0.f;
        }
    }
    load_square(triangle, inverses, u ? u + (size_t)first * in + first : nullptr, in, width);
    if (first_row >= rows) return;
    Rows at = {triangle, inverses, columns + lane, weights + first, rows, in, first_row, row, first_row + lane < rows};
    float max_code = (float)((1 << spec.bits) - 1), loss = 0.f;
    // Runs of columns that share a grid, or all of them where every grid is known.
    for (int start = 0, end; start < width; start = end) {
        int place = first + start, group = group_of[place], count = (int)group_end[place] - place;
        end = grids_known ? width : min(start + count, width);
        Grid grid = {1.f, 0.f};
        if (!grids_known) {
            bool starts_here = place == 0 || group_of[place - 1] != group;
            grid = enter_group(at, scales, zeros, group, starts_here, start, end, count, spec);
        }
        float inverse = inverse_of(grid.scale);
        for (int tile = start & -TILE; tile < end; tile += TILE) {
            float w[TILE], scale_inverses[TILE];
            Grid grids[TILE];
            u32 packed[TILE / 4] = {};
#pragma unroll
            for (int s = 0; s < TILE; s++) {
                w[s] = at.mine[(tile + s) * ROW_STRIDE];
                grids[s] = grid;
                scale_inverses[s] = inverse;
            }
            if (grids_known) load_grids(grids, scale_inverses, scales, zeros, group_of + first, rows, row, tile, width);
            subtract_products(w, at.mine, triangle, tile, start, max(start, tile));
#pragma unroll
            for (int s = 0; s < TILE; s++) {
                int i = tile + s;
                if (i < start || i >= end) continue;
                const float* u_row = triangle + i * WIDTH + tile;
                float code = code_by(grids[s], scale_inverses[s], max_code, w[s]);
                float value = (code - grids[s].zero) * grids[s].scale;
                float error = quotient(w[s] - value, u_row[s], inverses[i]);
                loss += 0.5f * error * error;
                at.mine[i * ROW_STRIDE] = error;
#pragma unroll
                for (int later = s + 1; later < TILE; later++) w[later] -= error * u_row[later];
                w[s] = value;
                packed[s / 4] |= (u32)code << 8 * (s % 4);
            }
            store_tile(at, codes + first, w, packed, tile, start, end);
        }
    }
    __syncwarp();
    for (int r = 0; r < 32 && first_row + r < rows; r++)
        for (int c = lane; c < width; c += 32)
            errors[(size_t)(first_row + r) * stride + c] = columns[c * ROW_STRIDE + r];
    if (at.here) losses[row] += loss;
}
