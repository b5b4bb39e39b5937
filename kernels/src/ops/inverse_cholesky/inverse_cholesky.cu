/// Rows of a triangle that are factored and inverted at once.
#define LEAF 128

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

/// The permuted Hessian, both triangles, with `damp` on its diagonal, or `dead` where that is zero.
extern "C" __global__ void damped(
    float* out,            // [size, size], row-major
    const float* hessian,  // [size, size], row-major, lower triangle meaningful
    const u32* order,      // [size]
    int size, float damp, float dead) {
    int j = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y;
    if (j >= size) return;
    u32 a = order[i], b = order[j];
    float value = hessian[(size_t)max(a, b) * size + min(a, b)];
    if (i == j) value += value == 0.f ? dead : damp;
    out[(size_t)i * size + j] = value;
}

/// The inverse of the Cholesky factor of up to 128 rows and columns on the diagonal, by one block of threads. Rows are
/// eliminated as Gauss does it, beside an identity: what is done to that is the inverse of the factor, up to the scale of its
/// rows. Of each column either the matrix or the inverse is still needed, so one place holds both: those of row i and columns
/// `16 part` to `16 part + 15` are registers of a thread. What a step needs of other threads' comes by shared memory: the row
/// of the inverse and the column of the matrix that belong to its pivot.
extern "C" __global__ void factor_leaf(
    const float* rest,  // [size, size], column-major, lower triangle meaningful
    float* inverse,     // [size, size], column-major, zeros above the diagonal
    u32* failed,        // [1]: the first pivot that is not positive
    int size, int first, int rows) {
    __shared__ __align__(16) float vectors[2][LEAF];
    __shared__ float pivots[LEAF], inverses[LEAF];  // and 1 / pivot
    const int SHARE = 16;
    int i = threadIdx.x % LEAF, part = threadIdx.x / LEAF;
    float a[SHARE];
#pragma unroll
    for (int m = 0; m < SHARE; m++) {
        int k = SHARE * part + m;
        a[m] = i < rows && k <= i ? rest[(size_t)(first + k) * size + first + i] : 0.f;
    }
    if (part == 0) {
        vectors[0][i] = i == 0 ? 1.f : a[0];
        if (i == 0) pivots[0] = a[0], inverses[0] = inverse_of(a[0]);
    }
    for (int j_part = 0; j_part < LEAF / SHARE; j_part++) {
#pragma unroll
        for (int m_j = 0; m_j < SHARE; m_j++) {
            int j = SHARE * j_part + m_j;
            if (j >= rows) break;
            __syncthreads();
            const float* now = vectors[j % 2];
            float* next = vectors[(j + 1) % 2];
            if (i <= j || SHARE * part > i) continue;
            float share = now[i] * inverses[j];
            if (part == j_part) a[m_j] = 0.f;  // the identity's column begins
#pragma unroll
            for (int m = 0; m < SHARE; m += 4) {
                float4 v = *(const float4*)(now + SHARE * part + m);
                a[m] -= share * v.x;
                a[m + 1] -= share * v.y;
                a[m + 2] -= share * v.z;
                a[m + 3] -= share * v.w;
            }
            if (part == j_part + (m_j + 1) / SHARE) {
                float value = a[(m_j + 1) % SHARE];
                next[i] = i == j + 1 ? 1.f : value;
                if (i == j + 1) pivots[i] = value, inverses[i] = inverse_of(value);
            }
            if (i == j + 1) {
#pragma unroll
                for (int m = 0; m < SHARE; m++)
                    if (part < j_part || (part == j_part && m <= m_j)) next[SHARE * part + m] = a[m];
            }
        }
    }
    __syncthreads();
    if (i >= rows) return;
    if (part == 0 && !(pivots[i] > 0.f)) atomicMin(failed, (u32)(first + i));
    float scale = 1.f / sqrtf(pivots[i]);
#pragma unroll
    for (int m = 0; m < SHARE; m++) {
        int k = SHARE * part + m;
        if (k <= i) inverse[(size_t)(first + k) * size + first + i] = k == i ? scale : scale * a[m];
    }
}

/// U[i, j] = inverse[size - 1 - i, size - 1 - j], row-major, zeros below the diagonal; values that are not
/// finite are failures of their rows.
extern "C" __global__ void turn_inverse(
    float* u,              // [size, size], row-major
    u32* failed,           // [1]: the first pivot that is not positive
    const float* inverse,  // [size, size], column-major, lower triangle meaningful
    int size) {
    int j = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y;
    if (j >= size) return;
    float value = j >= i ? inverse[(size_t)(size - 1 - j) * size + (size - 1 - i)] : 0.f;
    if (!isfinite(value)) atomicMin(failed, (u32)(size - 1 - i));
    u[(size_t)i * size + j] = value;
}

/// diagonal[i] = H[i, i]
extern "C" __global__ void take_diagonal(float* diagonal, const float* hessian, int size) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) diagonal[i] = hessian[(size_t)i * size + i];
}
