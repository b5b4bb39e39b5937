/// y = a + b; one thread eight elements, one by one where they do not lie on 16 bytes.
extern "C" __global__ void add(real_t* y, const real_t* a, const real_t* b, size_t count) {
    size_t i = 8 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    bool aligned = ((size_t)y | (size_t)a | (size_t)b) % 16 == 0;
    if (aligned && i + 8 <= count) {
        float x[8], z[8];
        load8(x, a + i);
        load8(z, b + i);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] += z[j];
        store8(y + i, x);
    } else {
        for (size_t end = min(i + 8, count); i < end; i++) y[i] = to_real(to_float(a[i]) + to_float(b[i]));
    }
}

/// y[t, n] += bias[n]; one block a token.
extern "C" __global__ void add_bias(real_t* y, const real_t* bias, int width) {
    for (int n = threadIdx.x; n < width; n += blockDim.x) {
        size_t i = (size_t)blockIdx.x * width + n;
        y[i] = to_real(to_float(y[i]) + to_float(bias[n]));
    }
}
