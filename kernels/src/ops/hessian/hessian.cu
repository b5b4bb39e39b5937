/// y = a - b, rounded to the compute type: what two streams differ by is small, and then exact. As `add`.
extern "C" __global__ void stream_difference(real_t* y, const real_t* a, const real_t* b, size_t count) {
    size_t i = 8 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    bool aligned = ((size_t)y | (size_t)a | (size_t)b) % 16 == 0;
    if (aligned && i + 8 <= count) {
        float x[8], z[8];
        load8(x, a + i);
        load8(z, b + i);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] -= z[j];
        store8(y + i, x);
    } else {
        for (size_t end = min(i + 8, count); i < end; i++) y[i] = to_real(to_float(a[i]) - to_float(b[i]));
    }
}
