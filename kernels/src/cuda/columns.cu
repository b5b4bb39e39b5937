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

/// y[t, i] = x[t, order[i]]; one block a row, which it keeps in shared memory meanwhile.
extern "C" __global__ void order_columns(real_t* y, const real_t* x, const u32* order, int width) {
    extern __shared__ real_t row[];
    const real_t* from = x + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] = from[i];
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += blockDim.x) y[(size_t)blockIdx.x * width + i] = row[order[i]];
}
