/// Rows of the triangles that are inverted at once.
#define LEAF 64

/// The permuted and damped Hessian with both axes reversed, column-major, lower triangle.
extern "C" __global__ void reversed_lower(
    float* reversed,       // [size, size], column-major
    const float* hessian,  // [size, size], row-major, lower triangle meaningful
    const u32* order,      // [size]
    int size, float damp) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, j = blockIdx.y;
    if (i >= size) return;
    float value = 0.f;
    if (i >= j) {
        u32 a = order[size - 1 - i], b = order[size - 1 - j];
        value = hessian[(size_t)max(a, b) * size + min(a, b)];
        if (i == j) value += value == 0.f ? 1.f + damp : damp;
    }
    reversed[(size_t)j * size + i] = value;
}

/// The permuted and damped Hessian, both triangles.
extern "C" __global__ void damped(
    float* out,            // [size, size], row-major
    const float* hessian,  // [size, size], row-major, lower triangle meaningful
    const u32* order,      // [size]
    int size, float damp) {
    int j = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y;
    if (j >= size) return;
    u32 a = order[i], b = order[j];
    float value = hessian[(size_t)max(a, b) * size + min(a, b)];
    if (i == j) value += value == 0.f ? 1.f + damp : damp;
    out[(size_t)i * size + j] = value;
}

/// Inverts the triangles of 64 rows on the diagonal, in place: a block of threads each, a thread a column.
extern "C" __global__ void invert_leaves(
    float* matrix,  // [size, size], column-major, lower triangles
    int size) {
    extern __shared__ float leaf[];
    const int STRIDE = LEAF + 1;
    int first = blockIdx.x * LEAF, rows = min(LEAF, size - first), j = threadIdx.x;
    for (int i = 0; i < rows; i++)
        if (j < rows) leaf[j * STRIDE + i] = matrix[(size_t)(first + j) * size + first + i];
    __syncthreads();
    if (j >= rows) return;
    float column[LEAF];
#pragma unroll
    for (int i = 0; i < LEAF; i++) {
        float sum = i == j ? 1.f : 0.f;
#pragma unroll
        for (int k = 0; k < i; k++) sum -= leaf[k * STRIDE + i] * column[k];
        column[i] = i < j || i >= rows ? 0.f : sum / leaf[i * STRIDE + i];
    }
#pragma unroll
    for (int i = 0; i < LEAF; i++)
        if (i < rows) matrix[(size_t)(first + j) * size + first + i] = column[i];
}

/// U[i, j] = inverse[size - 1 - i, size - 1 - j], row-major, zeros below the diagonal; counts values that are
/// not finite.
extern "C" __global__ void turn_inverse(
    float* u,              // [size, size], row-major
    u32* not_finite,       // [1]
    const float* inverse,  // [size, size], column-major, lower triangle meaningful
    int size) {
    int j = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y;
    if (j >= size) return;
    float value = j >= i ? inverse[(size_t)(size - 1 - j) * size + (size - 1 - i)] : 0.f;
    if (!isfinite(value)) atomicAdd(not_finite, 1u);
    u[(size_t)i * size + j] = value;
}

/// diagonal[i] = H[i, i]
extern "C" __global__ void take_diagonal(float* diagonal, const float* hessian, int size) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) diagonal[i] = hessian[(size_t)i * size + i];
}
