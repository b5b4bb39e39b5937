// Moving rows and columns of activations.

/// y[t] = x[rows[t]] for rows of the compute type; one block a row.
extern "C" __global__ void gather_rows(real_t* y, const real_t* x, const u32* rows, int width) {
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        y[(size_t)blockIdx.x * width + i] = x[(size_t)rows[blockIdx.x] * width + i];
}

/// y[t, i] = x[t, i] for the columns of one part; `y` points to its first column. One block a row.
extern "C" __global__ void put_columns(real_t* y, const real_t* x, int width, int stride) {
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        y[(size_t)blockIdx.x * stride + i] = x[(size_t)blockIdx.x * width + i];
}

/// Asks for what a block will need of an order, or of anything else of `width` times 4 bytes, while it waits.
__device__ __forceinline__ void prefetch_words(const void* words, int width) {
    for (int i = 32 * threadIdx.x; words && i < width; i += 32 * blockDim.x) prefetch((const u32*)words + i);
}

#if !F32
/// The features that go to eight neighbouring places.
struct Places {
    uint4 low, high;

    __device__ __forceinline__ void read(const u32* order) {
        low = ((const uint4*)order)[0], high = ((const uint4*)order)[1];
    }

    /// Stores them, from the token's row, at place `i` of a row of `width` or of panels.
    __device__ __forceinline__ void store(real_t* y, const real_t* row, int token, int i, int width,
                                          int panel_tokens) const {
        size_t place = panel_tokens ? panel_place(token, i, panel_tokens) : (size_t)token * width + i;
        *(uint4*)(y + place) = make_uint4(row[low.x] | (u32)row[low.y] << 16, row[low.z] | (u32)row[low.w] << 16,
                                          row[high.x] | (u32)row[high.y] << 16, row[high.z] | (u32)row[high.w] << 16);
    }
};
#endif

/// Stores a token's row from place `from` on, which all threads of the block see in shared memory: feature order[i] at
/// place i of a row, or of panels with room for `panel_tokens`.
__device__ void store_row(real_t* y, const real_t* row, const u32* order, int token, int from, int width,
                          int panel_tokens) {
#if !F32
    if (width % 8 == 0) {
        for (int i = from + 8 * threadIdx.x; i < width; i += 8 * blockDim.x) {
            Places places;
            places.read(order + i);
            places.store(y, row, token, i, width, panel_tokens);
        }
        return;
    }
#endif
    for (int i = from + threadIdx.x; i < width; i += blockDim.x) y[(size_t)token * width + i] = row[order[i]];
}

/// Rows of x in another order; one block a row, which it keeps in shared memory meanwhile.
extern "C" __global__ void order_columns(real_t* y, const real_t* x, const u32* order, int width, int panel_tokens) {
    extern __shared__ __align__(16) real_t row[];
    start_next_early();
    prefetch_words(order, width);
    await_previous();
    const real_t* from = x + (size_t)blockIdx.x * width;
    const int EACH = 16 / sizeof(real_t);
    if (width % EACH == 0)
        for (int i = threadIdx.x; i < width / EACH; i += blockDim.x) ((uint4*)row)[i] = ((const uint4*)from)[i];
    else
        for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] = from[i];
    __syncthreads();
    store_row(y, row, order, blockIdx.x, 0, width, panel_tokens);
}
