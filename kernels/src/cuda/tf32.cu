// f32 values as sums of two values of 11 bits, which the tensor cores multiply without rounding.

__device__ __forceinline__ float tf32_round(float x) {
    u32 bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

/// The parts of a value in three copies of its column, `inner` values apart: low, high and high, or high, low and high.
__device__ __forceinline__ void store_parts(float* place, float x, int inner, int high_first) {
    float high = tf32_round(x), low = tf32_round(x - high);
    place[0] = high_first ? high : low;
    place[inner] = high_first ? low : high;
    place[2 * inner] = high;
}

/// The parts of a factor whose columns run along the inner dimension.
extern "C" __global__ void tf32_parts(
    float* parts,         // [3 inner, outer], columns `parts_stride` apart
    const float* matrix,  // [inner, outer], columns `stride` apart
    int inner, int outer, int stride, int parts_stride, int high_first) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= inner) return;
    for (int j = blockIdx.y; j < outer; j += gridDim.y)
        store_parts(parts + (size_t)j * parts_stride + i, matrix[(size_t)j * stride + i], inner, high_first);
}

/// The parts of a factor whose columns run along the outer dimension, turned: the tensor cores read f32 values along the inner
/// one. Tiles of 32 x 32, by 32 x 8 threads.
extern "C" __global__ void tf32_parts_turned(
    float* parts,         // [3 inner, outer], columns `parts_stride` apart
    const float* matrix,  // [outer, inner], columns `stride` apart
    int inner, int outer, int stride, int parts_stride, int high_first) {
    __shared__ float tile[32][33];
    int x = threadIdx.x % 32, first_y = threadIdx.x / 32, outer_start = 32 * blockIdx.x, inner_start = 32 * blockIdx.y;
#pragma unroll
    for (int y = first_y; y < 32; y += 8)
        if (outer_start + x < outer && inner_start + y < inner)
            tile[y][x] = matrix[(size_t)(inner_start + y) * stride + outer_start + x];
    __syncthreads();
#pragma unroll
    for (int y = first_y; y < 32; y += 8)
        if (outer_start + y < outer && inner_start + x < inner) {
            float* place = parts + (size_t)(outer_start + y) * parts_stride + inner_start + x;
            store_parts(place, tile[x][y], inner, high_first);
        }
}
